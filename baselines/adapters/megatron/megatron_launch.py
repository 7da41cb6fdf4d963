"""Megatron-LM on a cluster: its `pretrain_gpt.py` with the flags of a configuration.

Names and checks follow github.com/NVIDIA/Megatron-LM at core_v0.16.0: megatron/training/arguments.py, and the
configuration classes from which it generates flags.
"""

from __future__ import annotations

from collections.abc import Iterator

from axonn.config.train_config import FloatType
from axonn.errors import LaunchError
from axonn.grid import Axis
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.schedules import ScheduleSpec
from axonn.training.framework import ClusterWork, Launch
from baselines.adapters.ignored_settings import OVERFLOW_AFTER

VERSION = "core_v0.16.0"
_VOCAB_UNIT = 128
"""Padding unit: Megatron-LM pads the vocabulary to multiples of this times the tensor-parallel ranks."""
_INITIAL_LOSS_SCALE = 65536
_STOP_SIGNAL = "USR1"
"""Signal that Open MPI's mpiexec and Slurm's srun forward to the ranks; TERM, its default, ends Open MPI's jobs."""
_CHECKPOINTS = "checkpoints"
_BYTES_PER_PARAMETER = 14
"""Bytes of a half-precision checkpoint: the parameter, and in float32 its master copy and Adam's two moments."""
_ORDERS: dict[tuple[Axis, ...], list[str]] = {
    ("inter", "data", "col"): [],
    ("data", "inter", "col"): ["--use-tp-pp-dp-mapping"],
}
"""Axes from the slowest to the fastest, and the flag that selects the order."""
_PRECISION: dict[FloatType, list[str]] = {
    "float16": ["--fp16", f"--initial-loss-scale {_INITIAL_LOSS_SCALE}"],
    "bfloat16": ["--bf16"],
    "float32": [],
}


def launch_of(work: ClusterWork) -> Launch:
    """Return the command with which Megatron-LM runs `work`.

    Raises `LaunchError` for what it does not do, or would refuse to start.
    """
    _check_kind(work)
    _check_sizes(work)
    flags = [
        *_model(work),
        *_parallelism(work),
        *_recompute(work),
        *_training(work),
        *_data(work),
        *_logging(work),
        *_checkpoints(work),
    ]
    split = [part for flag in flags for part in flag.split(" ", 1)]
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if work.strategy.grid.col > 1 else {}
    return Launch(
        command=["python", "-u", "pretrain_gpt.py", *split],
        environment=connections,
        stop_signal=_STOP_SIGNAL,
        notes=list(_notes(work)),
    )


def _check_kind(work: ClusterWork) -> None:
    """Raise `LaunchError` for settings that it has no flag for."""
    s = work.strategy
    interleaved = s.schedule.name == "interleaved-1f1b"
    for refused, why in (
        (s.grid.row > 1, f"Megatron-LM cuts layers along col only: set row = {s.grid.row} to 1"),
        (s.compute not in _PRECISION, f"Megatron-LM has no {s.compute}: take float16, bfloat16 or float32"),
        (
            s.optimizer == "offloaded",
            "Megatron-LM does not stream the optimizer's state through buckets on the device: set optimizer to "
            "'device', or to 'sharded' for its distributed optimizer",
        ),
        (
            s.grid.inter > 1 and s.schedule.name not in ("1f1b", "interleaved-1f1b"),
            f"Megatron-LM has no schedule '{s.schedule.name}': take 1f1b or interleaved-1f1b",
        ),
        (
            s.grid.inter > 1 and not interleaved and s.schedule.chunks > 1,
            f"1f1b has one chunk of layers per stage: set chunks = {s.schedule.chunks} to 1, or take interleaved-1f1b",
        ),
        (s.schedule.placement != "loop", "Megatron-LM places chunks in loops: set the schedule's placement to loop"),
        (
            interleaved and s.grid.inter == 2 and s.blocking_messages,
            "Megatron-LM interleaves 2 stages only with messages beside computation: set blocking_messages to false",
        ),
        (s.schedule.in_flight_limit is not None, "its schedules set their own limit: remove in_flight_limit"),
        (s.schedule.pick != ScheduleSpec().pick, "its schedules have one order: remove the schedule's pick"),
        (
            s.grid.inter > 1 and not interleaved and not s.blocking_messages,
            "Megatron-LM's 1F1B waits for its messages: set blocking_messages to true",
        ),
        (
            s.reduce_type not in (None, s.compute, "float32"),
            f"Megatron-LM reduces gradients in {s.compute} or float32: set reduce_type to one of them",
        ),
        (work.gpus > 1 and s.message_library != "nccl", "Megatron-LM sends by NCCL: set message_library to nccl"),
        (s.algorithm != "adamw", f"Megatron-LM is launched with AdamW, not {s.algorithm}: remove algorithm"),
        (s.optimizer_kernels != "fused", "Megatron-LM's Adam is one kernel: set optimizer_kernels to fused"),
        (
            s.compute == "float16" and s.agree_on_overflow in ("before", "never"),
            "Megatron-LM's ranks agree on overflow after the reduction: set agree_on_overflow to after",
        ),
        (
            s.compute != "float16" and s.agree_on_overflow in ("before", "after"),
            f"in {s.compute} Megatron-LM's ranks look for no overflow: remove agree_on_overflow",
        ),
        (s.clip_norm and work.gradient_clipping is None, "clip_norm needs a norm: set gradient_clipping"),
        (s.overdecomposition > 1, "Megatron-LM does not overdecompose: set overdecomposition to 1"),
        (s.partition == "work", "Megatron-LM gives each stage as many layers: set partition to layers"),
    ):
        if refused:
            raise LaunchError(f"{work.name}: {why}")
    _mapping(work)


