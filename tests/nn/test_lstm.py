"""LSTMs from matrix products, as operations of their own, and compiled, against PyTorch's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from quickstudy.errors import RecipeError
from quickstudy.nn import LSTM, BidirectionalLSTM, CellState, CoordinateLSTM, compiled
from quickstudy.nn.lstm import LSTMCell

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))), reason="no C compiler here"
)
SIZES = [(2, 5, 5, 1), (2, 40, 20, 1), (4, 20)]
DEFAULT = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DEFAULT) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DEFAULT).to(dtype)


def twins(inputs: int, hidden: int) -> tuple[LSTMCell, nn.LSTMCell]:
    torch.manual_seed(0)
    ours, theirs = LSTMCell(inputs, hidden).double(), nn.LSTMCell(inputs, hidden).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def slopes(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a mix of all results."""
    total = sum(
        ((result * normal(*result.shape, seed=9).to(result.dtype)).sum() for result in results), torch.zeros(())
    )
    return list(torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True))


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_a_cell_equals_that_of_torch(given: tuple[bool, bool]) -> None:
    """With the states given, and with zeros in place of those that are not."""
    ours, theirs = twins(3, 4)
    x, *states = (normal(5, size, seed=size).requires_grad_() for size in (3, 4, 4))
    h, c = (state if there else None for state, there in zip(states, given))
    zeros = torch.zeros(5, 4).double()
    expected = theirs(x, (zeros if h is None else h, zeros if c is None else c))
    wanted = [x, *(state for state in (h, c) if state is not None)]
    found = ours(ours.inward(x), CellState(h, zeros if c is None else c))
    results = [list(found)]
    if c is None:  # the same without a forget gate
        results.append(list(ours(ours.inward(x, fresh=True), CellState(h))))
    for result in results:
        torch.testing.assert_close(result, list(expected))
        torch.testing.assert_close(slopes(result, wanted), slopes(list(expected), wanted))
        torch.testing.assert_close(
            slopes(result, list(ours.parameters())), slopes(list(expected), list(theirs.parameters()))
        )


def test_a_state_common_to_all_rows_may_have_one() -> None:
    cell, _ = twins(3, 4)
    x, h, c = normal(5, 3), normal(1, 4, seed=1).requires_grad_(), normal(1, 4, seed=2).requires_grad_()
    once = cell(cell.inward(x), CellState(h, c))
    repeated = cell(cell.inward(x), CellState(h.expand(5, 4), c.expand(5, 4)))
    torch.testing.assert_close(once, repeated)
    torch.testing.assert_close(slopes(list(once), [h, c]), slopes(list(repeated), [h, c]))


@pytest.mark.parametrize("hidden", [[4], [5, 3, 2]])
def test_a_stack_equals_the_layers_of_torch_step_by_step(hidden: list[int]) -> None:
    torch.manual_seed(0)
    ours = LSTM(3, hidden).double()
    theirs = [nn.LSTM(below, size).double() for below, size in pairwise([3, *hidden])]
    for cell, layer in zip(ours.cells, theirs):
        layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    sequence = normal(6, 5, 3).requires_grad_()
    state, own = ours.start(), [None] * len(hidden)
    mine, others = [], []
    for x in sequence:
        state = ours(ours.cells[0].inward(x), state)
        mine += [tensor for cell in state for tensor in cell]
        x = x[None]
        for number, layer in enumerate(theirs):
            x, own[number] = layer(x, own[number])
            others += [tensor[0] for tensor in own[number]]
    torch.testing.assert_close(mine, others)
    torch.testing.assert_close(slopes(mine, [sequence]), slopes(others, [sequence]))
    for cell, layer in zip(ours.cells, theirs):
        torch.testing.assert_close(slopes(mine, list(cell.parameters())), slopes(others, list(layer.parameters())))
    whole = sequence
    for layer in theirs:
        whole, _ = layer(whole)
    torch.testing.assert_close(mine[2 * len(hidden) - 2 :: 2 * len(hidden)], list(whole))  # the top h of each step


