"""GPTQ in the two-sided norm against GPTQ of the whole Hessian, written out."""

from dataclasses import replace

import pytest
import torch
from running import random_tokens
from tiny import tiny_model
from torch import Tensor

import specomp
from specomp import rows
from specomp.errors import UserError
from specomp.numerics.feedback import Inputs, inputs_of
from specomp.numerics.grid import limits
from specomp.numerics.statistics import OutputGradGram
from specomp.quantization import two_sided as module
from specomp.quantization.factors import FactorQuantizer
from specomp.quantization.gptq import gptq, gptq_each
from specomp.quantization.rtn import Spacing
from specomp.quantization.two_sided import two_sided

TOKENS = random_tokens(8, 32)


def gram(size: int, *, seed: int, tokens: int = 40) -> Tensor:
    """Of inputs that hang together."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, size, dtype=torch.float64) @ torch.randn(size, size).double()
    return x.T @ x


def spacing(bits: int = 3, group: int = 4, *, symmetric: bool = False) -> Spacing:
    return Spacing(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=torch.float16)


def written_out(W: Tensor, inputs: Inputs, outputs: Inputs, grid) -> Tensor:
    """Integers (m n) by GPTQ of one row of all numbers, column after column of W, with the Hessian
    (G + damping) x (B + damping) of them, all in float64.
    """
    m, n = W.shape
    into = [x.feedback.double() for x in (inputs, outputs)]
    G, B = (torch.linalg.inv(x.T @ x) for x in into)  # in the order of rounding
    hessian = torch.kron(G, B)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)

    def in_order(x: Tensor) -> Tensor:
        return x[outputs.order][:, inputs.order].T.flatten().double()

    ones = torch.ones_like(W, dtype=torch.int8)
    scales = in_order(grid.values(ones) - grid.values(0 * ones))
    zeros = in_order(-grid.values(0 * ones)) / scales
    left, found = in_order(W), torch.empty(m * n, dtype=torch.int8)
    low, high = limits(grid.bits)
    for k in range(m * n):
        q = (left[k] / scales[k] + zeros[k]).round().clamp(low, high)
        error = (left[k] - (q - zeros[k]) * scales[k]) / factor[k, k]
        left[k:] -= error * factor[k, k:]
        found[k] = q
    whole = torch.empty(m, n, dtype=torch.int8)
    whole[outputs.order[:, None], inputs.order] = found.view(n, m).T
    return whole


@pytest.mark.parametrize("shape", [(6, 8), (9, 7), (1, 8), (8, 1), (20, 21)])
@pytest.mark.parametrize(("block", "near"), [(2, 2), (2, 4), (4, 8), (4, 64), (8, 16)])
@pytest.mark.parametrize("act_order", [True, False])
def test_it_is_gptq_of_the_whole_hessian(monkeypatch, shape, block, near, act_order):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "NEAR", near)
    (m, n), W = shape, torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(gram(n, seed=1), act_order=act_order, damping=0.01)
    outputs = Inputs(gram(m, seed=2), act_order=act_order, damping=0.01)
    grid = spacing().fit(W)
    (found,) = two_sided(W, inputs, outputs, [grid])
    assert torch.equal(found, written_out(W, inputs, outputs, grid))


@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_that_do_not_hang_together_make_up_for_nothing(symmetric):
    W, G = torch.randn(12, 20), gram(20, seed=1)
    plain = gptq(W, G, spacing(symmetric=symmetric), act_order=True, damping=0.01)
    options = {"act_order": True, "damping": 0.01, "outputs": 3 * torch.eye(12).double()}
    (found,) = gptq_each(W, G, [spacing(symmetric=symmetric)], **options)
    assert torch.equal(found.integers, plain.integers)
    assert torch.equal(found.values(), plain.values())


def test_grids_side_by_side_are_each_as_alone(monkeypatch):
    W, G, B = torch.randn(17, 24), gram(24, seed=1), gram(17, seed=2)
    kinds = [spacing(2, 8), spacing(3, 8), spacing(4, 24, symmetric=True), spacing(8, 12)]
    options = {"act_order": True, "damping": 0.01, "outputs": B, "output_damping": 0.01}
    together = gptq_each(W, G, kinds, **options)
    monkeypatch.setattr("specomp.quantization.gptq.SWEPT_BYTES", 1)
    for kind, found, alone in zip(kinds, together, gptq_each(W, G, kinds, **options), strict=True):
        (single,) = gptq_each(W, G, [kind], **options)
        assert torch.equal(found.integers, single.integers)
        assert torch.equal(found.integers, alone.integers)


def test_less_is_lost_where_it_counts():
    W, G, B = torch.randn(24, 32), gram(32, seed=1), gram(24, seed=2)
    options = {"act_order": True, "damping": 0.01}
    plain = gptq(W, G, spacing(), **options).values()
    (both,) = gptq_each(W, G, [spacing()], outputs=B, output_damping=0.01, **options)

    def lost(values: Tensor, outputs: Tensor) -> float:
        E = (values - W).double()
        return float((outputs @ E @ G * E).sum())

    assert lost(both.values(), B) < 0.9 * lost(plain, B)
    assert lost(both.values(), torch.eye(24).double()) > lost(plain, torch.eye(24).double())


def test_an_output_on_which_no_loss_depends_keeps_its_row():
    W, G, B = torch.randn(6, 8), gram(8, seed=1), gram(6, seed=2)
    B[2], B[:, 2] = 0, 0
    options = {"act_order": True, "damping": 0.01}
    (found,) = gptq_each(W, G, [spacing(8)], outputs=B, output_damping=0.01, **options)
    assert torch.allclose(found.values()[2], W[2], atol=0.1), "not zero, as a dead input's column"
    (none,) = gptq_each(W, G, [spacing(8)], outputs=0 * B, **options)
    plain = gptq(W, G, spacing(8), **options)
    assert torch.equal(none.integers, plain.integers), "nothing depends on any"


@pytest.mark.parametrize("packing", ["factors", "pivoted", "whole"])
@pytest.mark.parametrize("units", ["none", "cut_all"])
def test_of_every_form_it_is_known_what_its_outputs_are(monkeypatch, packing, units):
    """An error u f^T of a matrix counts u^T B u, B what `lefts` makes of the linear's."""
    seen = []

    def each(self, rules, chain, stats, dtype):
        seen.append((chain, stats))
        return original(self, rules, chain, stats, dtype)

    original = FactorQuantizer.each
    monkeypatch.setattr(FactorQuantizer, "each", each)
    quantizer = rows.slot("quantizer", "yaqa_int4", group_size=8, rebalance=False)
    plain = specomp.method("specomp", packing=packing, units=units)
    # the smallest and the largest forms alike: some units are cut, some linears stay
    ratio = specomp.Bits(bits=9.0) if packing == "whole" else 0.5
    specomp.compress(tiny_model("llama"), TOKENS, plain, ratio, quantizer=quantizer)
    kinds = set()
    for chain, stats in seen:
        B = stats[OutputGradGram()].double()
        matrices = [x.double() for x in chain.matrices]
        before = chain.assemble(*(x.float() for x in chain.matrices)).double()
        for index, matrix in enumerate(matrices):
            outputs = quantizer._outputs(chain, matrices, stats, index)
            assert outputs is not None and outputs.shape == (len(matrix),) * 2
            f = torch.randn(matrix.shape[1], dtype=torch.float64)
            shares = []
            for _ in range(3):
                u = torch.randn(len(matrix), dtype=torch.float64)
                moved = list(matrices)
                moved[index] = matrix + 10 * u.outer(f)
                E = chain.assemble(*(x.float() for x in moved)).double() - before
                shares.append(float((B @ E * E).sum()) / float(u @ outputs.double() @ u))
            assert shares == pytest.approx([shares[0]] * 3, rel=1e-3)
            kinds.add((len(matrices), index, len(matrix) == len(before)))
    assert len(kinds) >= {"factors": 2, "pivoted": 2, "whole": 1}[packing]


