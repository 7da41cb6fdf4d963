#!/bin/bash
#SBATCH --job-name=gpt-12b-48-axonn
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=02:30:00
#SBATCH --output=slurm-%j.out
#SBATCH --signal=B:USR1@600
#SBATCH --no-requeue
#SBATCH --gpus-per-node=4
#SBATCH --account=abc123_g
#SBATCH --qos=regular
#SBATCH --constraint=gpu
# What every job does, whatever the scheduler; the lines above are the scheduler's.
# AxoNN: gpt-12b-48 on 48 ranks, 12 nodes
set -uo pipefail

cd "$SLURM_SUBMIT_DIR" || exit 2
job="$SLURM_JOB_ID"
mkdir -p run || exit 2
# Held as long as this script lives: two starts would write into each other's files. The ranks and what is set up
# must not hold it on. A file system without locks gives another status than 1.
if command -v flock > /dev/null 2>&1; then
    exec 9> run/.lock
    flock -n 9 2> /dev/null
    if [ $? -eq 1 ]; then
        echo "another start of this job still runs in $PWD/run; wait for its end, or cancel it" >&2
        exit 2
    fi
fi
# Every start has a folder of its own; should an id come again, as that of a process may, it gets a number.
attempt="run/attempt-$job"
number=1
while [ -e "$attempt" ]; do
    number=$((number + 1))
    attempt="run/attempt-$job-$number"
done
mkdir -p "$attempt" || exit 2
# Of an earlier start, which this one goes on from.
rm -f run/stop run/rank-*.json run/rank-*.alive

# What ended.json will say: "failed" as long as nothing else is known.
reason="failed"
ranks=""
# When (by SECONDS) the launcher is sent which signal, if the ranks have not ended.
deadline=""
signal="TERM"

# The scheduler says so with USR1, 600 seconds before.
# shellcheck disable=SC2317,SC2329  # Called by the trap.
near_the_limit() {
    [ "$reason" = "failed" ] || return 0
    reason="wall-limit"
    deadline=$((SECONDS + 300))
    echo "the wall limit is near: the ranks are told to save what they have, and to end" >&2
    touch run/stop
}
# Schedulers cancel with TERM and soon after kill what is left: there is no time to save anything.
# shellcheck disable=SC2317,SC2329  # Called by the trap.
cancelled() {
    [ "$reason" != "failed" ] || reason="cancelled"
    [ "$signal" != "TERM" ] || deadline=$SECONDS
}
trap near_the_limit USR1
trap cancelled TERM INT

# What others wrote may use variables that are not set.
set +u
{
module purge
module load PrgEnv-gnu/8.3.3
module load cray-mpich nccl/2.18
source "$HOME/my env/bin/activate"
ulimit -c 0
} 9>&-
set -u

export CUDA_DEVICE_MAX_CONNECTIONS="1"
export FI_CXI_RDZV_EAGER_SIZE="0"
export FI_CXI_RDZV_GET_MIN="0"
export FI_CXI_RDZV_THRESHOLD="0"
export MPICH_GPU_SUPPORT_ENABLED="1"
export NCCL_CROSS_NIC="1"
export NCCL_NET="AWS Libfabric"
export NCCL_NET_GDR_LEVEL="PHB"
export NCCL_SOCKET_IFNAME="hsn"
export OMP_NUM_THREADS="32"
export ROOT="/work/my \"own\" suite"
export LD_LIBRARY_PATH="$ROOT/rccl/lib:${LD_LIBRARY_PATH:-}"
export A_NOTE="it's \`not\` run; back\\slash & > * #"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + ${job//[!0-9]/} % 20000))
[ -n "$MASTER_ADDR" ] || { echo "no node of this job is known" >&2; exit 2; }
ATTEMPT="$PWD/$attempt"
export MASTER_ADDR MASTER_PORT ATTEMPT

# What this run is, for whoever finds its folder.
scontrol show hostnames "$SLURM_JOB_NODELIST" > "$attempt/nodes.txt"
date --utc +%FT%TZ > "$attempt/started.txt"
{ apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python --version; apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -m pip list --format=freeze; } > "$attempt/versions.txt" 2>&1
apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -c "from axonn.training.provenance import commit; print(commit() or '')" > "$attempt/commit.txt" 2>/dev/null
(module list) > "$attempt/modules.txt" 2>&1
env | grep -E '^(A_NOTE|CUDA_DEVICE_MAX_CONNECTIONS|FI_CXI_RDZV_EAGER_SIZE|FI_CXI_RDZV_GET_MIN|FI_CXI_RDZV_THRESHOLD|LD_LIBRARY_PATH|MASTER_ADDR|MASTER_PORT|MPICH_GPU_SUPPORT_ENABLED|NCCL_CROSS_NIC|NCCL_NET|NCCL_NET_GDR_LEVEL|NCCL_SOCKET_IFNAME|OMP_NUM_THREADS|ROOT)=' | sort > "$attempt/environment.txt"
cp job.sh rank.sh work.json "$attempt/"
cp "spec.json" "run/spec.json"

status=143
if [ "$reason" = "failed" ]; then
    # Where a scheduler sends USR1 to all that this script started, the ranks do not die of it.
    (trap '' USR1 && exec srun --nodes=12 --ntasks=48 --ntasks-per-node=4 --cpus-per-task=32 --kill-on-bad-exit=1 --cpu-bind=cores bash rank.sh) > "$attempt/output.txt" 2>&1 9>&- &
    ranks=$!
    # A plain wait would sleep through the deadline.
    while kill -0 "$ranks" 2>/dev/null; do
        if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
            kill -s "$signal" "$ranks" 2>/dev/null
            signal="KILL"
            deadline=$((SECONDS + 10))
        fi
        sleep 0.2 9>&-
    done
    wait "$ranks"
    status=$?
fi
# Near the limit, 0 says less: some frameworks end with it after they saved, before their last batch.
if [ "$status" -eq 0 ] && { [ "$reason" = "failed" ] || grep -qs '"state": "done"' run/rank-0.json; }; then
    reason="finished"
fi
# Nobody but a user's own hand makes run/stop before the limit.
if [ "$status" -eq 75 ] && [ "$reason" = "failed" ]; then
    reason="cancelled"
fi
# By which axonn collect sees whether what the run left was changed since; there before it is said that the run ended.
(cd run && sha256sum batches.jsonl rank-*.json "${attempt#run/}/output.txt") > "$attempt/sha256.txt" 2>/dev/null
# Whole or not at all, whenever this script is killed.
printf '{"job": "%s", "status": %d, "reason": "%s"}\n' "$job" "$status" "$reason" > "$attempt/.ended.json"
mv "$attempt/.ended.json" "$attempt/ended.json"
exit "$status"
