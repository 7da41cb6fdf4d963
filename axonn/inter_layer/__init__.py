"""One stage of the pipeline at work: what it computes, keeps, sends and hears."""