@pytest.mark.parametrize("upstream", ["dense", "compressed"])
@pytest.mark.parametrize("row", ["dense", "svd_llm", "adasvd", "specomp", "soco"])
def test_any_row_may_be_rounded_so(tmp_path, row, upstream):
    """Gradients are the dense model's, whatever the inputs are."""
    if row == "soco" and upstream == "compressed":
        pytest.skip("SoCo's training starts from the dense model")
    chosen = specomp.method(row, quantizer="yaqa_int4")
    if row == "soco":
        chosen = replace(chosen, training=replace(chosen.training, steps_factor=0.02))
    model = tiny_model("llama")
    calibration = {"upstream": upstream}
    report = specomp.compress(model, TOKENS, chosen, 0.4, calibration=calibration)
    assert report.ledger.compressed.linear_bits < 0.3 * report.ledger.dense.linear_bits


def test_what_it_goes_with():
    for changes in ({"algorithm": "rtn"}, {"scaling": 20}):
        with pytest.raises(UserError, match=r"output_damping is of algorithm=gptq"):
            rows.slot("quantizer", "yaqa_int4", **changes)


def test_sides_are_remembered():
    G, B = gram(8, seed=1), gram(6, seed=2)
    first = [inputs_of(x, act_order=True, damping=0.01) for x in (G, B, G, B)]
    assert first[0] is first[2] and first[1] is first[3]


def test_a_budget_of_bits_has_a_plan():
    """Which tries every grid on small linears, with what rounding reads of outputs."""
    plan = specomp.plan(tiny_model("llama").config, "specomp", "bits3", num_samples=8, length=32)
    assert sum(x.work.flops for x in plan.stages) > 0


def test_masks_are_not_in_columns():
    with pytest.raises(UserError, match=r"output_damping.*Masked.*gptq_int4"):
        specomp.compress(tiny_model("llama"), TOKENS, "wanda", 0.5, quantizer="yaqa_int4")
    chosen = specomp.method("specomp", packing="masked", units="none", quantizer="grids")
    report = specomp.compress(tiny_model("llama"), TOKENS, chosen, specomp.Bits(bits=4.0))
    assert report.ledger.measured_bits <= 4.0
