"""DeepSpeed on clusters: Megatron-DeepSpeed's `pretrain_gpt.py`, tensor x pipeline x data parallel with ZeRO stage 1.

Sources: flags from megatron/arguments.py of github.com/deepspeedai/Megatron-DeepSpeed at 4efb479d; keys of the JSON
file from deepspeed/runtime/config.py and runtime/zero/config.py of github.com/deepspeedai/DeepSpeed at v0.19.5.
"""

from __future__ import annotations

import json
from typing import Any

from axonn.config.train_config import FloatType
from axonn.errors import ConfigError, LaunchError
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.perf.strategy import Strategy
from axonn.schedules import ScheduleSpec
from axonn.training.framework import ClusterWork, Launch
from axonn.training.run_folder import STOP
from baselines.adapters.ignored_settings import OVERFLOW_AFTER

CONFIG_FILE = "ds_config.json"
CHECKPOINTS = "checkpoints"
DATA = "tokens_text_document"
"""Prefix of the data where the work names none."""
_NEVER = 1_000_000
_BYTES_PER_PARAMETER = 14
"""Bytes of a half-precision checkpoint: the parameter, and in float32 its master copy and Adam's two moments."""
_VOCAB_MULTIPLE = 128
"""Default of --make-vocab-size-divisible-by; it holds for each tensor-parallel rank."""
_ORDER = ("inter", "data", "row", "col")
"""Order of Megatron-DeepSpeed's ranks (PipeModelDataParallelTopology), slowest axis first: tensor-parallel ranks are
neighbours, stages are farthest apart."""
_COMMUNICATION: dict[FloatType, str] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def launch_of(work: ClusterWork) -> Launch:
    """Return the command, files and notes with which Megatron-DeepSpeed runs `work`.

    Raises `LaunchError` naming everything that it cannot do.
    """
    reasons = refusals(work)
    if reasons:
        raise LaunchError(f"Megatron-DeepSpeed cannot run {work.name}: {'; '.join(reasons)}")
    return Launch(
        command=["python", "-u", "pretrain_gpt.py", *flags(work)],
        files={CONFIG_FILE: json.dumps(settings(work), indent=2) + "\n"},
        notes=notes(work),
        needs_data=True,
    )


def refusals(work: ClusterWork) -> list[str]:
    """Return what Megatron-DeepSpeed cannot do of `work`, and what to change."""
    strategy, grid = work.strategy, work.strategy.grid
    try:
        strategy.check(work.gpt)
        strategy.microbatches(work.batch_size)
    except ConfigError as error:
        return [str(error)]
    pipelined = grid.inter > 1
    schedule = strategy.schedule
    ranks = grid.size
    cases = {
        f"the grid has {ranks} ranks for {work.gpus} GPUs; make them equal": ranks != work.gpus,
        "it cuts matrices in one dimension; set grid.row to 1": grid.row > 1,
        f"{grid.inter} stages need as many layers; lower grid.inter": grid.inter > work.gpt.layers,
        f"it places ranks in the order {', '.join(_ORDER)}; set order so": _placed(strategy, strategy.order)
        != _placed(strategy, _ORDER),
        "its pipeline runs 1F1B with as many microbatches in flight as stages follow; set schedule: {name: 1f1b}": (
            pipelined and schedule != ScheduleSpec(name="1f1b")
        ),
        "its messages occupy the stream that computes; set blocking_messages": pipelined
        and not strategy.blocking_messages,
        "it communicates through NCCL; set message_library: nccl": ranks > 1 and strategy.message_library != "nccl",
        "it steps offloaded optimizer state on the CPU (ZeRO-Offload), not in buckets on the GPU; set optimizer: "
        "sharded": strategy.optimizer == "offloaded",
        "it gives each stage as many layers; set partition: layers": strategy.partition != "layers",
        "it has no sub-shards of microbatches; set overdecomposition to 1": strategy.overdecomposition > 1,
        "it does not overlap the collective of an input's gradient (forced off in its arguments); unset "
        "overlap_input_gradients": strategy.overlap_input_gradients,
        "with its sequence parallelism nothing sums the gradients of the norms over the tensor-parallel ranks; unset "
        "sequence_parallel": strategy.sequence_parallel and grid.col > 1,
        "its pipeline engine reduces the gradients after all backward passes; unset overlap_reduction": pipelined
        and strategy.overlap_reduction,
        f"it is launched with AdamW, not {strategy.algorithm}; remove algorithm": strategy.algorithm != "adamw",
        "its Adam is one kernel; set optimizer_kernels: fused": strategy.optimizer_kernels != "fused",
        "its ranks agree on overflow after the reduction; set agree_on_overflow: after": (
            strategy.compute == "float16" and strategy.agree_on_overflow in ("before", "never")
        ),
        f"in {strategy.compute} its ranks look for no overflow; remove agree_on_overflow": (
            strategy.compute != "float16" and strategy.agree_on_overflow in ("before", "after")
        ),
        "it does not add weight gradients within the product (switched off in its tensor-parallel layers); set "
        "accumulate: separate": strategy.accumulate != "separate",
        "it computes in float16, bfloat16 or float32; set compute so": strategy.compute not in _COMMUNICATION,
        "it reduces in float16, bfloat16 or float32; set reduce_type so": strategy.gradient_type not in _COMMUNICATION,
        "clip_norm needs to know the norm; set gradient_clipping": strategy.clip_norm
        and work.gradient_clipping is None,
    }
    return [reason for reason, applies in cases.items() if applies]


