"""Functional units: whole MLPs cut to fewer inner dimensions, through every family and everything
that handles what is stored.
"""

import copy
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from running import ROOT, random_tokens
from tiny import FAMILY_NAMES, tiny_model
from transformers import AutoModelForCausalLM

import specomp
from specomp import rows
from specomp.errors import UserError
from specomp.forms.cut import Cut
from specomp.forms.heads import HeadsIn, HeadsOut
from specomp.forms.menu import Alike, Apart, options, settled
from specomp.forms.options import DENSE
from specomp.forms.pivoted import Pivoted
from specomp.forms.prices import Numbers, numbers, parts_of
from specomp.forms.scores import QueryKey, SomeOutputs
from specomp.models.families import family_of
from specomp.models.family import LinearSpec, Unit
from specomp.models.identity import modelling_source
from specomp.models.modules import PartLinear
from specomp.numerics.factors import GramNorm, TwoSidedNorm
from specomp.slots import Choice, describe

TOKENS = random_tokens(8, 32)
CUT = Cut(ridge=1e-4, prior=0.0, order="weighted", repair=True, loss_scale=1.0, round_to=1)


def compressed(model, name="specomp", ratio=0.5, units="cut", **slots):
    method = specomp.method(name, units=units, **slots)
    return specomp.compress(model, TOKENS, method, ratio, calibration={"batch_size": 4})


def only_cut(model, ratio=0.5, **settings):
    """Every MLP cut, attention left as it is as far as the budget lets it."""
    made = rows.slot("units", "cut", equal=True, **settings)
    return compressed(model, "two_sided", ratio, units=made, allocation="global_loss")


def inputs_of(model, linear):
    """(tokens, n) in float64, on the calibration tokens."""
    seen = []
    hook = linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return torch.cat(seen).double()


def inner_sizes(model):
    return [unit.linears[-1].n for unit in family_of(model.config).mlps(model)]


def computes_as_before_in_every_form(model, expected, folder):
    found = model(TOKENS[:2]).logits
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    for kind in ("factors", "dense"):
        specomp.save(model, folder / kind, form=kind)
        again = specomp.load(folder / kind).model
        assert torch.allclose(again(TOKENS[:2]).logits, found, atol=1e-4)


def units_of(model, kind):
    return [x for x in family_of(model.config).functional_units(model) if x.kind == kind]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_is_cut_saved_and_loaded(tmp_path, name):
    model = tiny_model(name)
    family, dense = family_of(model.config), inner_sizes(model)
    report = only_cut(model)
    sizes = inner_sizes(model)
    assert len(set(sizes)) == 1 and 0 < sizes[0] < dense[0]
    assert report.ledger.measured_retention == pytest.approx(0.5, abs=0.01)
    logits = model(TOKENS[:2]).logits
    for form in ("factors", "dense"):
        specomp.save(model, tmp_path / form, form=form)
        found = specomp.load(tmp_path / form).model
        assert torch.allclose(found(TOKENS[:2]).logits, logits, atol=1e-5)
    plain = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert plain[family.mlp.size] == sizes[0]
    assert plain["model_type"] == model.config.model_type.removeprefix("specomp_")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(stock(TOKENS[:2]).logits, logits, atol=1e-5)


def test_what_is_lost_is_what_the_report_says():
    """Of the outputs of down on the calibration tokens, in the norm of their Gram."""
    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    z, W = inputs_of(model, down), down.weight.detach().double()
    made = rows.slot("units", "cut", equal=True)
    report = compressed(model, "svd_llm", units=made)
    line = next(x for x in report.linears if x.name == "model.layers.1.mlp.down_proj")
    part = model.get_submodule(line.name)
    assert isinstance(part, PartLinear) and part.in_features == line.rank < 88
    error = z @ W.T - z[:, part.inputs] @ part.weight.detach().double().T
    assert line.norm_error == pytest.approx(float(error.norm() / (z @ W.T).norm()), rel=1e-3)
    gate = model.get_submodule("model.layers.1.mlp.gate_proj")
    old = tiny_model("llama").get_submodule("model.layers.1.mlp.gate_proj")
    assert torch.equal(gate.weight, old.weight[part.inputs])


