"""Job scripts for the schedulers of clusters. Not written yet; `axonn run` measures on one machine."""