def _placed(strategy: Strategy, order: tuple[str, ...]) -> list[str]:
    """Return the axes of extent above 1, sorted as in `order`."""
    return [axis for axis in order if getattr(strategy.grid, axis) > 1]


def flags(work: ClusterWork) -> list[str]:
    """Return the command-line flags of `pretrain_gpt.py`."""
    model, strategy = work.gpt, work.strategy
    switches = {
        "--untie-embeddings-and-output-weights": not model.tied_head,
        "--fp16": strategy.compute == "float16",
        "--bf16": strategy.compute == "bfloat16",
        # The script stops without Apex's extension for the fusion, which its layers do not use.
        "--no-gradient-accumulation-fusion": True,
        "--no-pipeline-parallel": strategy.grid.inter == 1,
        "--deepspeed": True,
    }
    values = {**_model_values(work), **_training_values(work), **_data_values(work), **_run_values(work)}
    return [
        *(text for flag, value in values.items() for text in (flag, str(value))),
        *(flag for flag, on in switches.items() if on),
        *_recompute(strategy),
    ]


def _model_values(work: ClusterWork) -> dict[str, object]:
    model, grid = work.gpt, work.strategy.grid
    return {
        "--tensor-model-parallel-size": grid.col,
        "--pipeline-model-parallel-size": grid.inter,
        "--num-layers": model.layers,
        "--hidden-size": model.hidden,
        "--num-attention-heads": model.heads,
        "--seq-length": model.seq_len,
        "--max-position-embeddings": model.seq_len,
        "--hidden-dropout": model.dropout,
        "--attention-dropout": model.attention_dropout,
    }


def _training_values(work: ClusterWork) -> dict[str, object]:
    o = AdamWConfig()
    return {
        "--micro-batch-size": work.strategy.microbatch_size,
        "--global-batch-size": work.batch_size,
        "--train-iters": work.steps,
        "--optimizer": "adam",
        "--lr": o.lr,
        "--lr-decay-style": "constant",
        "--adam-beta1": o.betas[0],
        "--adam-beta2": o.betas[1],
        "--adam-eps": o.eps,
        "--weight-decay": o.weight_decay,
        "--clip-grad": work.gradient_clipping or 0.0,
    }


def _data_values(work: ClusterWork) -> dict[str, object]:
    return {
        "--data-path": work.data or DATA,
        "--data-impl": "mmap",
        # No evaluation, so all of the data is to be trained on.
        "--split": "100,0,0",
        "--eval-iters": 0,
        # This tokenizer adds one token, the end of a document.
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": work.gpt.vocab - 1,
        "--make-vocab-size-divisible-by": _VOCAB_MULTIPLE,
    }


def _run_values(work: ClusterWork) -> dict[str, object]:
    return {
        "--distributed-backend": "nccl",
        "--log-interval": 1,
        # Between iterations its ranks look for the file by which a job is told to stop, save and end; started again,
        # they go on from there.
        "--kill-switch-file": STOP,
        "--save": CHECKPOINTS,
        "--load": CHECKPOINTS,
        # Required with --save, and after the last iteration.
        "--save-interval": work.steps + 1,
        "--zero-stage": _zero_stage(work.strategy),
        "--deepspeed_config": CONFIG_FILE,
    }