def test_copies_of_a_dimension_are_cut_for_nothing():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for x in (layer.mlp.gate_proj, layer.mlp.up_proj):
                x.weight[44:] = x.weight[:44]
    logits = model(TOKENS).logits
    count = sum(x.params for x in family_of(model.config).linears(model))
    half = sum(x.params for u in family_of(model.config).mlps(model) for x in u.linears) / 2
    made = rows.slot("units", "cut", mlp={"ridge": 1e-7, "prior": 0.0})
    compressed(model, ratio=half / count - 1e-6, units=made, whitening="kronecker")
    assert inner_sizes(model) == [44] * len(model.model.layers)
    assert torch.allclose(model(TOKENS).logits, logits, atol=1e-3)


class Given:
    """Evidence: curves of singular values, and losses of the cut by its size."""

    def __init__(self, values, losses):
        self.values, self.found = values, losses

    def singular_values(self, linear):
        return self.values[linear.name]

    def remembered(self, unit, made_by, make):
        return {"losses": self.found, "order": torch.arange(len(self.found) - 1)}

    def norm(self, linear):
        return GramNorm(None)


def mlp(d=12, h=8):
    up = [LinearSpec(f"mlp.{x}", d, h, 0, 2, f"mlp.{x}") for x in ("gate", "up")]
    down = LinearSpec("mlp.down", h, d, 0, 3, "mlp.down")
    return Unit("mlp", "mlp", (*up, down))


def wide_menu(losses, *, comparable=True, scale=1.0):
    unit = mlp()
    values = {x.name: scale * 0.7 ** torch.arange(8.0) for x in unit.linears}
    singles = [Unit(x.name, "linear", (x,)) for x in unit.linears]
    return unit, options(
        singles,
        [Pivoted(max_growth=1.01)],
        Numbers(compression=0.5),
        torch.float32,
        Given(values, losses),
        None,
        {unit: (CUT,)},
        comparable=comparable,
    )


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5, 0.8])
def test_the_best_that_a_price_buys_is_chosen_by_brute_force(budget):
    """Against every split of ranks and every cut."""
    losses = torch.cat([torch.linspace(3, 0.02, 12), torch.zeros(1)]).double()
    unit, menu = wide_menu(losses)
    found = menu[unit].affordable(budget)
    paid = budget * 3 * 12 * 8
    tails = torch.cat([(0.49 ** torch.arange(8.0)).flip(0).cumsum(0).flip(0), torch.zeros(1)])
    price = [r * (20 - r) for r in range(8)] + [96]
    best = min(float(losses[k]) for k in range(1, 12) if 24 * k <= paid)
    for a in range(1, 9):
        for b in range(1, 9):
            for c in range(1, 9):
                if price[a] + price[b] + price[c] <= paid:
                    best = min(best, float(tails[a] + tails[b] + tails[c]))
    # along hulls, so a little may be left on the table between two of their points
    assert float(menu[unit].losses[found]) <= best + 0.05 * float(tails[0])
    assert bool((menu[unit].losses.diff() <= 0).all()) and bool(
        (menu[unit].prices.diff() > 0).all()
    )


def test_a_cut_that_loses_less_is_taken_and_one_that_loses_more_is_not():
    good = torch.cat([torch.full((1,), 3.0), torch.full((11,), 1e-3), torch.zeros(1)]).double()
    unit, menu = wide_menu(good)
    assert menu[unit].choice(menu[unit].affordable(0.5)).form == CUT
    unit, menu = wide_menu(good + 9)
    chosen = menu[unit].choice(menu[unit].affordable(0.5))
    assert isinstance(chosen.form, Apart)
    apart = settled({unit: chosen})
    assert [x.name for x in apart] == ["mlp.gate", "mlp.up", "mlp.down"]
    assert all(isinstance(x.form, Pivoted) or x.form == DENSE for x in apart.values())


def test_what_a_cut_loses_may_count_for_more_or_less():
    losses = torch.cat([torch.linspace(3, 0.02, 12), torch.zeros(1)]).double()
    taken = []
    for scale in (0.1, 1.0, 10.0):
        unit = mlp()
        form = replace(CUT, loss_scale=scale)
        sizes = torch.tensor([2, 7])
        assert torch.equal(form.losses(unit, sizes, Given({}, losses)), scale * losses[sizes])
        values = {x.name: 0.7 ** torch.arange(8.0) for x in unit.linears}
        singles = [Unit(x.name, "linear", (x,)) for x in unit.linears]
        packing, budget = [Pivoted(max_growth=1.01)], Numbers(compression=0.5)
        menu = options(
            singles, packing, budget, torch.float32, Given(values, losses), None,
            {unit: (form,)}, comparable=True,
        )  # fmt: skip
        taken.append(sum(menu[unit].choice(i).form == form for i in range(len(menu[unit]))))
    assert taken[0] > taken[1] > taken[2]