@pytest.mark.parametrize("length", [1, 6])
def test_both_directions_equal_those_of_torch(length: int) -> None:
    """Each element gets what the cell on its way back had there, not what it had as long after its start."""
    torch.manual_seed(0)
    ours, theirs = BidirectionalLSTM(3, 4).double(), nn.LSTM(3, 4, bidirectional=True).double()
    ours.onward.load_state_dict({name: getattr(theirs, f"{name}_l0") for name in ours.onward.state_dict()})
    ours.backward.load_state_dict({name: getattr(theirs, f"{name}_l0_reverse") for name in ours.backward.state_dict()})
    sequence = normal(length, 3).requires_grad_()
    found, expected = list(ours(sequence)), list(theirs(sequence)[0].split(4, -1))
    torch.testing.assert_close(found, expected)
    inputs = [[sequence, *lstm.parameters()] for lstm in (ours, theirs)]
    torch.testing.assert_close(slopes(found, inputs[0]), slopes(expected, inputs[1]))
    sequences = normal(2, length, 3, seed=1)
    torch.testing.assert_close(vmap(ours)(sequences), tuple(map(torch.stack, zip(*map(ours, sequences)))))


def coordinates(sizes: tuple[int, ...], seed: int = 0, compiled: bool = False) -> CoordinateLSTM:
    torch.manual_seed(seed)
    return CoordinateLSTM(sizes[0], sizes[1:], compiled).double()


def unrolled(lstm: CoordinateLSTM, xs: Tensor) -> list[Tensor]:
    """Run some steps; return the outputs of all, and the last state."""
    step, state, outputs = lstm.unroll(), None, []
    for x in xs:
        output, state = step(x, state)
        outputs.append(output)
    assert state is not None
    return [*outputs, state]


@pytest.mark.parametrize("sizes", [(2, 5, 5, 1), (4, 3), (1, 1)])
def test_coordinates_equal_a_stack_of_torch_applied_to_each(sizes: tuple[int, ...]) -> None:
    ours = coordinates(sizes)
    theirs = [nn.LSTMCell(below, size).double() for below, size in pairwise(sizes)]
    for cell, other in zip(ours.cells, theirs):
        other.load_state_dict(cell.state_dict())
    xs = normal(4, sizes[0], 7).requires_grad_()
    states = [(torch.zeros(7, size).double(), torch.zeros(7, size).double()) for size in sizes[1:]]
    expected = []
    for x in xs:
        x = x.T
        for number, cell in enumerate(theirs):
            states[number] = cell(x, states[number])
            x = states[number][0]
        expected.append(x.T)
    expected.append(torch.cat([state[which].T for which in range(2) for state in states]))
    found = unrolled(ours, xs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slopes(found, [xs]), slopes(expected, [xs]))
    parameters = [parameter for cell in theirs for parameter in cell.parameters()]
    torch.testing.assert_close(slopes(found, list(ours.parameters())), slopes(expected, parameters))


HOW = [False, pytest.param(True, marks=needs_compiler)]


@pytest.mark.parametrize("quick", HOW, ids=["plain", "compiled"])
def test_the_derivative_of_a_step_against_finite_differences(quick: bool) -> None:
    """Of one from zeros, and of two from what was before."""
    lstm = coordinates((2, 5, 5, 1), compiled=quick)
    names = [name for name, _ in lstm.named_parameters()]

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, xs: Tensor) -> list[Tensor]:
            return unrolled(self.lstm, xs)

    def run(xs: Tensor, *values: Tensor) -> Tensor:
        results = functional_call(Unrolled(), {f"lstm.{name}": value for name, value in zip(names, values)}, (xs,))
        return torch.stack([(result * normal(*result.shape, seed=3)).sum() for result in results])

    values = [parameter.detach().clone().requires_grad_() for parameter in lstm.parameters()]
    assert torch.autograd.gradcheck(run, [normal(3, 2, 2).requires_grad_(), *values], fast_mode=True)


