"""Programs without an interpreter: a function traced once into a flat list of tensor operations.

A vmapped function with derivatives inside spends much of its time between the operations: unwrapping
batched tensors, recording and walking graphs of derivatives. Traced once, all of that is gone, and only
the operations are left, in the same order with the same results to the last bit; but on a CPU large matrices
are laid out in memory as they are read, and products of those may round otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from quickstudy.engine.recording import record
from quickstudy.errors import BackboneError
from quickstudy.nn.lstm import IMPLEMENTATIONS

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]

aten = torch.ops.aten

_NOTHING = (aten.detach.default, aten.alias.default)
"""Operations that return their input."""

_RESHAPES = (aten.view.default, aten._unsafe_view.default)

_OFTEN_NOTHING = (
    *_RESHAPES,
    *(aten.expand.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten._to_copy.default),
)
"""Operations that return what is as good as their input, if it has the same shape, strides and type.

``vmap`` and the derivatives of matrix products are full of them; each takes as long as an addition.
"""


_LARGE = 32
"""Rows and columns from which on a matrix is laid out as it is read; it does not pay for smaller ones."""

_OF_VALUES = {
    *(aten.view, aten._unsafe_view, aten.expand, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze),
    *(aten.select, aten.slice, aten.split, aten.unbind, aten.diagonal, aten.cat, aten.stack, aten.clone, aten._to_copy),
    *(aten.bmm, aten.mm, aten.mv, aten.addmm, aten.sum, aten.mean, aten.amax, aten.gather, aten.scatter),
    *(aten.scatter_add, aten.index_select, aten.constant_pad_nd, aten.diag_embed, aten.diagonal_backward),
    *(aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data),
    *(aten.mse_loss, aten.mse_loss_backward, aten.arange, aten.full, aten.zeros, aten.ones, aten.scalar_tensor),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones),
}
"""Operations, beside those that treat every number on its own, to which the layout of their inputs is all one."""

_CALLED_DIRECTLY: dict[Any, Callable[..., Any]] = {
    **{getattr(aten, name).default: getattr(torch, name) for name in ("bmm", "mm", "relu", "sigmoid", "tanh", "rsqrt")},
    **{getattr(aten, name).default: getattr(torch, name) for name in ("neg", "cat", "stack")},
    **{getattr(aten, name).Tensor: getattr(torch, name) for name in ("add", "sub", "mul", "div")},
    aten.mul.Scalar: torch.mul,
    **IMPLEMENTATIONS,
}
_CALLED_AS_METHODS: dict[Any, str] = {
    **{getattr(aten, name).default: name for name in ("view", "reshape", "expand", "permute", "unsqueeze")},
    **{aten.transpose.int: "transpose", aten.squeeze.dim: "squeeze", aten.select.int: "select"},
    **{aten.sum.dim_IntList: "sum", aten.mean.dim: "mean"},
}
"""What does the same as an operation, called in half the time."""


def trace(function: Program, inputs: Sequence[Tensor]) -> Program:
    """Return a flat program that computes what ``function`` computes, for inputs of these shapes.

    Whatever ``function`` reads besides its inputs is a constant of the program. It runs a second time, with other
    inputs, to see that the program does the same with these too.

    Args:
        function: from tensors to tensors; may differentiate and vmap inside.
        inputs: examples of its inputs.

    Raises:
        Exception: the function cannot be traced, because it looks at the values of its tensors, or takes them where
            they are not seen (as ``torch.tensor`` of tensors, ``copy.deepcopy`` and ``nn.Parameter`` do).
    """
    device = inputs[0].device.type
    with torch.random.fork_rng(devices=[inputs[0].device] if device == "cuda" else []):  # its draws are not missed
        graph, constants = record(function, inputs)
        changing = _written(graph)
        if all(map(_tells_what_it_does, graph.nodes)):
            _shorten(graph, changing, device)
        program = _compiled(graph, constants, device)
        _compare(program, function, inputs)
    kept = any(node in changing for node in graph.nodes if node.op in ("placeholder", "get_attr"))
    return _captured(program, inputs) if device == "cuda" and not kept else program


def _shorten(graph: fx.Graph, changing: Collection[fx.Node], device: str) -> None:
    """Take out what does nothing, is not used, or is done twice, and lay out matrices as they are read."""
    for node in graph.nodes:
        copies = node.target in (aten._to_copy.default, aten.mul.Scalar)
        if node.op == "call_function" and not (copies and node in changing):
            _simplify(node)
    graph.eliminate_dead_code(_matters)
    _merge(graph, changing)
    if device == "cpu" and not changing:
        _lay_out(graph)


def _compiled(graph: fx.Graph, constants: dict[str, Tensor], device: str) -> Program:
    """Return the program of a graph."""
    for node in graph.nodes:
        if node.target in _CALLED_DIRECTLY:
            node.target = _CALLED_DIRECTLY[node.target]
        elif node.target in _CALLED_AS_METHODS:
            node.op, node.target = "call_method", _CALLED_AS_METHODS[node.target]
    code = fx.GraphModule(constants, graph).forward

    def program(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), torch.autocast(device, enabled=False):  # its casts are in the program already
            return code(*inputs)

    return program


def _compare(program: Program, function: Program, inputs: Sequence[Tensor]) -> None:
    """Raise if the program does not give the results of the function, to rounding, for other inputs than it is of."""
    results = []
    for run in (function, program):
        torch.manual_seed(0)
        results.append(run([_another(tensor) for tensor in inputs]))
    for expected, found in zip(*results, strict=True):
        if expected.device.type == "meta":
            continue
        finite = expected[expected.isfinite()].abs()
        bound = 0.01 * finite.max().item() if finite.numel() else 0
        if not torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True):
            raise BackboneError("the function takes values of its inputs where PyTorch does not see it")


def _another(tensor: Tensor) -> Tensor:
    """Return a tensor of the same layout with other values: numbers a tenth larger, places and labels moved on."""
    if not tensor.numel() or any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride())):
        return tensor
    own = tensor.detach()
    other = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=own.device)
    other.copy_(1.1 * own if own.is_floating_point() else own.roll(1, -1) if own.ndim else own)
    return other.requires_grad_(tensor.requires_grad)


def _captured(program: Program, inputs: Sequence[Tensor]) -> Program:
    """Return the program as one CUDA graph, whose kernels start without Python; itself, if it cannot be captured."""
    own = [tensor.detach().clone() for tensor in inputs]
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device  # which need not be the current one
    try:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose and allocate in their first calls, which a graph must not
                for _ in range(3):
                    program(own)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = program(own)
    except RuntimeError:  # such as a copy to the host, or no memory left
        return program

    def replay(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), torch.cuda.device(device):
            torch._foreach_copy_(own, list(inputs))  # pyright: ignore[reportPrivateImportUsage] (one kernel)
            graph.replay()
            return [result.clone() for result in results]  # the next replay overwrites them

    return replay


def _tells_what_it_does(node: fx.Node) -> bool:
    """Tell whether all that an operation does is its result, or a write into a tensor that :func:`_written` sees."""
    target = node.target
    if not isinstance(target, OpOverload):
        return True
    if target.namespace not in ("aten", "quickstudy") or torch.Tag.inplace_view in target.tags:
        return False
    if "batch_norm" in target.overloadpacket.__name__ and len(node.args) > 3 and isinstance(node.args[3], fx.Node):
        return target.overloadpacket.__name__.endswith("backward")  # others write running statistics
    written = [
        argument.name
        for argument in target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    places = dict(zip([argument.name for argument in target._schema.arguments], node.args))
    return all(isinstance(places.get(name), fx.Node) for name in written)


def _matters(node: fx.Node) -> bool:
    """Tell whether an operation matters even if its result is not used: it checks something, or draws at random."""
    if node.is_impure():
        return True
    target = node.target
    return isinstance(target, OpOverload) and (
        not target._schema.returns or torch.Tag.nondeterministic_seeded in target.tags
    )


def _simplify(node: fx.Node) -> None:
    """Take an operation that does nothing out of the graph; let a view of a view look at the original."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return
    moved = node.kwargs.get("device") is not None
    same = (
        node.target in _OFTEN_NOTHING and not moved and _layout(node) is not None and _layout(node) == _layout(source)
    )
    once = node.target is aten.mul.Scalar and node.args[1] == 1 and _layout(node) == _layout(source)
    if node.target in _NOTHING or same or once:
        node.replace_all_uses_with(source)
    elif _flips(node) and _flips(source):
        node.replace_all_uses_with(source.all_input_nodes[0])
    elif node.target in _RESHAPES and source.target in _RESHAPES and _contiguous(source.args[0]):
        node.args = (source.args[0], *node.args[1:])
        _simplify(node)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values may change after they are computed, and those that read such values.

    They are in memory that a later operation writes into, directly or through a view.
    """
    owner: dict[fx.Node, fx.Node] = {}  # of each node's memory: the node that it is a view of, or itself
    written: set[fx.Node] = set()
    for node in graph.nodes:
        source = next(iter(node.all_input_nodes), None)
        owner[node] = node
        if isinstance(node.target, OpOverload) and source is not None:
            schema = node.target._schema
            if node.target is aten._unsafe_view.default or any(r.alias_info is not None for r in schema.returns):
                owner[node] = owner[source]
            for argument, value in zip(schema.arguments, node.args):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                    written.add(owner[value])
        elif source is not None and node.target is operator.getitem:
            owner[node] = owner[source]
    return {node for node in graph.nodes if any(owner[part] in written for part in (node, *node.all_input_nodes))}


def _merge(graph: fx.Graph, changing: Collection[fx.Node]) -> None:
    """Compute once what is computed several times alike, but not what is ``changing``, nor what is drawn at random."""
    first: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        random = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if random or node in changing or node.op not in ("call_function", "get_attr"):
            continue
        known = first.setdefault((node.target, _fixed(node.args), _fixed(node.kwargs)), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def _fixed(value: Any) -> Hashable:
    """Return something that is equal for equal arguments of an operation."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, dict):
        return tuple((key, _fixed(part)) for key, part in value.items())
    return tuple(map(_fixed, value)) if isinstance(value, list | tuple) else (type(value), repr(value))


