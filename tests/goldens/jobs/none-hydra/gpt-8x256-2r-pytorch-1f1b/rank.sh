#!/usr/bin/env bash
# What every rank runs: it learns who it is from the launcher, and starts the framework in the run folder.
set -euo pipefail
export RANK="$PMI_RANK"
export WORLD_SIZE="$PMI_SIZE"
export LOCAL_RANK="$MPI_LOCALRANKID"
# One rank of each node: the script itself may run where there are no GPUs.
if [ "$LOCAL_RANK" -eq 0 ]; then
    (rocm-smi --showclocks) > "$ATTEMPT/clocks-$(hostname -s).txt" 2>&1 || true
fi
cd run
exec apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -m axonn.training.worker .