@pytest.mark.parametrize("quick", HOW, ids=["plain", "compiled"])
def test_loop_equals_vmap_over_tasks_and_over_seeds_and_tasks(quick: bool) -> None:
    """The weights have an axis of seeds only, of tasks only, of both or of none."""
    seeds, tasks = 2, 3
    made = [[coordinates((2, 5, 5, 1), 10 * seed + task, quick) for task in range(tasks)] for seed in range(seeds)]
    names = list(dict(made[0][0].named_parameters()))
    every = {
        n: torch.stack([torch.stack([dict(m.named_parameters())[n].detach() for m in row]) for row in made])
        for n in names
    }
    xs = normal(seeds, tasks, 3, 2, 6)

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = made[0][0]

        def forward(self, xs: Tensor) -> Tensor:
            return torch.cat([result.flatten() for result in unrolled(self.lstm, xs)])

    model = Unrolled()

    def one(weights: dict[str, Tensor], xs: Tensor) -> Tensor:
        return functional_call(model, {f"lstm.{name}": weight for name, weight in weights.items()}, (xs,))

    def check(found: Tensor, looped: Tensor, weights: dict[str, Tensor], data: Tensor) -> None:
        torch.testing.assert_close(found, looped)
        inputs = [*weights.values(), data]
        torch.testing.assert_close(slopes([found], inputs), slopes([looped], inputs))

    for of_seed in (0, None):
        for of_task in (0, None):
            weights = {n: w if of_task == 0 else w[:, 0] for n, w in every.items()}
            weights = {n: (w if of_seed == 0 else w[0]).clone().requires_grad_() for n, w in weights.items()}
            data = xs.clone().requires_grad_()
            found = vmap(vmap(one, (of_task, 0)), (of_seed, 0))(weights, data)

            def own(seed: int, task: int, weights=weights, of_seed=of_seed, of_task=of_task) -> dict[str, Tensor]:
                mine = {n: w[seed] if of_seed == 0 else w for n, w in weights.items()}
                return {n: w[task] if of_task == 0 else w for n, w in mine.items()}

            looped = [torch.stack([one(own(s, t), data[s, t]) for t in range(tasks)]) for s in range(seeds)]
            check(found, torch.stack(looped), weights, data)

    weights = {n: w[0, 0].clone().requires_grad_() for n, w in every.items()}
    data = xs.clone().requires_grad_()
    found = vmap(one, (None, 0))(weights, data[0])
    check(found, torch.stack([one(weights, own) for own in data[0]]), weights, data)
    deep = vmap(vmap(vmap(one, (None, 0)), (None, 0)), (None, 0))(weights, data[None])  # three axes
    check(deep[0], torch.stack([torch.stack([one(weights, x) for x in row]) for row in data]), weights, data)


@needs_compiler
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 5, 127, 128, 129, 455])
def test_compiled_equals_plain(sizes: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    """All values and slopes, of one step from zeros and of one from any state, for any number of coordinates."""
    found = []
    for quick in (False, True):
        lstm = coordinates(sizes, compiled=quick).to(dtype)
        xs = normal(3, sizes[0], count, dtype=dtype).requires_grad_()
        results = unrolled(lstm, xs)
        found.append([*results, *slopes(results, [xs, *lstm.parameters()])])
    for ours, theirs in zip(*found):
        scale = max(1.0, theirs.abs().max().item())  # sums over coordinates and units are off by their largest terms
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(1e-12 if dtype == torch.float64 else 4e-6) * scale)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiled_equals_plain_in_the_saturated_and_in_the_flat_parts(dtype: torch.dtype) -> None:
    found = []
    for quick in (False, True):
        lstm = coordinates((4, 20), compiled=quick).to(dtype)
        sizes = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 1, 30, 1e3, 1e30], dtype=dtype)
        xs = (normal(2, 4, 8, dtype=dtype) * sizes).requires_grad_()
        results = unrolled(lstm, xs)
        found.append([*results, *slopes(results, [xs])])
    for ours, theirs in zip(*found):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 if dtype == torch.float64 else 4e-6)


@needs_compiler
def test_compiled_reads_tensors_that_do_not_lie_in_order() -> None:
    found = []
    for quick in (False, True):
        lstm = coordinates((2, 5, 5, 1), compiled=quick)
        wide = normal(3, 12, 4).requires_grad_()
        xs = wide[:, ::2, 1:3].mT  # neither axis contiguous
        results = unrolled(lstm, xs)
        turned = [result.T.contiguous().T for result in results]
        spread = torch.autograd.grad(sum(turned).sum(), wide, retain_graph=True)[0]  # type: ignore[union-attr]
        found.append([*results, spread, *slopes([result[..., ::2] for result in turned], [wide])])
    torch.testing.assert_close(found[1], found[0])


