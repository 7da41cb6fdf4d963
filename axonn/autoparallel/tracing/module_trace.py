"""Tracing of a module with `torch.fx`: its graph in normal form, with the shapes of an example."""

from __future__ import annotations

import copy
import dis
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import checkpoint

from axonn.autoparallel.layer_kinds import layer_kind
from axonn.autoparallel.sharded_layers import refusal
from axonn.autoparallel.tracing.normalisation import make_functional, name_dropouts, unify_shapes
from axonn.autoparallel.tracing.source_lines import call_stack, innermost_user_line, location, location_text, raised_at
from axonn.errors import ConfigError

Example = Sequence[Any] | Mapping[str, Any]


class Traced(NamedTuple):
    """A traced module.

    `root`: the graph with the modules it calls, which share their parameters with the original. `constants`: arguments
    of forward that are not tensors, whose values are part of the graph.
    """

    root: fx.GraphModule
    constants: dict[str, Any]


def trace(module: nn.Module, example: Example | None) -> Traced:
    """Trace `module` in training mode. Raises `ConfigError`, naming what cannot be traced and what to do."""
    if _is_leaf(module):
        kind, why = type(module).__name__, refusal(module)
        if why or type(module) is nn.Dropout:
            raise ConfigError(f"there is nothing to cut in {kind}: {why or 'it has no parameters'}")
        layer = layer_kind(module)
        with_it = " with the layers before and after it" if layer is not None and layer.normalises else ""
        raise ConfigError(f"{kind} is a single layer: put it into nn.Sequential{with_it}, whose layers are cut")
    arguments = bind_example(module, example)
    original = copy.deepcopy(module, {id(p): p for p in module.parameters()}).train()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in arguments.items() if name not in tensors and value not in ((), {})}
    tracer = _Tracer()
    try:
        graph = tracer.trace(original, concrete_args=constants or None)
    except ConfigError:
        raise
    except Exception as error:
        place = (f" in {tracer.inside}" if tracer.inside else "") + location_text(raised_at(error.__traceback__))
        if "item assignment" in str(error):
            raise ConfigError(
                f"the forward of {type(module).__name__} cannot be traced{place}: it assigns to a part of a tensor; "
                "write it without, for instance with torch.where or torch.cat"
            ) from error
        raise ConfigError(
            f"the forward of {type(module).__name__} cannot be traced{place}: {error}. A graph that depends on "
            "values or sizes of tensors cannot be parallelised; move that part out of the module, or parallelise the "
            "modules inside of it one by one"
        ) from error
    root = fx.GraphModule(original, graph)
    graph = root.graph
    _drop_checks(graph, tensors)
    _propagate(root, tensors)
    make_functional(graph)
    unify_shapes(graph)
    name_dropouts(root)
    graph.eliminate_dead_code()
    return Traced(root, constants)


def bind_example(module: nn.Module, example: Example | None) -> dict[str, Any]:
    """Return the arguments of forward by name. Raises `ConfigError`, which shows how to write an example."""
    signature = inspect.signature(module.forward)
    names = [p.name for p in signature.parameters.values() if p.default is p.empty]
    if example is None:
        zeros = ", ".join(f"torch.zeros(shape of {name})" for name in names)
        raise ConfigError(
            f"the layouts follow from shapes, which {type(module).__name__} alone does not say; give an example of its "
            f"inputs (only their shapes and types count): parallelize(module, grid, example_inputs=({zeros},))"
        )
    by_name = isinstance(example, Mapping)
    try:
        binding = signature.bind(**example) if isinstance(example, Mapping) else signature.bind(*example)
    except TypeError as error:
        raise ConfigError(
            f"example_inputs do not fit forward{signature} of {type(module).__name__}: {error}; give a tuple of its "
            f"arguments{'' if by_name else ', or a dict by name'}"
        ) from error
    binding.apply_defaults()
    for name, value in binding.arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) and value:
            raise ConfigError(
                f"forward of {type(module).__name__} takes any number of arguments ({name}); name each one"
            )
        if isinstance(value, list | tuple | dict) and any(isinstance(t, torch.Tensor) for t in _leaves(value)):
            raise ConfigError(f"argument {name} holds tensors inside of a {type(value).__name__}; pass each by itself")
    return dict(binding.arguments)


class _Proxy(fx.Proxy):
    """Proxy that records `x += y` as in-place: torch.fx would record `x = x + y`, unseen by other holders of x."""


def _recording_operator(name: str) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow"):
    setattr(_Proxy, f"__{_name}__", _recording_operator(_name))


class _Tracer(fx.Tracer):
    """Tracer that looks into modules, down to torch's own with parameters. `inside`: the module it is in."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.inside = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Assume that asserts hold; control flow that depends on a traced value otherwise is an error."""
        frame = inspect.currentframe()
        caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
        if caller is not None and _in_assert(caller):
            return True
        return super().to_bool(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node with its line of the user's code. Raises `ConfigError` inside activation checkpointing."""
        node = super().create_node(*args, **kwargs)
        frames = call_stack(inspect.currentframe())
        node.meta["source"] = innermost_user_line(frames)
        if any(file == checkpoint.__file__ for file, _ in frames):
            raise ConfigError(
                f"the forward calls torch.utils.checkpoint{location(node)}, which the graph would lose; leave it out, "
                "and call the parallel module, or modules that are parallelised one by one, in it instead"
            )
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.inside = self.inside, f"{self.path_of_module(m)} ({type(m).__name__})"
        result = super().call_module(m, forward, args, kwargs)
        self.inside = outer
        return result


def _in_assert(frame: FrameType) -> bool:
    """Return True if a frame is evaluating the condition of an assert."""
    following = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti and i.opname != "CACHE"][
        1:3
    ]
    names = [i.opname for i in following]
    return bool(names) and any(
        "ASSERTION" in n or i.argval == "AssertionError" for n, i in zip(names, following, strict=True)
    )


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    if layer_kind(module) is not None or type(module) is nn.Dropout:
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # Batch norms stay whole modules, whatever a derived class adds.
        return True
    has_state = any(True for _ in (*module.parameters(), *module.buffers()))
    return has_state and type(module).__module__.startswith("torch.nn")


def _drop_checks(graph: fx.Graph, tensors: Mapping[str, Any]) -> None:
    """Drop arguments that are constants, and fx's checks of their values: the parallel module checks them itself."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target not in tensors:
            for check in list(node.users):
                for last in list(check.users):
                    graph.erase_node(last)
                graph.erase_node(check)
            graph.erase_node(node)


def _propagate(root: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a fake tensor, the example of each node's value, into `node.meta["val"]`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = [tensors[str(node.target).removeprefix("*")] for node in root.graph.nodes if node.op == "placeholder"]
    propagation = _Propagation(root, mode)
    try:
        propagation.propagate(*values)
    except Exception as error:
        reason = str(error).partition("\n\nWhile executing")[0]
        place = "" if propagation.node is None else location(propagation.node)
        raise ConfigError(f"the module does not run on the example inputs{place}: {reason}") from error


class _Propagation(FakeTensorProp):
    """Propagation of the example. `node`: the node being computed."""

    node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list | tuple) else [value]
