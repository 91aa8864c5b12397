"""Forms on grids of their own: predicted as they will be stored, priced in all that they store."""

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import specomp
from specomp import rows
from specomp.api import budget_of, method_of
from specomp.cache import Cache
from specomp.compression.calibrate import calibrate
from specomp.compression.evidence import LayerEvidence
from specomp.compression.loop import compress, dense_spectra
from specomp.errors import UserError
from specomp.forms.gridded import between
from specomp.forms.prices import Bits, bits, parts_of
from specomp.models.load import cast_weights
from specomp.models.modules import GridLinear, weight_of
from specomp.numerics.statistics import Gram, Stats
from specomp.quantization.gptq import gptq, gptq_each
from specomp.quantization.rtn import Spacing
from specomp.slots import Chain, Choice
from tests.running import make_run
from tests.tiny import tiny_model, tiny_tokenizer

# Few grids: seconds on a tiny model.
FEW = rows.slot(
    "quantizer",
    "grids",
    whole=[[3, 64], [4, 64], [6, 64], [8, 64]],
    factors=[[4, 64]],
    packing=[],
    units=[[3, 64], [5, 64]],
)
KINDS = [(2, 32), (3, 64), (4, None), (4, 16), (8, 128)]


def spacings(*, symmetric: bool) -> list[Spacing]:
    return [
        Spacing(bits=b, group_size=g, symmetric=symmetric, scale_dtype=torch.float16)
        for b, g in KINDS
    ]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_all_grids_in_one_sweep_are_each_by_itself(act_order, symmetric):
    torch.manual_seed(0)
    W, X = torch.randn(24, 150), torch.randn(400, 150)
    X[:, 7] *= 30
    G, kinds = X.T @ X, spacings(symmetric=symmetric)
    together = gptq_each(W, G, kinds, act_order=act_order, damping=0.01)
    for found, kind in zip(together, kinds, strict=True):
        alone = gptq(W, G, kind, act_order=act_order, damping=0.01)
        assert torch.equal(found.integers, alone.integers)
        assert torch.equal(found.grid.scales, alone.grid.scales)
        assert (found.grid.zeros is None) == (alone.grid.zeros is None) == symmetric