@needs_compiler
@pytest.mark.parametrize("which", range(3))
def test_compiled_with_slopes_of_some_outputs_alone(which: int) -> None:
    """The output of the first or second step, or the last state; the slopes of the others are None, not zeros."""
    found = []
    for quick in (False, True):
        lstm = coordinates((2, 5, 5, 1), compiled=quick)
        xs = normal(2, 2, 9).requires_grad_()
        results = unrolled(lstm, xs)
        found.append(slopes([results[which]], [xs, *lstm.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("quick", HOW, ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_not_a_number_stays_one(quick: bool, dtype: torch.dtype) -> None:
    lstm = coordinates((2, 5, 5, 1), compiled=quick).to(dtype)
    xs = normal(2, 2, 200, dtype=dtype)
    xs[0, 1, 150] = torch.nan
    xs.requires_grad_()
    for result in unrolled(lstm, xs):
        assert result[:, 150].isnan().all()
        assert result[:, :150].isfinite().all()
        assert result[:, 151:].isfinite().all()
    for parameter in lstm.parameters():
        (slope,) = torch.autograd.grad(unrolled(lstm, xs)[1].sum(), parameter)
        assert slope.isnan().any()


@pytest.mark.parametrize("quick", HOW, ids=["plain", "compiled"])
def test_a_second_derivative_is_refused_and_never_zero(quick: bool) -> None:
    lstm = coordinates((2, 5, 5, 1), compiled=quick)
    xs = normal(2, 2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(unrolled(lstm, xs)[1].sum(), xs, create_graph=True)


@pytest.mark.parametrize("quick", HOW, ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_computes_in_the_precision_of_its_weights(quick: bool, dtype: torch.dtype) -> None:
    lstm = coordinates((2, 5, 5, 1), compiled=quick).float()
    xs = normal(3, 2, 9, dtype=dtype).requires_grad_()
    expected = unrolled(lstm, xs.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = unrolled(lstm, xs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    inputs = [xs, *lstm.parameters()]
    torch.testing.assert_close(slopes(found, inputs), slopes(expected, inputs), rtol=0, atol=0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and no compiled code in memory."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(folder))
    monkeypatch.delenv("CC", raising=False)
    compiled.library.cache_clear()
    yield folder
    compiled.library.cache_clear()


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs a C compiler on the PATH .* name it in CC, or leave compiled out"):
        CoordinateLSTM(2, [5, 1], compiled=True)
    CoordinateLSTM(2, [5, 1])
    assert not fresh.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, r"compiler cannot compile coordinates\.c: No such file or directory"),
        ("#!/bin/sh\necho it is broken >&2\nexit 3\n", r"cannot compile coordinates\.c: it is broken; name another"),
        ("#!/bin/sh\nexit 3\n", r"cannot compile coordinates\.c"),
        # Leaves something half written, and fails.
        ('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo half > "$2"; exit 1\n', r"cannot compile"),
    ],
    ids=["absent", "broken", "silent", "half"],
)
def test_a_broken_compiler_leaves_nothing_behind(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str
) -> None:
    path = tmp_path / "compiler"
    if script is not None:
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(RecipeError, match=message):
        CoordinateLSTM(2, [5, 1], compiled=True)
    assert not fresh.exists() or not [file for file in fresh.rglob("*") if file.is_file()]


@needs_compiler
def test_compiled_code_is_kept_whole_and_found_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS[1:], "-O0"))  # quick
    CoordinateLSTM(2, [2, 1], compiled=True)
    kept = [file for file in fresh.rglob("*") if file.is_file()]
    assert [file.suffix for file in kept] == [".so"]
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: pytest.fail("compiled twice"))
    CoordinateLSTM(2, [2, 1], compiled=True)


@needs_compiler
def test_the_compiler_may_be_named_with_options(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS[1:], "-O0"))
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')} -pipe")
    CoordinateLSTM(2, [2, 1], compiled=True)
    assert len(list(fresh.rglob("*.so"))) == 1
