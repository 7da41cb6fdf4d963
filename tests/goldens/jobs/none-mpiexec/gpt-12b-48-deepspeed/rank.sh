#!/usr/bin/env bash
# What every rank runs: it learns who it is from the launcher, and starts the framework in the run folder.
set -euo pipefail
export RANK="$OMPI_COMM_WORLD_RANK"
export WORLD_SIZE="$OMPI_COMM_WORLD_SIZE"
export LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK"
program="/work/Megatron-DeepSpeed"
# One rank of each node: the script itself may run where there are no GPUs.
if [ "$LOCAL_RANK" -eq 0 ]; then
    (nvidia-smi --query-gpu=index,name,clocks.sm,clocks.mem,power.draw --format=csv,noheader) > "$ATTEMPT/clocks-$(hostname -s).txt" 2>&1 || true
fi
cd run
exec apptainer exec --nv "--bind=$HOME/data:/data" 'my image.sif' python -u "$program/pretrain_gpt.py" --tensor-model-parallel-size 3 --pipeline-model-parallel-size 2 --num-layers 48 --hidden-size 4512 --num-attention-heads 24 --seq-length 512 --max-position-embeddings 512 --hidden-dropout 0.1 --attention-dropout 0.1 --micro-batch-size 2 --global-batch-size 16384 --train-iters 11 --optimizer adam --lr 0.001 --lr-decay-style constant --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-08 --weight-decay 0.01 --clip-grad 0.0 --data-path tokens_text_document --data-impl mmap --split 100,0,0 --eval-iters 0 --tokenizer-type NullTokenizer --vocab-size 51199 --make-vocab-size-divisible-by 128 --distributed-backend nccl --log-interval 1 --kill-switch-file stop --save checkpoints --load checkpoints --save-interval 12 --zero-stage 1 --deepspeed_config ds_config.json --fp16 --no-gradient-accumulation-fusion --deepspeed --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --deepspeed-activation-checkpointing
