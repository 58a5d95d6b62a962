"""Any ``nn.Module`` as a backbone: made ready, and tried before it is trusted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from quickstudy.errors import BackboneError
from quickstudy.nn.norm import BatchNorm


def adopt(module: nn.Module, example: Tensor) -> int:
    """Make a network ready to serve as a backbone, in place, and return the size of its embedding.

    PyTorch's batch norms are replaced by :class:`BatchNorm` (their weights are kept, their running
    statistics are not: these can be neither batched over tasks nor adapted in one). Layers of unknown
    input size get it from ``example``.

    Args:
        module: maps ``[M, ...]`` to ``[M, features]``.
        example: a batch of inputs, ``[M, ...]``.

    Raises:
        BackboneError: the network cannot read the example, does not return ``[M, features]``, or is not
            a pure function of its parameters (``torch.func.functional_call``), which every method needs.
    """
    _replace_batch_norms(module)
    kind = type(module).__name__
    training = module.training
    module.eval()  # no dropout: the trials below compare outputs
    try:
        with torch.no_grad():
            output = module(example)
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(
            f"backbone {kind} cannot read inputs of shape {[*example.shape[1:]]}: {error}; "
            "check its number of channels and its image size"
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(example):
        shape = [*output.shape] if isinstance(output, Tensor) else type(output).__name__
        raise BackboneError(
            f"backbone {kind} maps {[*example.shape]} to {shape}; it must return [{len(example)}, features]: "
            "end it with nn.Flatten(), or return its embedding alone"
        )
    _check_pure(module, example, output)
    module.train(training)
    return output.shape[1]


def _replace_batch_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            norm = BatchNorm(child.num_features, child.eps)
            if child.affine:
                norm.weight, norm.bias = child.weight, child.bias
            else:
                norm.weight.requires_grad_(False)
                norm.bias.requires_grad_(False)
            setattr(module, name, norm)
        else:
            _replace_batch_norms(child)


def _check_pure(module: nn.Module, example: Tensor, output: Tensor) -> None:
    """Call the network with other parameters: they must all matter, nothing else may change."""
    kind = type(module).__name__
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    other = {name: (p.detach() * 1.5 + 0.01).requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    try:
        called = functional_call(module, other, (example,))
        with torch.no_grad():
            module.train()
            functional_call(module, other, (example,))
            module.eval()
    except Exception as error:
        raise BackboneError(f"backbone {kind} fails under torch.func.functional_call: {error}") from error
    changed = [name for name, buffer in module.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise BackboneError(
            f"backbone {kind} is not a pure function of its parameters: its forward pass changes the buffer "
            f"{changed[0]!r}; compute it anew in each call"
        )
    trained = [name for name, p in other.items() if p.requires_grad]
    if trained:
        gradients = [None] * len(trained)
        if called.requires_grad:
            gradients = torch.autograd.grad(called.sum(), [other[name] for name in trained], allow_unused=True)
        unused = [name for name, gradient in zip(trained, gradients) if gradient is None]
        if unused:
            raise BackboneError(
                f"backbone {kind} is not a pure function of its parameters: {unused[0]!r} has no influence on the "
                "embedding. The forward pass must read its weights as attributes (self.layer(x)), not keep copies of "
                "them; freeze a parameter that is meant to be unused with requires_grad_(False)"
            )
    with torch.no_grad():
        if not torch.allclose(module(example), output, equal_nan=True):
            raise BackboneError(f"backbone {kind} gives two answers to one input, or keeps a state between calls")
