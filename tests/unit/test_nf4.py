"""NF4 against the published table and a plain search for the nearest level; what is stored."""

import pytest
import torch
from tiny import tiny_model
from units import unit

import specomp
from specomp import rows
from specomp.forms.factors import Factors
from specomp.forms.prices import bits, numbers, parts_of
from specomp.models.modules import CodedLinear
from specomp.numerics.statistics import Stats
from specomp.quantization.nf4 import Coded
from specomp.slots import Chain

TOKENS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """QLoRA, App. E: eight above zero and seven below, between the quantiles of 1 - offset."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1)]).sort().values
    found = torch.tensor(CodedLinear.LEVELS, dtype=torch.float64)
    assert torch.allclose(found, levels / levels.max(), atol=2e-3)
    assert found[7] == 0 and found[0] == -1 and found[-1] == 1


@pytest.mark.parametrize("shape", [(4, 64), (5, 37), (3, 3)])
def test_every_number_is_at_the_nearest_level_of_its_block(shape):
    torch.manual_seed(0)
    W = torch.randn(shape)
    found, levels = Coded.of(W, 64), torch.tensor(CodedLinear.LEVELS)
    for part, rounded in zip(W.flatten().split(64), found.values.flatten().split(64), strict=True):
        scale = part.abs().max()
        nearest = levels[(part[:, None] / scale - levels).abs().argmin(1)] * scale
        assert torch.allclose(rounded, nearest, atol=1e-6)
    assert Coded.of(torch.zeros(2, 64), 64).values.abs().max() == 0


@pytest.mark.parametrize("shape", [(4, 64), (5, 37)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_holds_codes_and_is_the_linear(shape, bias, dtype):
    torch.manual_seed(0)
    (m, n), W = shape, torch.randn(shape)
    linear = torch.nn.Linear(n, m, bias=bias, dtype=dtype)
    found = Coded.of(W, 64)
    made = found.stored(linear)
    assert torch.equal(made.merged_weight(), found.values)
    x = torch.randn(3, n, dtype=dtype)
    W16 = found.values.to(dtype)
    assert torch.equal(made(x), torch.nn.functional.linear(x, W16, linear.bias))
    assert made.codes.numel() == -(-m * n // 2) and made.largest.dtype == torch.uint8
    cast = made.to(torch.float16)
    assert torch.equal(cast.merged_weight(), found.values), "float32 numbers survive a cast"


def test_rounding_looks_at_no_inputs():
    quantizer = rows.slot("quantizer", "nf4")
    W = torch.randn(4, 64)
    (found,) = quantizer(Chain((W,), lambda x: x), Stats({}), torch.float32)
    assert torch.equal(found.values, Coded.of(W, 64).values) and not quantizer.needs
    assert not found.exact and quantizer.notes([]) == []


@pytest.mark.parametrize("export", ["factors", "dense"])
@pytest.mark.parametrize(("row", "ratio"), [("dense", 0.0), ("svd_llm", 0.2), ("wanda", 0.5)])
def test_what_is_stored_is_priced_and_comes_back(tmp_path, row, ratio, export):
    model = tiny_model("llama")
    before = sum(p.numel() for p in model.parameters())
    report = specomp.compress(model, TOKENS, row, ratio, quantizer="nf4")
    small, grid = report.ledger.compressed, rows.slot("quantizer", "nf4").grid
    for x in report.linears:
        module = model.get_submodule(x.name)
        if row == "dense":
            assert numbers(parts_of(module)) == x.m * x.n
            blocks = -(-x.m * x.n // 64)
            assert bits(parts_of(module), torch.float32) == 4 * x.m * x.n + 32 * blocks
        if row == "svd_llm" and not x.dense:
            parts = Factors().parts(unit(x.name, x.m, x.n), x.rank, grid)
            assert bits(parts, torch.float32) == bits(parts_of(module), torch.float32)
    if row == "dense":
        assert report.ledger.measured_retention == 1 and small.model_params == before
        assert report.ledger.measured_bits == pytest.approx(4.5, abs=0.02)
        rest = before - small.linear_params
        assert small.model_bytes == small.held_bytes == 4 * rest + small.linear_bits // 8
        assert small.macs_per_token == report.ledger.dense.macs_per_token
    folder = specomp.save(model, tmp_path / "out", form=export)
    if export == "factors" and row == "dense":
        on_disk = (folder / "model.safetensors").stat().st_size
        assert 0 < on_disk - small.model_bytes < 8000, "a header"
    again = specomp.load(folder).model
    with torch.no_grad():
        lost = (again(TOKENS).logits - model(TOKENS).logits).abs().max()
    assert lost == 0 if export == "factors" else lost < 1e-5