def test_without_gradients_shares_of_energy_are_compared():
    """Losses of other units of measurement: what gate loses says nothing beside what down does."""
    losses = torch.cat([torch.linspace(3, 0.02, 12), torch.zeros(1)]).double()
    unit, menu = wide_menu(losses, comparable=False)
    _, larger = wide_menu(losses * 1e4, comparable=False, scale=100.0)
    one, other = menu[unit], larger[unit]
    assert torch.equal(one.prices, other.prices)
    assert torch.allclose(one.losses * 1e4, other.losses, rtol=1e-6)
    assert one.whole == pytest.approx(float((0.49 ** torch.arange(8.0)).sum()), rel=1e-6)


@dataclass(frozen=True)
class EveryUnit:
    """An allocation: every functional unit at one share of its dimensions, all else dense."""

    share: float
    needs: ClassVar = frozenset()
    compresses: ClassVar = True
    needs_spectra: ClassVar = False

    def __call__(self, menu, share, reads):
        found = {}
        for unit, there in menu.items():
            sizes = {"mlp": unit.linears[-1].n, "value_output": unit.linears[0].m}
            sizes["query_key"] = unit.linears[-1].m // (2 if unit.rotary else 1)
            found[unit] = (
                Choice(there.forms[0], round(self.share * sizes[unit.kind]))
                if unit.kind in sizes
                else there.choice(there.last)
            )
        return found


@pytest.mark.parametrize(
    ("slots", "more"),
    [
        ({"quantizer": "gptq_int4"}, {}),
        ({"quantizer": "rtn_int4"}, {}),
        ({}, {"upstream": "compressed"}),
        ({"refinement": rows.slot("refinement", "block_refine", steps=2)}, {}),
        ({"training": rows.slot("training", "lora", steps=2, rank=2)}, {}),
        ({"training": rows.slot("training", "polish", stages={"polish": {"steps": 2}})}, {}),
    ],
    ids=["gptq", "rtn", "upstream", "refined", "lora", "polish"],
)
@pytest.mark.parametrize("units", ["cut", "cut_all"])
def test_everything_else_works_on_cut_layers(tmp_path, units, slots, more):
    model = tiny_model("llama_gqa")
    if units == "cut_all":
        slots = slots | {"allocation": EveryUnit(0.3)}
    method = specomp.method("specomp", units=units, **slots)
    report = specomp.compress(model, TOKENS, method, 0.6, calibration={"batch_size": 4, **more})
    assert min(inner_sizes(model)) < 88 and report.ledger.measured_retention <= 0.4 + 1e-3
    held = {type(x) for x in model.modules()} & {HeadsOut, HeadsIn, SomeOutputs}
    assert len(held) == (3 if units == "cut_all" else 0)
    counted = {x.name: numbers(parts_of(model.get_submodule(x.name))) for x in report.linears}
    assert {x.name: x.stored for x in report.linears} == counted
    assert sum(counted.values()) == report.ledger.compressed.linear_params
    assert specomp.perplexity(model, TOKENS) < float("inf")
    logits = model(TOKENS[:2]).logits
    specomp.save(model, tmp_path / "model")
    for stream in (False, True):
        found = specomp.load(tmp_path / "model", stream=stream).model
        assert torch.allclose(found(TOKENS[:2]).logits, logits, atol=1e-5)


def test_equal_sizes_are_one_choice_for_all():
    units = tuple(mlp() for _ in range(3))
    every = Unit("mlps", "mlp", tuple(x for u in units for x in u.linears))
    form = Alike(CUT, units)
    losses = torch.arange(12.0, -1, -1).double()
    assert form.losses(every, torch.tensor([2, 5]), Given({}, losses)).tolist() == [30.0, 21.0]
    assert list(form.split(every, 4).values())[0].size == 4


