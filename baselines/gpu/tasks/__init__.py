"""Programs that `make bench-gpu` runs on the device, one process each."""
