#!/bin/bash
#BSUB -J gpt-12b-48-axonn
#BSUB -nnodes 8
#BSUB -W 2:30
#BSUB -o lsf-%J.out
#BSUB -wa USR1
#BSUB -wt 10
#BSUB -rn
#BSUB -P abc123_g
#BSUB -q regular
# What every job does, whatever the scheduler; the lines above are the scheduler's.
# AxoNN: gpt-12b-48 on 48 ranks, 8 nodes
set -uo pipefail

cd "$LS_SUBCWD" || exit 2
job="$LSB_JOBID"
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

export OMP_NUM_THREADS="7"
export PAMI_ENABLE_STRIPING="1"
export PAMI_IBV_ADAPTER_AFFINITY="1"
export PAMI_IBV_DEVICE_NAME="mlx5_0:1,mlx5_3:1"
export PAMI_IBV_DEVICE_NAME_1="mlx5_3:1,mlx5_0:1"
export ROOT="/work/my \"own\" suite"
export LD_LIBRARY_PATH="$ROOT/rccl/lib:${LD_LIBRARY_PATH:-}"
export A_NOTE="it's \`not\` run; back\\slash & > * #"
MASTER_ADDR="$(awk '!seen[$0]++' "$LSB_DJOB_HOSTFILE" | head -n 1)"
MASTER_PORT=$((20000 + ${job//[!0-9]/} % 20000))
[ -n "$MASTER_ADDR" ] || { echo "no node of this job is known" >&2; exit 2; }
ATTEMPT="$PWD/$attempt"
export MASTER_ADDR MASTER_PORT ATTEMPT

# What this run is, for whoever finds its folder.
awk '!seen[$0]++' "$LSB_DJOB_HOSTFILE" > "$attempt/nodes.txt"
date --utc +%FT%TZ > "$attempt/started.txt"
{ apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python --version; apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -m pip list --format=freeze; } > "$attempt/versions.txt" 2>&1
apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -c "from axonn.training.provenance import commit; print(commit() or '')" > "$attempt/commit.txt" 2>/dev/null
(module list) > "$attempt/modules.txt" 2>&1
env | grep -E '^(A_NOTE|LD_LIBRARY_PATH|MASTER_ADDR|MASTER_PORT|OMP_NUM_THREADS|PAMI_ENABLE_STRIPING|PAMI_IBV_ADAPTER_AFFINITY|PAMI_IBV_DEVICE_NAME|PAMI_IBV_DEVICE_NAME_1|ROOT)=' | sort > "$attempt/environment.txt"
cp job.sh rank.sh work.json "$attempt/"
cp "spec.json" "run/spec.json"

status=143
if [ "$reason" = "failed" ]; then
    # Where a scheduler sends USR1 to all that this script started, the ranks do not die of it.
    (trap '' USR1 && exec mpiexec -n 48 -ppn 6 bash rank.sh) > "$attempt/output.txt" 2>&1 9>&- &
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