@pytest.mark.parametrize(
    ("name", "slots", "said"),
    [
        ("svd", {}, "Gram matrix of what its last linear"),
        ("asvd", {}, "Gram matrix of what its last linear"),
        ("fwsvd_out", {}, "Gram matrix of what its last linear"),
        ("soco", {}, "method/units=none, or an allocation"),
    ],
)
def test_what_cannot_be_cut_is_said_before_anything_is_run(name, slots, said):
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        compressed(model, name, **slots)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_mlps_of_several_sizes_have_no_plain_architecture(tmp_path):
    model = tiny_model("llama")
    compressed(model)
    if len(set(inner_sizes(model))) == 1:
        pytest.skip("all alike by chance")
    with pytest.raises(UserError, match="method.units.equal=true"):
        specomp.save(model, tmp_path / "model", form="dense")
    assert not (tmp_path / "model").exists()


def test_a_family_that_does_not_say_what_an_mlp_is_keeps_its_linears():
    config = tiny_model("llama").config
    family = replace(family_of(config), mlp=None)
    with pytest.raises(UserError, match=r"mlp=Mlp\(...\)"):
        specomp.method("specomp").units.check_family(family, config)
    specomp.method("svd_llm").units.check_family(family, config)


def test_the_old_row_is_two_overrides_away():
    undamped = rows.method("specomp", units="none", whitening="kronecker")
    both = [rows.method("specomp_low_rank"), undamped]
    assert describe(both[0]) | {"name": ""} == describe(both[1]) | {"name": ""}
    assert (ROOT / "conf/method/units/cut.yaml").is_file()


def only_values(model, share, name="two_sided", ridge=1e-2, **slots):
    made = rows.slot("units", "cut_all", mlp=None, query_key=None, value_output={"ridge": ridge})
    return compressed(model, name, 0.2, units=made, allocation=EveryUnit(share), **slots)


@pytest.mark.parametrize("name", [x for x in FAMILY_NAMES if x != "phi3"])
def test_values_of_few_directions_are_stored_at_that_size_for_nothing(tmp_path, name):
    """Every head's values in a space of three dimensions of eight: found, whatever the basis."""
    model = tiny_model(name)
    with torch.no_grad():
        for unit in units_of(model, "value_output"):
            values = model.get_submodule(unit.linears[0].name)
            values.weight *= 6
            width = values.out_features // unit.heads[1]
            for g in range(unit.heads[1]):
                torch.manual_seed(g)
                basis = torch.linalg.qr(torch.randn(width, 3)).Q
                head = slice(g * width, (g + 1) * width)
                values.weight[head] = basis @ basis.T @ values.weight[head]
                if values.bias is not None:
                    values.bias[head] = basis @ (basis.T @ values.bias[head])
    expected = model(TOKENS[:2]).logits.detach()
    report = only_values(model, 3 / width, ridge=1e-6)
    assert any("fewer dimensions of values" in x for x in report.notes)
    computes_as_before_in_every_form(model, expected, tmp_path)


def test_what_values_lose_is_what_the_report_says():
    model = tiny_model("llama_gqa")
    output = model.model.layers[1].self_attn.o_proj
    ctx, W = inputs_of(model, output), output.weight.detach().double()
    dense = tiny_model("llama_gqa").model.layers[1].self_attn
    report = only_values(model, 0.6, "svd_llm")
    line = next(x for x in report.linears if x.name == "model.layers.1.self_attn.o_proj")
    attention = model.model.layers[1].self_attn
    first, last = attention.v_proj, attention.o_proj
    assert isinstance(first, HeadsOut) and isinstance(last, HeadsIn)
    assert line.stored == last.part.weight.numel() == 32 * 2 * sum(first.sizes)
    # the map from old values to new ones, head by head
    V, kept = dense.v_proj.weight.double(), first.merged_weight().double()
    turn = torch.linalg.lstsq(V.T, kept.T).solution.T
    made = [turn[:8, :8], turn[8:, 8:]]
    per_head = torch.block_diag(made[0], made[0], made[1], made[1])
    error = ctx @ W.T - ctx @ per_head.T @ last.merged_weight().double().T
    assert line.norm_error == pytest.approx(float(error.norm() / (ctx @ W.T).norm()), rel=2e-3)


