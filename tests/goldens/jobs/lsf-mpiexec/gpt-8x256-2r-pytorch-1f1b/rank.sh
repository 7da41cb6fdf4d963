#!/usr/bin/env bash
# What every rank runs: it learns who it is from the launcher, and starts the framework in the run folder.
set -euo pipefail
export RANK="$OMPI_COMM_WORLD_RANK"
export WORLD_SIZE="$OMPI_COMM_WORLD_SIZE"
export LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK"
# One rank of each node: the script itself may run where there are no GPUs.
if [ "$LOCAL_RANK" -eq 0 ]; then
    (nvidia-smi --query-gpu=index,name,clocks.sm,clocks.mem,power.draw --format=csv,noheader) > "$ATTEMPT/clocks-$(hostname -s).txt" 2>&1 || true
fi
cd run
exec apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -m axonn.training.worker .
