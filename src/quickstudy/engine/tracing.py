"""Programs without an interpreter: a function traced once into a flat list of tensor operations.

A vmapped function with derivatives inside spends much of its time between the operations: unwrapping
batched tensors, recording and walking graphs of derivatives. Traced once, all of that is gone, and only
the operations are left, in the same order with the same results to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_COPIES_OF_NOTHING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def trace(function: Program, inputs: Sequence[Tensor]) -> Program:
    """Return a flat program that computes what ``function`` computes, for inputs of these shapes.

    Whatever ``function`` reads besides its inputs is a constant of the program.

    Args:
        function: from tensors to tensors; may differentiate and vmap inside.
        inputs: examples of its inputs.

    Raises:
        Exception: the function cannot be traced, because it looks at the values of its tensors.
    """
    module = make_fx(lambda *tensors: function(tensors))(*inputs)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _COPIES_OF_NOTHING:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    module = fx.GraphModule(module, fx_graph_cse(module.graph))
    code = module.forward

    def program(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return code(*inputs)

    return program