def only_scores(model, share, name="two_sided", **slots):
    made = rows.slot("units", "cut_all", mlp=None, value_output=None)
    return compressed(model, name, 0.1, units=made, allocation=EveryUnit(share), **slots)


SCORED = [x for x in FAMILY_NAMES if x not in ("phi3", "qwen3")]


@pytest.mark.parametrize("name", SCORED)
def test_queries_and_keys_of_few_dimensions_are_stored_at_that_size_for_nothing(tmp_path, name):
    """Every group scores by two rotary pairs of four, others in each; without positions that
    rotate, by three directions of eight in a basis of its own.
    """
    model = tiny_model(name)
    with torch.no_grad():
        for unit in units_of(model, "query_key"):
            heads, groups = unit.heads
            for x, count in zip(unit.linears, (heads, groups), strict=True):
                linear = model.get_submodule(x.name)
                linear.weight *= 4
                width = linear.out_features // count
                for h in range(count):
                    group = h if count == groups else h // (heads // groups)
                    head = slice(h * width, (h + 1) * width)
                    torch.manual_seed(group)
                    if unit.rotary:
                        here = torch.zeros(width // 2)
                        here[torch.randperm(width // 2)[:2]] = 1
                        P = torch.diag(here.repeat(2))
                    else:
                        basis = torch.linalg.qr(torch.randn(width, 3)).Q
                        P = basis @ basis.T
                    linear.weight[head] = P @ linear.weight[head]
                    if linear.bias is not None:
                        linear.bias[head] = P @ torch.randn(width)
    expected = model(TOKENS[:2]).logits.detach()
    report = only_scores(model, 1 / 2 if unit.rotary else 3 / 8)
    assert any("queries or keys of fewer" in x for x in report.notes)
    computes_as_before_in_every_form(model, expected, tmp_path)


class Seen:
    """Evidence: weights, biases and the norm of every linear."""

    def __init__(self, weights, norms, biases):
        self.weights, self.norms, self.biases = weights, norms, biases

    def weight(self, linear):
        return self.weights[linear.name]

    def norm(self, linear):
        return self.norms[linear.name]

    def bias(self, linear):
        return self.biases.get(linear.name)

    def remembered(self, unit, made_by, make):
        return make()


def scores_of_one_group(*, rotary, bias=False, scale=1.0, width=8):
    """Two heads that share keys, and what they lose: scale is a unit of measurement of the first
    rotary pair, undone in the keys.
    """
    torch.manual_seed(1)
    q, k = (LinearSpec(x, m, 12, 0, 0, x) for x, m in (("q", 2 * width), ("k", width)))
    x = torch.randn(40, 12).double()
    units = torch.ones(width).double()
    units[[0, width // 2]] = scale
    weights = {"q": torch.randn(2, width, 12).double(), "k": torch.randn(width, 12).double()}
    weights["q"] = (weights["q"] * units[:, None]).reshape(-1, 12)
    weights["k"] = weights["k"] / units[:, None]
    grads = {"q": torch.randn(40, 2, width).double() / units, "k": torch.randn(40, width) * units}
    norms = {
        name: TwoSidedNorm(x.T @ x, (g := grads[name].reshape(40, -1).double()).T @ g, 1e-12)
        for name in "qk"
    }
    biases = {"q": torch.randn(2 * width)} if bias else {}
    unit = Unit("scores", "query_key", (q, k), (2, 1), rotary)
    return unit, Seen(weights, norms, biases), (x, weights, norms)


def test_what_a_dropped_pair_loses_is_the_quadratic_form_of_both_sides():
    unit, evidence, (_, weights, norms) = scores_of_one_group(rotary=True)
    found = QueryKey()._order(unit, evidence)
    last = int(found["order"][-1])  # the pair that goes first
    lost = {}
    for name, heads in (("q", 2), ("k", 1)):
        E = torch.zeros_like(weights[name]).reshape(heads, 8, 12)
        W = weights[name].reshape(heads, 8, 12)
        each = 0.0
        for h in range(heads):
            E.zero_()
            E[h, [last, last + 4]] = W[h, [last, last + 4]]
            each += norms[name].loss(E.reshape(-1, 12)) ** 2
        lost[name] = each
    assert float(found["losses"][3]) > 0 and sorted(found["order"].tolist()) == [0, 1, 2, 3]
    assert bool((found["losses"].diff() < 0).all()) and float(found["losses"][-1]) == 0
    ratio = float(found["losses"][3] / found["losses"][0])
    pairs = QueryKey()._order(unit, evidence)["losses"].diff().neg()
    assert ratio == pytest.approx(float(pairs[-1] / pairs.sum()))
    assert (lost["q"] * lost["k"]) ** 0.5 == pytest.approx(float(pairs[-1]), rel=1e-6)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_order_of_pairs_is_independent_of_units_of_measurement(rotary, bias):
    one, other = (
        QueryKey()._order(unit, evidence)
        for unit, evidence, _ in (
            scores_of_one_group(rotary=rotary, bias=bias, scale=s) for s in (1.0, 1e3)
        )
    )
    assert torch.equal(one["order"], other["order"])
    assert torch.allclose(one["losses"], other["losses"], rtol=1e-5)


def test_without_positions_and_gradients_scores_are_the_best_of_their_rank():
    """A3's optimum: sqrt(C_q) sqrt(C_k) truncated."""
    torch.manual_seed(0)
    q, k = (LinearSpec(x, 8, 12, 0, 0, x) for x in "qk")
    x = torch.randn(60, 12).double()
    weights = {n: torch.randn(8, 12).double() * torch.logspace(0, 1, 8)[:, None] for n in "qk"}
    evidence = Seen(weights, dict.fromkeys("qk", GramNorm(x.T @ x)), {})
    found = QueryKey()._order(Unit("scores", "query_key", (q, k), (1, 1)), evidence)
    queries, keys = (x @ weights[n].T for n in "qk")
    B = found["bases"][0]
    whole = torch.linalg.svdvals(queries @ keys.T)
    for size in (2, 4, 6):
        kept = found["order"][:size]
        made = (queries @ B)[:, kept] @ (keys @ torch.linalg.inv(B).T)[:, kept].T
        lost = float((made - queries @ keys.T).norm())
        assert lost == pytest.approx(float(whole[size:].norm()), rel=1e-6)
        assert bool((found["losses"].diff() <= 0).all())


def test_with_biases_the_pair_that_loses_least_goes_first():
    """However little its keys move: what its queries add to a large bias of the keys counts."""
    unit, evidence, (_, weights, _) = scores_of_one_group(rotary=True, bias=True)
    weights["k"][[0, 4]] *= 1e-6
    found = QueryKey()._order(unit, evidence)
    taken = found["losses"].diff().neg()
    assert bool((taken[1:].diff() <= 0).all())


def test_dead_keys_are_stored_for_nothing():
    model = tiny_model("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.k_proj.weight[:8] = 0
            layer.self_attn.k_proj.bias[:8] = 0
    only_scores(model, 0.7)
    assert bool(model(TOKENS[:1]).logits.isfinite().all())


def test_queries_behind_a_norm_are_refused():
    with pytest.raises(UserError, match=r"method.units.query_key=null"):
        only_scores(tiny_model("qwen3"), 0.5)
    with pytest.raises(UserError, match=r"attention=Attention\(...\)"):
        only_scores(tiny_model("phi3"), 0.5)


@pytest.mark.parametrize("quantizer", ["gptq_int4", "rtn_int4"])
@pytest.mark.parametrize(("only", "kind"), [(only_values, "o"), (only_scores, "q")])
def test_attention_goes_on_a_grid(tmp_path, quantizer, only, kind):
    model = tiny_model("llama_gqa")
    report = only(model, 0.6, quantizer=quantizer)
    line = next(x for x in report.linears if x.name == f"model.layers.1.self_attn.{kind}_proj")
    assert 0 < line.quantization_error < 0.5
    logits = model(TOKENS[:2]).logits
    specomp.save(model, tmp_path / "model")
    for stream in (False, True):
        found = specomp.load(tmp_path / "model", stream=stream).model
        assert torch.allclose(found(TOKENS[:2]).logits, logits, atol=1e-5)


def cut_of(**settings):
    return rows.slot("units", "cut", **settings)


@pytest.mark.parametrize("order", ["weighted", "unweighted", "leverage", "random"])
@pytest.mark.parametrize("repair", [True, False])
def test_every_order_loses_what_it_says(order, repair):
    """In the norm of the outputs of down, which is the error of the report."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    made = cut_of(equal=True, mlp={"order": order, "repair": repair, "ridge": 1e-9, "prior": 0.0})
    report = compressed(model, "svd_llm", 0.4, units=made, allocation="global_loss")
    for i, layer in enumerate(model.model.layers):
        was = dense.model.layers[i].mlp.down_proj
        z, W = inputs_of(dense, was), was.weight.detach().double()
        kept, error = layer.mlp.down_proj.inputs, W.clone()
        error[:, kept] -= layer.mlp.down_proj.weight.detach().double()
        line = next(x for x in report.linears if x.name == f"model.layers.{i}.mlp.down_proj")
        assert line.norm_error == pytest.approx(
            float((z @ error.T).norm() / (z @ W.T).norm()), rel=1e-3
        )
        if not repair:
            assert torch.equal(layer.mlp.down_proj.weight, was.weight[:, kept])


def test_near_copies_on_a_half_precision_gram_are_cut():
    """Of which rounding makes an indefinite matrix."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for x in (layer.mlp.gate_proj, layer.mlp.up_proj):
                base = x.weight[:8].repeat(11, 1)
                x.weight.copy_(base * (1 + 0.05 * torch.randn(88, 1)))
    settings = {"batch_size": 4, "precision": "bfloat16"}
    for made in (cut_of(), cut_of(mlp={"ridge": 1e-6, "prior": 0.0})):
        method = specomp.method("svd_llm", units=made)
        report = specomp.compress(copy.deepcopy(model), TOKENS, method, 0.7, calibration=settings)
        assert report.ledger.measured_retention <= 0.3 and all(
            x.norm_error is None or x.norm_error < 1 for x in report.linears
        )


@pytest.mark.parametrize("layer", [0, 2])
def test_mlps_cut_alike_weigh_by_what_all_of_them_are(layer):
    """With shares of energy no decoder layer stands for the others, nor in adaCR."""
    sizes = []
    for scaled in (layer, 1):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[scaled].mlp.down_proj.weight *= 0.1
        allocation = rows.slot("allocation", "global_loss", normalize=True)
        compressed(model, "svd_llm", allocation=allocation, units=cut_of(equal=True))
        sizes.append(inner_sizes(model)[0])
    assert abs(sizes[0] - sizes[1]) <= 12


def test_rank_multiples_hold_inside_mlps_that_are_not_cut():
    model = tiny_model("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for x in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                x.weight.copy_(torch.randn(x.out_features, 9) @ torch.randn(9, x.in_features) * 0.1)
    allocation = rows.slot("allocation", "global_loss", round_to=8)
    report = compressed(model, allocation=allocation)
    ranks = [x.rank for x in report.linears if not x.dense and not x.facts.get("cut")]
    assert ranks and all(r % 8 == 0 for r in ranks)


def test_what_polish_leaves_is_still_said_to_be_cut():
    model = tiny_model("llama_gqa")
    training = rows.slot("training", "polish", stages={"polish": {"steps": 1}})
    report = compressed(model, training=training)
    for x in report.linears:
        if isinstance(model.get_submodule(x.name), torch.nn.Linear) and not x.dense:
            assert x.facts == {"cut": 1.0} and x.norm_error is None


def test_the_dense_row_has_nothing_to_cut():
    model = tiny_model("llama")
    assert specomp.compress(model, TOKENS, specomp.method("dense", units="cut"), 0.5).linears


def test_a_size_that_no_mlp_has_is_refused():
    with pytest.raises(UserError, match="no size that method.units.mlp allows: lower its round_to"):
        compressed(tiny_model("llama"), units=cut_of(mlp={"round_to": 1000}))


def test_mlps_of_several_sizes_are_not_cut_alike():
    with pytest.raises(UserError, match="several sizes"):
        cut_of(equal=True).forms([mlp(12), mlp(16)])


def test_the_code_that_goes_with_cut_attention_needs_nothing_else():
    """Its annotations too: it is run where specomp is not installed."""
    names = {}
    exec(modelling_source("llama", {HeadsOut, HeadsIn, SomeOutputs}), names)
    made = names["HeadsOut"](8, 16, [3, 1], bias=True)
    assert made.merged_weight().shape == (16, 8) and made.bias.shape == (16,)
