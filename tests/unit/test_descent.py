"""Scales by least squares and integers by coordinate descent: no step makes it worse, and where
they end nothing alone can be made better.
"""

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

import specomp
from specomp import rows
from specomp.errors import UserError
from specomp.numerics.feedback import Inputs
from specomp.numerics.grid import limits
from specomp.quantization.descent import _integers, _scales, descended
from specomp.quantization.gptq import gptq_each
from specomp.quantization.rtn import OnGrid, Spacing

TOKENS = torch.randint(0, 60, (8, 32), generator=torch.Generator().manual_seed(0))


def problem(n: int = 24, m: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(60, n, dtype=torch.float64) @ torch.randn(n, n).double()
    return torch.randn(m, n), x.T @ x


def spacing(bits: int = 3, group: int = 8, *, symmetric: bool = False) -> Spacing:
    return Spacing(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=torch.float16)


def lost(W: Tensor, found: OnGrid, inputs: Inputs) -> float:
    """In the Gram with its damping."""
    error = (found.values() - W).double()
    return float(((error @ inputs.damped.double()) * error).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("kind", [spacing(), spacing(2, 10), spacing(4, 24, symmetric=True)])
def test_no_step_loses_more(kind, act_order):
    W, G = problem()
    inputs = Inputs(G, act_order=act_order, damping=0.01)
    (found,) = gptq_each(W, G, [kind], act_order=act_order, damping=0.01)
    losses = [lost(W, found, inputs)]
    for _ in range(4):
        found = _scales(W, inputs, found)
        losses.append(lost(W, found, inputs))
        (found,) = _integers(W, inputs, [found])
        losses.append(lost(W, found, inputs))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]
    low, high = limits(kind.bits)
    assert int(found.integers.min()) >= low and int(found.integers.max()) <= high


@pytest.mark.parametrize("kind", [spacing(), spacing(2, 10), spacing(4, 24, symmetric=True)])
def test_scales_are_those_of_least_squares(kind):
    """Of each row alone, by a plain solver of the whitened problem; to 16 bits."""
    W, G = problem()
    inputs = Inputs(G, act_order=True, damping=0.01)
    (start,) = gptq_each(W, G, [kind], act_order=True, damping=0.01)
    found = _scales(W, inputs, start)
    root = torch.linalg.cholesky(inputs.damped.double())
    size = found.grid.group_size
    zeros = 0 if found.grid.zeros is None else found.grid.zeros
    for i, row in enumerate(W.double()):
        zero = zeros if isinstance(zeros, int) else zeros[i].repeat_interleave(size)[:24]
        unit = (start.integers[i] - zero).double()
        columns = torch.stack(
            [unit * (torch.arange(24) // size == k) for k in range(found.grid.scales.shape[1])]
        )
        wanted = torch.linalg.lstsq(root.T @ columns.T, root.T @ row).solution
        if bool((wanted > 0).all()):
            torch.testing.assert_close(found.grid.scales[i].double(), wanted, rtol=2e-3, atol=1e-4)


def test_in_the_end_no_integer_alone_is_better_elsewhere():
    W, G = problem()
    inputs = Inputs(G, act_order=True, damping=0.01)
    (found,) = gptq_each(W, G, [spacing()], act_order=True, damping=0.01)
    for _ in range(50):
        (found,) = _integers(W, inputs, [found])
    least = lost(W, found, inputs)
    low, high = limits(3)
    for i in range(len(W)):
        for j in range(W.shape[1]):
            for step in (-1, 1):
                q = found.integers.clone()
                q[i, j] += step
                if low <= int(q[i, j]) <= high:
                    other = OnGrid(q, found.grid)
                    assert lost(W, other, inputs) >= least * (1 - 1e-6)


def test_grids_side_by_side_are_each_as_alone(monkeypatch):
    W, G = problem()
    kinds = [spacing(), spacing(2, 10), spacing(4, 24, symmetric=True), spacing(8, 12)]
    options = {"act_order": True, "damping": 0.01, "passes": 2}
    together = gptq_each(W, G, kinds, **options)
    monkeypatch.setattr("specomp.quantization.gptq.SWEPT_BYTES", 1)
    for found, alone in zip(together, gptq_each(W, G, kinds, **options), strict=True):
        assert torch.equal(found.integers, alone.integers)
        assert torch.equal(found.grid.scales, alone.grid.scales)


def test_groups_of_zeros_and_inputs_that_never_occur():
    """A scale that no integer uses stays; a dead column's weights are 0."""
    W, G = problem()
    W[0], G[3], G[:, 3] = 0, 0, 0
    inputs = Inputs(G, act_order=True, damping=0.01)
    (start,) = gptq_each(W, G, [spacing()], act_order=True, damping=0.01)
    (found,) = descended(inputs.awake(W), inputs, [start], 2)
    assert found.values().isfinite().all()
    assert torch.equal(found.values()[0], torch.zeros(24))
    assert float(found.values()[:, 3].abs().max()) == 0


def test_a_row_may_ask_for_it(tmp_path):
    errors = []
    for passes in (0, 2):
        model = tiny_model("llama")
        quantizer = rows.slot("quantizer", "gptq_int3", group_size=8, passes=passes)
        report = specomp.compress(model, TOKENS, "svd_llm", 0.3, quantizer=quantizer)
        errors.append(sum(x.quantization_error for x in report.linears))
        again = specomp.load(specomp.save(model, tmp_path / str(passes))).model
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("changes", [{"algorithm": "rtn"}, {"two_sided": True}])
def test_what_it_goes_with(changes):
    with pytest.raises(UserError, match=r"passes are of algorithm=gptq without two_sided"):
        rows.slot("quantizer", "gptq_int4", passes=1, **changes)