@pytest.mark.parametrize("settings", [{}, {"algorithm": "rtn"}, {"order": "sequential"}])
def test_several_rules_at_once_are_each_by_itself(settings):
    torch.manual_seed(0)
    rules = [
        rows.slot("quantizer", "gptq_int4", bits=b, group_size=g, **settings)
        for b, g in ((3, 16), (4, 32))
    ]
    X = torch.randn(200, 40)
    stats, pair = Stats({Gram(): (X.T @ X).double()}), (torch.randn(9, 40), torch.randn(20, 9))
    chain = Chain(pair, lambda Vt, U: U @ Vt, free_basis=True)
    together = rules[0].each(rules, chain, stats, torch.float32)
    for found, rule in zip(together, rules, strict=True):
        alone = rule(chain, stats, torch.float32)
        assert all(torch.equal(a.values, b.values) for a, b in zip(found, alone, strict=True))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A run on a tiny model with a menu of several grids, and its evidence."""
    row = specomp.method("specomp", quantizer="grids")
    run = make_run("llama", Cache(tmp_path_factory.mktemp("cache")), method=row)
    statistics = calibrate(run)
    spectra = dense_spectra(run, statistics)
    return run, LayerEvidence(run, spectra, statistics, {}, {})


def lost(run, evidence, unit, choice) -> float:
    """What a choice really loses, in the norm, as it is stored."""
    modules = choice.form.fit(unit, choice.size, evidence)
    (linear,) = unit.linears
    error = weight_of(modules[linear.name]) - evidence.weight(linear).float()
    return evidence.norm(linear).loss(error) ** 2


def test_a_linear_in_full_loses_what_was_predicted_on_every_grid(trial):
    run, evidence = trial
    unit, seen = run.units[3], set()
    for form in run.forms:
        if form.size_of != "whole":
            continue
        (size,) = form.sizes(unit)
        (predicted,) = form.losses(unit, torch.tensor([size]), evidence).tolist()
        assert lost(run, evidence, unit, Choice(form, size)) == pytest.approx(predicted, rel=1e-4)
        seen.add(form.rounding.grid.bits)
    assert seen == {2, 3, 4, 5, 6, 8}


def test_factors_on_a_grid_lose_what_truncation_and_rounding_do(trial):
    """Rounding errors do not know what was truncated: both add up, nearly."""
    run, evidence = trial
    unit = run.units[-1]
    forms = [x for x in run.forms if x.size_of == "rank" and hasattr(x, "rounding")]
    assert forms
    for form in forms:
        for size in [x for x in form.tried(unit) if x in form.sizes(unit)]:
            plain = form.form.losses(unit, torch.tensor([size]), evidence)
            (predicted,) = form.losses(unit, torch.tensor([size]), evidence).tolist()
            assert predicted > float(plain)
            real = lost(run, evidence, unit, Choice(form, size))
            assert real == pytest.approx(predicted, rel=0.35)


def test_parts_are_what_the_modules_store(trial):
    run, evidence = trial
    for unit in run.units[:3]:
        for form in run.forms:
            for size in list(form.sizes(unit))[:: max(1, len(form.sizes(unit)) // 3)]:
                choice = Choice(form, size)
                modules = form.fit(unit, size, evidence)
                priced = bits(form.parts(unit, size), torch.float32)
                assert priced == sum(bits(parts_of(x), torch.float32) for x in modules.values())
                assert choice.form.size_of in ("whole", "rank")


def test_a_cut_mlp_on_a_grid_loses_what_each_of_its_linears_does(trial):
    run, evidence = trial
    unit, forms = next(iter(run.wide_units.items()))
    for form in [x for x in forms if hasattr(x, "rounding")][::2]:
        size, plain = form.tried(unit)[1], form.form
        modules, exact = form.fit(unit, size, evidence), plain.fit(unit, size, evidence)
        kept = plain._order(unit, evidence)["order"][:size].sort().values
        stored, lost = 0, 0.0
        for x in unit.linears:
            module = modules[x.name]
            assert module.grid.spec.bits == form.rounding.bits == form.facts(module)["bits"]
            stored += bits(parts_of(module), torch.float32)
            error = torch.zeros(x.m, x.n)
            if x == unit.linears[-1]:
                error[:, kept] = weight_of(module) - weight_of(exact[x.name])
            else:
                error[kept] = weight_of(module) - weight_of(exact[x.name])
            lost += evidence.norm(x).loss(error) ** 2
        assert stored == bits(form.parts(unit, size), torch.float32)
        (predicted,) = form.losses(unit, torch.tensor([size]), evidence).tolist()
        (cut,) = plain.losses(unit, torch.tensor([size]), evidence).tolist()
        assert predicted - cut == pytest.approx(lost, rel=1e-2)  # a tie here and there


def test_low_rank_on_a_grid_is_never_dearer_than_in_full_on_it(trial):
    run, _ = trial
    for unit in run.units[:7]:
        for form in run.forms:
            if form.size_of == "rank" and hasattr(form, "rounding"):
                full = rows.slot("packing", "whole").parts(unit, 0, form.rounding.grid)
                for size in form.sizes(unit):
                    assert bits(form.parts(unit, size), torch.float16) < bits(full, torch.float16)


@pytest.mark.parametrize("budget", [4.5, 6.0])
def test_a_budget_of_bits_is_met_from_below(budget, shared_cache):
    model = tiny_model("llama")
    tokens = torch.randint(0, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    report = specomp.compress(
        model, tokens, "specomp", specomp.Bits(bits=budget), quantizer=FEW, cache=shared_cache
    )
    assert budget * 0.97 < report.ledger.measured_bits <= budget
    assert len({x.facts.get("bits") for x in report.linears}) > 1


def test_more_bits_are_predicted_to_lose_less(trial):
    run, evidence = trial
    for unit in run.units[:4]:
        full = [x for x in run.forms if x.size_of == "whole"]
        by_bits: dict[int, float] = {}
        for form in full:
            (loss,) = form.losses(unit, torch.tensor(form.sizes(unit)), evidence).tolist()
            width = form.rounding.grid.bits
            by_bits[width] = min(loss, by_bits.get(width, loss))
        losses = [by_bits[x] for x in sorted(by_bits)]
        assert losses == sorted(losses, reverse=True)


def test_the_dense_row_with_a_quantizer_is_gptq(tmp_path):
    """Every linear, by hand: the integers that GPTQ gives on the Gram of the dense model."""
    row = specomp.method("dense", quantizer="gptq_int4")
    assert not row.is_dense and not row.spends
    run = make_run("llama", Cache(tmp_path), method=row)
    statistics = calibrate(run)
    by_hand = {}
    for x in run.linears:
        weight = run.model.get_submodule(x.name).weight.detach().clone()
        spacing = Spacing(bits=4, group_size=128, symmetric=True, scale_dtype=torch.float16)
        found = gptq(weight, statistics(x)[Gram()], spacing, act_order=True, damping=0.01)
        by_hand[x.name] = found.values()
    report = compress(run, statistics)
    for name, weight in by_hand.items():
        module = run.model.get_submodule(name)
        assert isinstance(module, GridLinear) and torch.equal(module.weight, weight)
    assert not any(x.dense for x in report.linears)
    assert report.ledger.target_retention == 1 and report.ledger.measured_bits < 5


def test_the_dense_row_under_a_budget_of_bits_is_the_reference():
    """One grid compresses it; which of several is nobody's choice."""
    assert specomp.method("dense", quantizer="grids").is_dense
    assert not specomp.method("dense", quantizer="gptq_int3").is_dense


