"""A function as the list of tensor operations that it comes down to, recorded while it runs."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from quickstudy.errors import BackboneError

aten = torch.ops.aten


def record(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Run a function once, and return what it did as a graph of operations on plain tensors.

    That is below ``vmap``, autograd and autocast, whose work is in the graph and no longer to be done. ``make_fx`` of
    PyTorch records the same, in several times as long: it makes an imitation of each result to describe it.

    Args:
        function: from tensors to tensors; may differentiate and vmap inside.
        inputs: what it is run with.

    Returns:
        The graph, of the same inputs and results, and the other tensors that the function reads, by their names in it.
        A node's ``meta`` has the ``layout`` of its result, if that is a tensor: shape, strides and type; and whether it
        is ``contiguous``.

    Raises:
        BackboneError: the function looks at the values of its tensors, or copies memory; or two inputs are the same.
    """
    if len({id(tensor) for tensor in inputs}) < len(inputs):
        raise BackboneError("two inputs are the same tensor, and cannot be told apart")
    recorder = Recorder()
    for number, tensor in enumerate(inputs):
        recorder.describe(tensor, recorder.graph.placeholder(f"input_{number}"))
    cached, collects = torch.is_autocast_cache_enabled(), gc.isenabled()
    torch.set_autocast_cache_enabled(False)  # what was cast before would be a constant
    torch.clear_autocast_cache()
    gc.disable()  # in PyTorch 2.6 a collection forgets tensors that autograd still has
    try:
        with recorder:
            results = function(inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)
        if collects:
            gc.enable()
    recorder.graph.output([recorder.node(result) for result in results])
    return recorder.graph, recorder.constants


class Recorder(TorchDispatchMode):
    """Writes every operation into a graph, and lets it run.

    Attributes:
        graph: of the operations so far.
        constants: tensors that none of these made, by their names in the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes = WeakTensorKeyDictionary()  # of the tensors that are still there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _looks_at_values(func, args):
            raise BackboneError(f"{func} looks at the values of a tensor, which are others the next time")
        kwargs = kwargs or {}
        # A tensor made of numbers is new every time, for it may be written to.
        target = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        node = self.graph.call_function(target, self._named(args), self._named(kwargs))
        result = target(*args, **kwargs)
        self.describe(result, node)
        return result

    def describe(self, result: Any, node: fx.Node) -> None:
        """Note that a node computes a tensor, or several."""
        if isinstance(result, Tensor):
            node.meta["layout"] = result.shape, result.stride(), result.dtype
            node.meta["contiguous"] = result.is_contiguous()
            self._nodes[result] = node
        elif isinstance(result, list | tuple):
            for number, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.describe(part, self.graph.call_function(operator.getitem, (node, number)))

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes a tensor, or that reads it where it is."""
        node = self._nodes.get(tensor)
        if node is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            node = self.graph.get_attr(name)
            self.describe(tensor, node)
        return node

    def _named(self, value: Any) -> Any:
        """Replace the tensors in some arguments by their nodes."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, list | tuple):
            return type(value)(self._named(part) for part in value)
        if isinstance(value, dict):
            return {key: self._named(part) for key, part in value.items()}
        if isinstance(value, torch.UntypedStorage | torch.Generator):
            raise BackboneError(f"an operation takes a {type(value).__name__}, which a graph cannot hold")
        return value


def _looks_at_values(func: Any, args: Sequence[Any]) -> bool:
    """Tell whether an operation returns a number, or has a result whose shape depends on values."""
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return func is aten.is_nonzero.default or not tags.isdisjoint(func.tags)