def _lay_out(graph: fx.Graph) -> None:
    """Compute the transpose of large products where only that is used, so that they lie in memory as they are read.

    The gradient of a weight matrix is such a product. On a CPU the sum over tasks of matrices that lie otherwise than
    their sum takes 30 times as long, and their product with a narrow one 6 times.
    """
    if not all(map(_sees_no_layout, graph.nodes)):
        return
    for product in [node for node in graph.nodes if node.target is aten.bmm.default]:
        layout, user = _layout(product), _only_user(product)
        factors: tuple[Any, ...] = product.args
        if layout is None or user is None or min(layout[0][1:]) < _LARGE:
            continue
        shape: Any = user.args[1] if user.target in _RESHAPES else None  # of a batch with two axes, of seeds and tasks
        flip = user if shape is None else _only_user(user)
        if flip is None or not _flips(flip) or (shape is not None and tuple(shape[-2:]) != layout[0][1:]):
            continue
        with graph.inserting_before(product):
            left, right = (
                factor.args[0] if _flips(factor) else graph.call_function(aten.transpose.int, (factor, 1, 2))
                for factor in factors
            )
            found = graph.call_function(aten.bmm.default, (right, left))
            if shape is not None:
                found = graph.call_function(aten.reshape.default, (found, [*shape[:-2], shape[-1], shape[-2]]))
            flip.replace_all_uses_with(found)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in _RESHAPES:  # what they look at may lie otherwise now
            node.target = aten.reshape.default


def _sees_no_layout(node: fx.Node) -> bool:
    """Tell whether an operation is known to give the same values wherever in memory those of its inputs lie.

    Some read memory as it lies, some fill it with random numbers, and of some there are several, of which one was
    chosen for inputs that were contiguous while tracing.
    """
    if not isinstance(node.target, OpOverload):
        return node.op != "call_function" or node.target is operator.getitem
    tags = node.target.tags
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return pointwise or node.target.overloadpacket in _OF_VALUES or node.target in IMPLEMENTATIONS


def _flips(node: fx.Node) -> bool:
    """Tell whether an operation transposes the matrices of a batch, the last two axes."""
    layout = _layout(node)
    if node.target is not aten.transpose.int or layout is None:
        return False
    last = len(layout[0]) - 1
    return node.args[1:] in {(last - 1, last), (last, last - 1)}


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _layout(node: fx.Node) -> tuple | None:
    return node.meta.get("layout")


def _contiguous(node: Any) -> bool:
    return node.meta.get("contiguous", False)