@pytest.mark.parametrize(
    "method, ratio, quantizer, said",
    [
        ("svd_llm", 0.4, "grids", "counts parameters.*ratio=bits3.*gptq_int4"),
        (("svd_llm", "whole"), 0.4, None, "in full, and ratio.compression=0.4 counts parameters"),
        (("svd_llm", "whole"), "bits3", "none", "in full.*without a grid.*quantizer=grids"),
        (("svd_llm", "factors", "cut"), "bits3", None, "whitening=kronecker, or method/units=none"),
        ("soco", "bits3", None, "spends parameters"),
    ],
)
def test_what_cannot_be_chosen_is_refused(method, ratio, quantizer, said):
    name, *slots = (method,) if isinstance(method, str) else method
    row = specomp.method(name, **dict(zip(("packing", "units"), slots, strict=False)))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(UserError, match=said):
        specomp.compress(tiny_model("llama"), tokens, row, ratio, quantizer=quantizer)


def test_a_choice_of_grids_has_some():
    with pytest.raises(UserError, match="whole"):
        rows.slot("quantizer", "grids", whole=[])


def test_what_was_tried_on_one_text_is_not_taken_for_another(tmp_path):
    """Rounding looks at inputs also where the norm looks at none."""
    found, two = [], rows.slot("quantizer", "grids", whole=[[4, 64]], factors=[], packing=[])
    for seed in range(2):
        tokens = torch.randint(0, 200, (4, 32), generator=torch.Generator().manual_seed(seed))
        model = tiny_model("llama")
        specomp.compress(model, tokens, "svd", "bits5", quantizer=two, cache=tmp_path)
        found.append(len(list((tmp_path / "units").rglob("*.safetensors"))))
    assert found[1] == 2 * found[0] > 0


def test_grids_that_do_not_fit_side_by_side_are_swept_one_after_the_other(monkeypatch):
    torch.manual_seed(0)
    W, X = torch.randn(24, 150), torch.randn(400, 150)
    kinds = spacings(symmetric=False)
    at_once = gptq_each(W, X.T @ X, kinds, act_order=True, damping=0.01)
    monkeypatch.setattr(specomp.quantization.gptq, "SWEPT_BYTES", 2 * 4 * W.numel())
    in_parts = gptq_each(W, X.T @ X, kinds, act_order=True, damping=0.01)
    assert len(in_parts) == len(kinds)
    for a, b in zip(at_once, in_parts, strict=True):
        assert torch.equal(a.integers, b.integers)


def test_a_budget_that_no_grid_meets_says_what_there_is():
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(UserError, match=r"ratio.bits=0.01 keeps \d+ bits.*takes \d+: raise"):
        specomp.compress(tiny_model("llama"), tokens, "specomp", specomp.Bits(bits=0.01))


def test_bits_are_spent_with_grids_unless_another_quantizer_is_named():
    three = budget_of("bits3")
    assert three == Bits(bits=3.0)
    assert len(method_of("specomp", None, three).rounding.grids) > 1
    assert method_of("specomp", "none", three).rounding.grids == ()
    assert len(method_of("svd_llm", "gptq_int4", three).rounding.grids) == 1
    assert method_of("specomp", None, budget_of(0.4)).rounding.grids == ()
    assert method_of("dense", None, three).is_dense


def test_between_points_lines_are_straight_over_the_logarithm():
    at, values = torch.tensor([2, 8, 32]), torch.tensor([1.0, 3.0, 4.0])
    found: Tensor = between(at, values, torch.tensor([1, 2, 4, 8, 16, 32, 50]))
    assert found.tolist() == pytest.approx([1, 1, 2, 3, 3.5, 4, 4])
    assert between(at[:1], values[:1], torch.tensor([1, 5])).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_forms_in_one_folder_are_as_large_as_counted_and_come_back(
    tmp_path, shared_cache, dtype
):
    model = cast_weights(tiny_model("llama"), dtype)
    tokens = torch.randint(0, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    report = specomp.compress(model, tokens, "specomp", "bits5", quantizer=FEW, cache=shared_cache)
    kinds = {(x.facts.get("bits"), bool(x.facts.get("cut"))) for x in report.linears}
    assert len(kinds) > 2
    folder = specomp.save(model, tmp_path / "m", tiny_tokenizer(), report=report)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    size = report.ledger.compressed
    assert size.model_bytes == sum(x.numel() * x.element_size() for x in stored)
    again = specomp.load(folder).model
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