def _recompute(strategy: Strategy) -> list[str]:
    match strategy.recompute:
        case "none":
            return []
        case "selective":
            return ["--recompute-granularity", "selective"]
        case "full":
            return [
                *("--recompute-granularity", "full"),
                *("--recompute-method", "uniform"),
                *("--recompute-num-layers", str(strategy.checkpoint_layers)),
                "--deepspeed-activation-checkpointing",
            ]


def _zero_stage(strategy: Strategy) -> int:
    return 1 if strategy.optimizer == "sharded" else 0


def settings(work: ClusterWork) -> dict[str, Any]:
    """Return the contents of DeepSpeed's JSON file. They repeat what the flags say, and DeepSpeed compares the two."""
    strategy = work.strategy
    precisions: dict[FloatType, dict[str, Any]] = {
        # loss_scale 0 is dynamic; the rest as in its own template (examples_deepspeed/rebase).
        "float16": {
            "fp16": {
                "enabled": True,
                "loss_scale": 0,
                "loss_scale_window": 500,
                "hysteresis": 2,
                "min_loss_scale": 1,
                "initial_scale_power": 11,
            }
        },
        "bfloat16": {"bf16": {"enabled": True}},
    }
    reduced = {} if strategy.reduce_type is None else {"communication_data_type": _COMMUNICATION[strategy.reduce_type]}
    return {
        "train_batch_size": work.batch_size,
        "train_micro_batch_size_per_gpu": strategy.microbatch_size,
        "gradient_accumulation_steps": strategy.microbatches(work.batch_size),
        # Its script prints an iteration line of its own.
        "steps_per_print": _NEVER,
        # Where this is missing or null it clips at 1.
        "gradient_clipping": work.gradient_clipping or 0.0,
        "prescale_gradients": False,
        "zero_optimization": {"stage": _zero_stage(strategy), "overlap_comm": strategy.overlap_reduction},
        "pipeline": {
            "pipe_partitioned": strategy.partition_messages,
            "grad_partitioned": strategy.partition_messages,
        },
        **reduced,
        **precisions.get(strategy.compute, {}),
        "wall_clock_breakdown": False,
    }


def notes(work: ClusterWork) -> list[str]:
    """Return what differs from the requested work, and what has to be provided."""
    model, strategy = work.gpt, work.strategy
    multiple = _VOCAB_MULTIPLE * strategy.grid.col
    padded = -(-model.vocab // multiple) * multiple
    lines = [
        "pretrain_gpt.py is that of github.com/deepspeedai/Megatron-DeepSpeed at 4efb479d: start it in its folder, "
        "with Apex installed; the first start compiles fused kernels, so it is no run to be timed.",
        "Weights are drawn by Megatron (normal, standard deviation 0.02); biases and norms have no weight decay.",
        f"When the file {STOP} is there, it saves its state into {CHECKPOINTS} and ends, and a new start goes on from "
        "there; each rank looks for itself, so that now and then one may wait for others that have seen it. It saves "
        f"after the last iteration, too: about {model.parameters * _BYTES_PER_PARAMETER / 1e9:.0f} GB, of no use then.",
    ]
    if work.data is None:
        tokens = work.steps * work.batch_size * model.seq_len
        lines.append(
            f"It has no synthetic data: {DATA}.bin and {DATA}.idx must lie beside the script, with at least {tokens} "
            f"tokens below {model.vocab} (tools/preprocess_data.py makes them)."
        )
    if strategy.compute == "float16" and strategy.agree_on_overflow is None:
        lines.append(OVERFLOW_AFTER)
    if padded != model.vocab:
        lines.append(f"The vocabulary is padded from {model.vocab} to {padded}, a multiple of {multiple}.")
    if model.layers % strategy.grid.inter:
        lines.append(f"{model.layers} layers are no multiple of {strategy.grid.inter} stages; it balances them itself.")
    if strategy.grid.inter == 1 and strategy.schedule.name != "1f1b":
        lines.append("There is no pipeline, so its schedule is not used.")
    return lines