def _check_sizes(work: ClusterWork) -> None:
    """Raise `LaunchError` for sizes that its arguments.py would refuse once the job has started."""
    s, m, chunks = work.strategy, work.gpt, _chunks(work)
    g = s.grid
    ranks = g.data * g.inter * g.col
    if ranks != work.gpus:
        raise LaunchError(f"{work.name}: the grid has {ranks} ranks for {work.gpus} GPUs; change one of them")
    on_stage = m.layers // (g.inter * chunks)
    for name, size, unit, meaning in (
        ("heads", m.heads, g.col, "col"),
        ("layers", m.layers, g.inter * chunks, "inter x chunks"),
        ("batch_size", work.batch_size, g.data * s.microbatch_size, "data x microbatch_size"),
        ("seq_len", m.seq_len, g.col if s.sequence_parallel else 1, "col, with sequence parallelism"),
        (
            "layers of a chunk",
            on_stage,
            s.checkpoint_layers if s.recompute == "full" else 1,
            "checkpoint_layers",
        ),
        (
            "microbatches",
            work.batch_size // (g.data * s.microbatch_size),
            g.inter if chunks > 1 else 1,
            "inter, with the interleaved schedule",
        ),
    ):
        if size % unit:
            raise LaunchError(
                f"{work.name}: Megatron-LM needs {name} ({size}) in multiples of {unit} ({meaning}); change one of them"
            )


def _chunks(work: ClusterWork) -> int:
    schedule = work.strategy.schedule
    return schedule.chunks if schedule.name == "interleaved-1f1b" and work.strategy.grid.inter > 1 else 1


def _mapping(work: ClusterWork) -> list[str]:
    """Return the flag of the placement of ranks. Raises `LaunchError` for a placement that it does not have."""
    extents = work.strategy.grid.extents()
    asked = [axis for axis in work.strategy.order if extents[axis] > 1]
    for order, flag in _ORDERS.items():
        if asked == [axis for axis in order if extents[axis] > 1]:
            return flag
    known = " or ".join(str(list(order)) for order in _ORDERS)
    raise LaunchError(f"{work.name}: Megatron-LM cannot place ranks in the order {asked}; take {known}")


def _model(work: ClusterWork) -> Iterator[str]:
    m = work.gpt
    yield f"--num-layers {m.layers}"
    yield f"--hidden-size {m.hidden}"
    yield f"--num-attention-heads {m.heads}"
    yield f"--seq-length {m.seq_len}"
    yield f"--max-position-embeddings {m.seq_len}"
    yield "--position-embedding-type learned_absolute"
    if not m.tied_head:
        yield "--untie-embeddings-and-output-weights"
    yield f"--hidden-dropout {m.dropout}"
    yield f"--attention-dropout {m.attention_dropout}"
    yield "--transformer-impl local"
    if work.strategy.accumulate == "separate":
        yield "--no-gradient-accumulation-fusion"


def _parallelism(work: ClusterWork) -> Iterator[str]:
    s = work.strategy
    yield f"--tensor-model-parallel-size {s.grid.col}"
    if s.sequence_parallel and s.grid.col > 1:
        yield "--sequence-parallel"
    yield f"--pipeline-model-parallel-size {s.grid.inter}"
    if (chunks := _chunks(work)) > 1:
        yield f"--num-layers-per-virtual-pipeline-stage {work.gpt.layers // (s.grid.inter * chunks)}"
        if s.blocking_messages:
            yield "--no-overlap-p2p-communication"
    yield from _mapping(work)
    if s.optimizer == "sharded":
        yield "--use-distributed-optimizer"
    if s.overlap_reduction:
        yield "--overlap-grad-reduce"


def _recompute(work: ClusterWork) -> Iterator[str]:
    s = work.strategy
    if s.recompute != "none":
        yield f"--recompute-granularity {s.recompute}"
    if s.recompute == "full":
        yield "--recompute-method uniform"
        yield f"--recompute-num-layers {s.checkpoint_layers}"


