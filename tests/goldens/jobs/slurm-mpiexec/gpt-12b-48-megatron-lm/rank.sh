#!/usr/bin/env bash
# What every rank runs: it learns who it is from the launcher, and starts the framework in the run folder.
set -euo pipefail
export RANK="$OMPI_COMM_WORLD_RANK"
export WORLD_SIZE="$OMPI_COMM_WORLD_SIZE"
export LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK"
program="$HOME/Megatron LM"
# One rank of each node: the script itself may run where there are no GPUs.
if [ "$LOCAL_RANK" -eq 0 ]; then
    (nvidia-smi --query-gpu=index,name,clocks.sm,clocks.mem,power.draw --format=csv,noheader) > "$ATTEMPT/clocks-$(hostname -s).txt" 2>&1 || true
fi
cd run
exec apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -u "$program/pretrain_gpt.py" --num-layers 48 --hidden-size 4512 --num-attention-heads 24 --seq-length 512 --max-position-embeddings 512 --position-embedding-type learned_absolute --hidden-dropout 0.1 --attention-dropout 0.1 --transformer-impl local --no-gradient-accumulation-fusion --tensor-model-parallel-size 3 --pipeline-model-parallel-size 16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --micro-batch-size 8 --global-batch-size 16384 --train-iters 11 --fp16 --initial-loss-scale 65536 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-08 --weight-decay 0.01 --lr 0.001 --min-lr 0.001 --lr-decay-style constant --clip-grad 0.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 51199 --make-vocab-size-divisible-by 128 --log-interval 1 --log-throughput --log-memory-interval 1 --eval-iters 0 --eval-interval 12 --save checkpoints --load checkpoints --save-interval 12 --exit-signal-handler --exit-signal SIGUSR1
