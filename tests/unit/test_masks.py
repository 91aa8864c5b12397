"""Masks against the published algorithms as a reader would write them down, and what is stored."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from units import unit

import specomp
from specomp import rows
from specomp.errors import UserError
from specomp.forms.masked import MaskedLinear
from specomp.forms.options import read_off
from specomp.forms.prices import bits, numbers, parts_of
from specomp.numerics.factors import GramNorm
from specomp.numerics.masks import largest, sparsegpt, wanda
from specomp.quantization.gptq import gptq_each
from specomp.quantization.rtn import Spacing


def problem(m=12, n=160, tokens=400, seed=0):
    torch.manual_seed(seed)
    X = torch.randn(tokens, n) @ (torch.eye(n) + 0.3 * torch.randn(n, n))
    X *= torch.logspace(-1, 1, n)[torch.randperm(n)]
    return torch.randn(m, n), (X.T @ X).double()


def published_sparsegpt(W, G, sparsity, pattern, damping, block=128):
    """Algorithm 1 of arXiv:2301.00774 by its definition: columns leave the problem one by one, and
    the inverse Hessian of those that are left is made anew each time (no Cholesky factor).
    """
    m, n = W.shape
    W, mask = W.double().clone(), torch.ones(m, n, dtype=torch.bool)
    H = 2 * G
    H = H + damping * H.diagonal().mean() * torch.eye(n, dtype=H.dtype)
    # [C]_jj^2 of the upper Cholesky factor of H^-1: the pivot of j once all before it have left
    pivots = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(n)])
    for j in range(n):
        if pattern is None and j % block == 0:
            part = W[:, j : j + block] ** 2 / pivots[j : j + block]
            pruned = part.flatten().argsort()[: round(part.numel() * sparsity)]
            flat = torch.ones(part.numel(), dtype=torch.bool)
            flat[pruned] = False
            mask[:, j : j + block] = flat.view_as(part)
        if pattern is not None and j % pattern[1] == 0:
            part = W[:, j : j + pattern[1]] ** 2 / pivots[j : j + pattern[1]]
            pruned = part.topk(pattern[1] - pattern[0], largest=False).indices
            mask[:, j : j + pattern[1]] = mask[:, j : j + pattern[1]].scatter(1, pruned, False)
        inverse = torch.linalg.inv(H[j:, j:])
        error = (W[:, j] - W[:, j] * mask[:, j]) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0]
        W[:, j] *= mask[:, j]
    return W, mask


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_sparsegpt_is_the_published_algorithm(pattern):
    W, G = problem()
    expected, mask = published_sparsegpt(W, G, 0.5, pattern, 0.01)
    found, ours, damping = sparsegpt(W, G, 80, damping=0.01, pattern=pattern)
    assert torch.equal(ours, mask) and damping == 0.01
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert int(ours.sum()) == W.numel() // 2


@pytest.mark.parametrize("kept", [1, 33, 80, 159])
@pytest.mark.parametrize("by_row", [True, False])
def test_as_many_stay_as_are_paid(kept, by_row):
    W, G = problem()
    for mask in (
        sparsegpt(W, G, kept, damping=0.01, by_row=by_row)[1],
        largest(wanda(W, G.diagonal()), kept, by_row=by_row),
    ):
        assert int(mask.sum()) == 12 * kept
        assert not by_row or (mask.sum(1) == kept).all()


def test_wanda_compares_in_every_row():
    """arXiv:2306.11695, Eq. 1 and Sec. 3: |W_ij| ||X_j||_2, the smallest half of each row."""
    W, G = problem()
    X = torch.linalg.cholesky(G).T  # any inputs with this Gram
    for row, kept in zip(W, largest(wanda(W, G.diagonal()), 80, by_row=True), strict=True):
        scores = [abs(float(w)) * float(x.norm()) for w, x in zip(row, X.T, strict=True)]
        order = sorted(range(160), key=lambda j: scores[j])
        assert set(order[80:]) == set(kept.nonzero().flatten().tolist())


def test_two_of_four_stay_everywhere():
    W, G = problem()
    for mask in (
        largest(wanda(W, G.diagonal()), 0, by_row=True, pattern=(2, 4)),
        sparsegpt(W, G, 80, damping=0.01, pattern=(2, 4))[1],
    ):
        assert (mask.view(12, 40, 4).sum(2) == 2).all()


def test_what_stays_makes_up_for_the_rest():
    """Losses in the order of the papers: SparseGPT below Wanda below magnitude, 2:4 above 50 %."""
    W, G = problem(24, 128, 300)
    norm = GramNorm(G)
    form = {x: rows.slot("packing", "masked", score=x) for x in ("magnitude", "sparsegpt")}
    form["wanda"] = rows.slot("packing", "masked", score="wanda", compare="row")
    found = {x: form[x].pruned(W, norm, 64, "x")[0] for x in form}
    lost = {x: norm.loss(y.double() - W.double()) for x, y in found.items()}
    assert lost["sparsegpt"] < 0.9 * lost["wanda"] < 0.9 * lost["magnitude"]
    two = rows.slot("packing", "masked", pattern=[2, 4]).pruned(W, norm, 64, "x")[0]
    assert norm.loss(two.double() - W.double()) > lost["sparsegpt"]


SPACINGS = [
    Spacing(bits=b, group_size=g, symmetric=s, scale_dtype=torch.float16, search=r)
    for b, g, s, r in ((4, 16, True, 0), (3, 32, False, 6))
]


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_of_all_numbers_is_gptq(act_order):
    W, G = problem()
    every = torch.ones_like(W, dtype=torch.bool)
    # of whole rows: groups that are fitted anew are others where the order is that of the columns
    kinds = SPACINGS if act_order else [replace(x, group_size=None) for x in SPACINGS]
    masked = gptq_each(W, G, kinds, act_order=act_order, damping=0.01, mask=every)
    plain = gptq_each(W, G, kinds, act_order=act_order, damping=0.01)
    for a, b in zip(masked, plain, strict=True):
        assert torch.equal(a.integers, b.integers)
        assert torch.equal(a.grid.scales, b.grid.scales)


@pytest.mark.parametrize("shape", ["row", "matrix"])
def test_zeros_stay_zeros_and_errors_are_made_up_for(shape):
    W, G = problem()
    mask = largest(wanda(W, G.diagonal()), 81, by_row=shape == "row")
    numbers = W[mask].view(12 if shape == "row" else 1, -1)
    norm = GramNorm(G)

    def loss(numbers):
        whole = torch.zeros_like(W).masked_scatter_(mask, numbers)
        return norm.loss((whole - W * mask).double())

    together = gptq_each(numbers, G, SPACINGS, act_order=True, damping=0.01, mask=mask)
    for found, spacing in zip(together, SPACINGS, strict=True):
        alone = gptq_each(numbers, G, [spacing], act_order=True, damping=0.01, mask=mask)[0]
        assert torch.equal(found.integers, alone.integers)
        assert found.integers.shape == numbers.shape
        nearest = found.grid.values(found.grid.integers(numbers))
        assert loss(found.values()) < 0.9 * loss(nearest)


@pytest.mark.parametrize("n", [16, 21])
@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_the_linear_of_its_weight(n, bias):
    torch.manual_seed(0)
    mask = torch.rand(5, n) < 0.4
    numbers = torch.randn(1, int(mask.sum()))
    b = torch.randn(5) if bias else None
    made = MaskedLinear.of(numbers, mask, b, dtype=torch.float32, device="cpu")
    W = torch.zeros(5, n).masked_scatter(mask, numbers)
    x = torch.randn(3, n)
    assert torch.equal(made(x), torch.nn.functional.linear(x, W, b))
    assert torch.equal(made.merged_weight(), W) and torch.equal(made.places(), mask)
    assert made.mask.shape == (5, -(-n // 8)) and made.mask.dtype == torch.uint8
    made(x).sum().backward()
    assert made.kept.weight.grad.shape == numbers.shape


def test_losses_are_measured_and_read_off_between():
    at, values = torch.tensor([0, 4, 8]), torch.tensor([8.0, 2.0, 0.0])
    found = read_off(at, values, torch.tensor([0, 2, 4, 6, 8]))
    assert found.tolist() == [8.0, 5.0, 2.0, 1.0, 0.0]


TOKENS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantizer", [None, "gptq_int4"])
@pytest.mark.parametrize("row", ["magnitude", "wanda", "sparsegpt"])
def test_half_of_every_linear_is_half_of_the_parameters(row, quantizer):
    model = tiny_model("llama")
    report = specomp.compress(model, TOKENS, row, 0.5, quantizer=quantizer)
    assert report.ledger.measured_retention == 0.5
    for x in report.linears:
        module = model.get_submodule(x.name)
        assert isinstance(module, MaskedLinear) and x.facts["density"] == 0.5
        assert numbers(parts_of(module)) == x.m * x.n // 2
        form = rows.method(row).packing
        grid = None if quantizer is None else rows.slot("quantizer", quantizer).grid
        whole = unit(x.name, x.m, x.n)
        assert bits(form.parts(whole, x.n // 2, grid), torch.float32) == bits(
            parts_of(module), torch.float32
        )


def test_masks_are_chosen_beside_grids_and_ranks():
    """In one budget of bits: a mask is a form like any other."""
    model = tiny_model("llama")
    method = specomp.method("specomp_low_rank", packing="masked")
    report = specomp.compress(model, TOKENS, method, specomp.Bits(bits=8.0))
    assert report.ledger.measured_bits <= 8.0
    uneven = specomp.method("sparsegpt", whitening="kronecker", allocation="global_loss")
    report = specomp.compress(tiny_model("llama"), TOKENS, uneven, 0.4)
    shares = {round(x.facts["density"], 2) for x in report.linears if not x.dense}
    assert len(shares) > 3
    assert report.ledger.measured_retention == pytest.approx(0.6, abs=0.01)


def test_what_a_mask_cannot_be():
    with pytest.raises(UserError, match="N smaller than M"):
        rows.slot("packing", "masked", pattern=[4, 4])
    odd = specomp.method("wanda", packing={"pattern": [3, 7]})
    with pytest.raises(
        UserError, match="rows of 32, no multiple of the 7.*null, or to .1,2., .2,4."
    ):
        specomp.compress(tiny_model("llama"), TOKENS, odd, 0.5)
    with pytest.raises(UserError, match="AdaComp works on components.*Masked stores none"):
        specomp.compress(
            tiny_model("llama"), TOKENS, specomp.method("adasvd", packing="masked"), 0.5
        )
    trained = specomp.method("wanda", training="lora")
    with pytest.raises(UserError, match="LoRA adds to products.*Masked.*method/training=none"):
        specomp.compress(tiny_model("llama"), TOKENS, trained, 0.5)
    with pytest.raises(UserError, match="compare=matrix.*one scale a row"):
        specomp.compress(
            tiny_model("llama"), TOKENS, "sparsegpt", 0.5, quantizer="gptq_int4_perrow"
        )


def test_engines_are_kept_from_masks(tmp_path):
    model = tiny_model("llama")
    specomp.compress(model, TOKENS, "wanda", 0.5)
    folder = specomp.save(model, tmp_path / "out")
    assert "engines rewrite" in json.loads((folder / "specomp.json").read_text())["unserved"]