def _training(work: ClusterWork) -> Iterator[str]:
    s, o = work.strategy, AdamWConfig()
    yield f"--micro-batch-size {s.microbatch_size}"
    yield f"--global-batch-size {work.batch_size}"
    yield f"--train-iters {work.steps}"
    yield from _PRECISION[s.compute]
    if s.compute == "float16" and s.gradient_type == "float32":
        yield "--accumulate-allreduce-grads-in-fp32"
    if s.compute == "bfloat16" and s.gradient_type == "bfloat16":
        yield "--grad-reduce-in-bf16"
    yield "--optimizer adam"
    yield f"--adam-beta1 {o.betas[0]}"
    yield f"--adam-beta2 {o.betas[1]}"
    yield f"--adam-eps {o.eps}"
    yield f"--weight-decay {o.weight_decay}"
    yield f"--lr {o.lr}"
    yield f"--min-lr {o.lr}"
    yield "--lr-decay-style constant"
    yield f"--clip-grad {work.gradient_clipping or 0.0}"


def _data(work: ClusterWork) -> Iterator[str]:
    if work.data is None:
        yield "--mock-data"
    else:
        yield f"--data-path {work.data}"
        yield "--split 100,0,0"
    # The tokenizer adds one token of its own, the end of a document.
    yield "--tokenizer-type NullTokenizer"
    yield f"--vocab-size {work.gpt.vocab - 1}"
    yield f"--make-vocab-size-divisible-by {_vocab_unit(work)}"


def _vocab_unit(work: ClusterWork) -> int:
    """Return the largest padding unit that leaves the vocabulary as it is; the default where none does."""
    unit = _VOCAB_UNIT
    while unit > 1 and work.gpt.vocab % (unit * work.strategy.grid.col):
        unit //= 2
    return unit if work.gpt.vocab % (unit * work.strategy.grid.col) == 0 else _VOCAB_UNIT


def _padded_vocab(work: ClusterWork) -> int:
    unit = _vocab_unit(work) * work.strategy.grid.col
    return -(-work.gpt.vocab // unit) * unit


def _logging(work: ClusterWork) -> Iterator[str]:
    yield "--log-interval 1"
    yield "--log-throughput"
    yield "--log-memory-interval 1"
    # It cannot size its data sets without an interval; with this one no evaluation falls into the run.
    yield "--eval-iters 0"
    yield f"--eval-interval {work.steps + 1}"


def _checkpoints(work: ClusterWork) -> Iterator[str]:
    """Yield the flags with which it saves its state when it is told to end, and resumes when it is started again."""
    yield f"--save {_CHECKPOINTS}"
    yield f"--load {_CHECKPOINTS}"
    # Required with --save, and after the last iteration.
    yield f"--save-interval {work.steps + 1}"
    yield "--exit-signal-handler"
    yield f"--exit-signal SIG{_STOP_SIGNAL}"


def _notes(work: ClusterWork) -> Iterator[str]:
    s, m = work.strategy, work.gpt
    parts = s.partition_messages and not s.sequence_parallel
    yield (
        f"Flags of Megatron-LM {VERSION} (github.com/NVIDIA/Megatron-LM), which lies where the command is run. Runs "
        "published in 2021 were made with its versions 2.x: --checkpoint-activations (later "
        "--activations-checkpoint-method) where there is --recompute-granularity, preprocessed text where there are "
        "--mock-data and NullTokenizer, and no distributed optimizer."
    )
    yield (
        "--transformer-impl local: layers of its own with Apex's fused norms and softmax, as in those runs; Apex must "
        "be installed. transformer_engine, for Ampere and later, has faster attention."
    )
    yield (
        "It draws its own weights. Its fused GELU is the approximation by tanh; --no-bias-gelu-fusion makes it exact. "
        "Biases and norms do not decay."
    )
    if s.accumulate == "in-place":
        yield "Gradients are accumulated inside of products by Apex's fused_weight_gradient_mlp_cuda."
    if s.grid.col > 1 and s.grid.inter > 1 and parts:
        yield "This version sends whole messages between stages, where versions 2.x sent each rank's part and gathered."
    if s.grid.col > 1 and not s.sequence_parallel and not s.overlap_input_gradients:
        yield "This version always reduces an input's gradient beside the weight's gradient; versions 2.x did after it."
    if s.compute == "float16" and s.agree_on_overflow is None:
        yield OVERFLOW_AFTER
    if s.compute == "float16":
        yield f"--initial-loss-scale {_INITIAL_LOSS_SCALE}: from its default, 2**32, the first batches are skipped."
    if (padded := _padded_vocab(work)) != m.vocab:
        yield f"The vocabulary is padded from {m.vocab} to {padded}, which {s.grid.col} ranks can share."
    yield (
        f"Told by SIG{_STOP_SIGNAL}, it saves its state into {_CHECKPOINTS} and ends, and a new start goes on from "
        f"there. It saves after the last iteration, too: about {m.parameters * _BYTES_PER_PARAMETER / 1e9:.0f} GB, "
        "which are of no use then."
    )
    if work.data is not None:
        yield f"{work.data}.bin and .idx hold tokens below {m.vocab - 1}; {m.vocab - 1} ends a document."
