"""Tensor parallelism for an ordinary module, without rewriting it.

    import axonn
    from axonn.grid import ProcessGrid

    grid = ProcessGrid(row=2, col=2)            # in a job of four ranks, torch.distributed initialised
    parallel = axonn.parallelize(model, grid, example_inputs=(torch.zeros(8, 3, 32, 32),))
    print(parallel.report)                      # layers, redistributions and their reasons, what stays whole

    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    with parallel.at(step, samples):            # needed if the model has dropout: which rows of the data these are
        loss = F.cross_entropy(parallel(images), labels)
        loss.backward()
    parallel.average_gradients()                # over data-parallel ranks, if there are any
    parallel.clip_grad_norm_(1.0)               # or torch.nn.utils.clip_grad_norm_
    optimizer.step()
    whole = parallel.full_state_dict()          # under the names of `model`, on every rank

Every rank of row x col calls it with the same whole inputs and gets the same outputs. The model must be traceable by
`torch.fx`: its control flow must not depend on tensors or their sizes (asserts are left out). It is traced in training
mode; dropout follows `train()` and `eval()`, but nothing else that depends on the mode does. Linear, Conv2d, Embedding,
LayerNorm, RMSNorm and GroupNorm are cut along row and col; all other known operations (elementwise operations,
attention, reshapes, concatenations, pooling, ...) work on shards where they can.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from axonn.autoparallel.layouts.layout_assignment import LayoutPlan, assign_layouts
from axonn.autoparallel.parallel_report import Report
from axonn.autoparallel.part_gradients import GradientAgreement
from axonn.autoparallel.rewrite import Rewriter, part_of
from axonn.autoparallel.sub_shards import run_in_sub_shards
from axonn.autoparallel.tracing.module_trace import Example, trace
from axonn.distributed.collectives import Collectives, job_collectives
from axonn.errors import ConfigError, GridError
from axonn.grid import ProcessGrid
from axonn.placement import Placement
from axonn.tensor.context import TensorContext
from axonn.tensor.redistribution import gather


def parallelize(
    module: nn.Module,
    grid: ProcessGrid,
    *,
    example_inputs: Example | None = None,
    collectives: Collectives | None = None,
    rank: int | None = None,
    overdecomposition: int | None = None,
    gather_output: bool = True,
    seed: int = 0,
) -> ParallelModule:
    """Return this rank's part of `module`, cut along row and col of `grid` with layouts that follow its data flow.

    `example_inputs`: the arguments of a forward, of which only shapes and types matter; at least two rows if rows are
    to be computed in sub-shards. `module` has whole weights, the same on every rank; it is not changed, and each rank
    copies its shards. `collectives` and `rank`: those of the running job by default. `overdecomposition`: number of
    sub-shards into which the rows of a batch are cut, so that the collectives of one overlap with the compute of
    another; at most the number of rows. `gather_output=False` leaves the outputs cut (`report.outputs`). `seed`: seed
    of the dropout masks.

    Raises `GridError` when the grid does not fit the job, and `ConfigError` when the module cannot be traced.
    """
    if grid.inter > 1:
        raise GridError(
            f"{grid} has stages, of which a single module has none; set G_inter=1 and G_row or G_col instead"
        )
    sub_shards = 1 if overdecomposition is None else overdecomposition
    if sub_shards < 1:
        raise ConfigError(f"overdecomposition is {sub_shards}; it must be at least 1")
    device = next((p.device.type for p in module.parameters()), "cpu")
    rank, collectives = _job(grid, collectives, rank, device)
    context = TensorContext(grid, rank, collectives, seed=seed)
    traced = trace(module, example_inputs)
    plan = assign_layouts(traced.root, context, whole_outputs=gather_output)
    rewriter = Rewriter(traced.root, module, plan, context)
    report = rewriter.report
    report.sub_shards_problem = plan.rows.problem if sub_shards > 1 else ""
    report.sub_shards = 1 if report.sub_shards_problem else sub_shards
    return ParallelModule(
        rewriter,
        plan,
        context,
        signature=inspect.signature(module.forward),
        constants=traced.constants,
        names=list(module.state_dict()),
    ).train(module.training)


class ParallelModule(nn.Module):
    """One rank's part of a module, made by `parallelize`, with the inputs and outputs of the original.

    `report` describes its layouts. Parameters have the names of the original with the prefix "module."; their gradients
    are complete within row x col. In sub-shards they are accumulated into `.grad` while the backward runs.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        plan: LayoutPlan,
        context: TensorContext,
        *,
        signature: inspect.Signature,
        constants: Mapping[str, Any],
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self.module = rewriter.module
        self.report: Report = rewriter.report
        self.context = context
        self._signature = signature
        self._constants = dict(constants)
        self._names = list(names)
        self._placed = rewriter.placements
        self._with_rows = plan.rows.inputs
        self._agreement = GradientAgreement(context)

    # torch.compile cannot trace collectives and lanes, so it runs the module eagerly.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            # In every forward, since parameters may be unfrozen, replaced or copied at any time.
            self._agreement.watch(dict(self.module.named_parameters()), self._placed)
        inputs = self._bound(args, kwargs)
        if self.report.sub_shards == 1:
            return self.module(*inputs.values())
        return run_in_sub_shards(self.module, inputs, self._with_rows, self.report.sub_shards, self.context)

    @contextmanager
    def at(self, step: int, samples: Sequence[int]) -> Iterator[None]:
        """Set the samples (global numbers of the rows) and the step of forwards and backwards inside the block.

        The dropout masks depend on them.
        """
        with self.context.positions.at(step, samples):
            yield

    def placements(self) -> dict[str, Placement]:
        """Return the placement of each parameter and buffer on the grid, under each of its names in this module."""
        return {f"module.{name}": placement for name, placement in self._placed.items()}

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the gradients over the data-parallel ranks; all ranks call it. A missing gradient counts as zero."""
        self._agreement.average(list(self.parameters()))

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip the total gradient norm and return it, as `torch.nn.utils.clip_grad_norm_` on the original module.

        The norm is the same on every rank. All ranks call it; with data-parallel ranks, after `average_gradients`.
        torch's function does the same with one collective per parameter; this one has one per axis. Raises
        `RuntimeError` for a non-finite norm if `error_if_nonfinite`, and `ConfigError` before `average_gradients`.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        if not parameters:
            return torch.tensor(0.0)
        norms = self._agreement.norms([p.grad for p in parameters if p.grad is not None], float(norm_type))
        total = torch.nn.utils.get_total_norm(norms, norm_type, error_if_nonfinite)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Sequence[str]:
        """Attribute that DistributedDataParallel reads; raises, since it would copy rank 0's shards to every rank."""
        raise ConfigError(
            "DistributedDataParallel would copy rank 0's parts to the ranks that have others; do without it, give the "
            "grid a G_data and call average_gradients() after the backward"
        )

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the whole state under the names of the original, on every rank; all ranks of row x col call it."""
        shards = self.module.state_dict(keep_vars=True)
        gathered: dict[int, torch.Tensor] = {}
        for name in self._names:
            if id(shards[name]) not in gathered:
                value = shards[name].detach()
                for cut in self._placed[name].cuts:
                    value = gather(value, cut.dim, cut.axis, context=self.context, segments=cut.segments)  # type: ignore[arg-type]
                gathered[id(shards[name])] = value
        return {name: gathered[id(shards[name])].clone() for name in self._names}

    @torch.no_grad()
    def load_full_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load this rank's shards of a whole state under the names of the original.

        Raises `ConfigError` naming what is missing, unknown or of another shape; nothing is changed then.
        """
        own_state = self.module.state_dict()
        problems = [f"{name} is missing" for name in self._names if name not in state]
        problems += [f"{name} is not known" for name in state if name not in self._names]
        shards = {}
        for name in self._names:
            if name in state:
                placement = self._placed[name]
                if tuple(state[name].shape) != placement.shape:
                    problems.append(f"{name} has shape {list(state[name].shape)} instead of {list(placement.shape)}")
                else:
                    shards[name] = part_of(state[name], placement, self.context)
        if problems:
            raise ConfigError(f"the state is not one of this module: {'; '.join(problems)}")
        for name, shard in shards.items():
            own_state[name].copy_(shard)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the graph's input tensors by name. Raises `ConfigError` for other constants than the example's."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, constant in self._constants.items():
            value = bound.arguments[name]
            if isinstance(value, torch.Tensor) or value != constant:
                raise ConfigError(
                    f"argument {name} was {constant!r} in example_inputs and is part of the graph; give "
                    "parallelize an example in which it is what you want"
                )
        tensors = {name: value for name, value in bound.arguments.items() if isinstance(value, torch.Tensor)}
        wanted = [str(n.target) for n in self.module.graph.nodes if n.op == "placeholder"]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ConfigError(f"argument {missing[0]} was a tensor in example_inputs and has to be one")
        return {name: tensors[name] for name in wanted}


def _job(grid: ProcessGrid, collectives: Collectives | None, rank: int | None, device: str) -> tuple[int, Collectives]:
    """Return the rank and the collectives that were passed, or else those of the running job."""
    if collectives is not None:
        if collectives.grid != grid:
            raise GridError(f"the collectives are of the grid {collectives.grid}, not {grid}; give those of one grid")
        if rank not in (None, collectives.rank):
            raise GridError(f"the collectives are of rank {collectives.rank}, not {rank}; leave out rank")
        return collectives.rank, collectives
    job = job_collectives(grid, rank, device)
    return job.rank, job
