"""The contract of every method: runs offline, meets its budget, stays finite, keeps shapes, reloads
bit for bit, and is deterministic.
"""

import math

import pytest
import torch
from running import CONF, compose_config
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

import specomp
from specomp.errors import UserError
from specomp.experiment.config import build
from specomp.experiment.pipeline import produce, resume
from specomp.experiment.record import record_key
from specomp.forms.factors import LowRankLinear
from specomp.forms.masked import MaskedLinear
from specomp.forms.pivoted import PivotedLinear
from specomp.forms.prices import numbers
from specomp.models.modules import PartLinear
from specomp.models.save import substitutes
from specomp.slots import describe

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
COMPRESSING = [name for name in METHODS if name != "dense"]
MODELS = {
    "llama": ["model=tiny_llama", "model.config.num_key_value_heads=4"],
    "llama_gqa": ["model=tiny_llama"],
    "opt": ["model=tiny_opt"],
    "qwen2": ["model=tiny_llama", "model.architecture=qwen2"],  # biases on q, k and v only
}
RATIOS = ("cr20", "cr60")
# The search tries every candidate on every linear; V2 divides by log(loss), and losses grow with
# the number of tokens.
EXTRA = {
    "soco": ["method.training.steps_factor=0.02"],
    "asvd_strs": ["method.allocation.candidates=[0.1,0.6]", "calibration.num_samples=2"],
    # 128 products in bfloat16 make a Gram that is not positive definite, which only the Cholesky
    # route minds.
    "svd_llm_cholesky": ["calibration.precision=float32"],
    "svd_llm_v2": [
        "calibration.num_samples=64",
        "calibration.length=128",
        "calibration.batch_size=32",
    ],
}
# Their retention is not a rounding of the target: candidates are coarse.
COARSE = {"asvd_strs"}
IDS = torch.arange(3, 27)[None]


def compressed(folder, *overrides):
    """(experiment, record, model, dense logits, reports of the linears) of one run without
    benchmarks.
    """
    experiment = build(
        compose_config(folder, "benchmark=none", "options.reference=false", *overrides)
    )
    record = resume(experiment, record_key(experiment.identity()))
    dense = logits(experiment.source.load(experiment.cache).model)
    model, _, linears = produce(experiment, record)
    return experiment, record, model, dense, linears


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=MODELS)
def model_name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_name):
    """One cache and one outputs folder per model: methods share statistics and spectra, as in a
    sweep.
    """
    return tmp_path_factory.mktemp(model_name)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", METHODS)
def test_contract(folder, model_name, method, ratio):
    experiment, record, model, dense, linears = compressed(
        folder, *MODELS[model_name], f"method={method}", f"ratio={ratio}", *EXTRA.get(method, [])
    )
    found = logits(model)
    assert found.shape == dense.shape == (1, IDS.shape[1], 259)
    assert torch.isfinite(found).all()
    if method == "dense":
        assert not substitutes(model)
        assert torch.equal(found, dense)
        assert record.counted.measured_retention == 1.0
        assert record.model_folder is None
        return
    loaded = experiment.source.load(experiment.cache)
    units = loaded.family.units(loaded.model)
    specs = {x.name: x for unit in units for x in unit.linears}

    # the budget, on the modules as they are
    target = experiment.ratio.retention
    measured = record.counted.measured_retention
    one_rank_each = sum(x.m + x.n for x in specs.values()) / sum(x.params for x in specs.values())
    assert measured <= target + one_rank_each
    assert method in COARSE or measured >= target - one_rank_each
    packing = experiment.method.packing
    kind = {"factors": LowRankLinear, "pivoted": PivotedLinear, "masked": MaskedLinear}[
        record.counted.packing
    ]
    packings = dict.fromkeys(("specomp", "specomp_low_rank"), "pivoted")
    packings |= dict.fromkeys(("magnitude", "wanda", "sparsegpt"), "masked")
    assert record.counted.packing == packings.get(method, "factors")
    held = sum(
        p.numel()
        for name in specs
        for key, p in model.get_submodule(name).named_parameters()
        if not key.endswith("bias")
    )
    assert measured == pytest.approx(held / sum(x.params for x in specs.values()), abs=1e-12)

    # every linear is reported as it is, low-rank exactly where that saves parameters
    assert [x.name for x in linears] == list(specs)
    for report, unit in zip(linears, units, strict=True):
        (spec,), module = unit.linears, model.get_submodule(report.name)
        if isinstance(module, PartLinear):  # of an MLP that was cut
            assert method == "specomp" and report.facts == {"cut": 1.0} and not report.dense
            assert report.rank in module.weight.shape
            assert report.stored == module.weight.numel() < spec.params
            continue
        assert type(module) is (torch.nn.Linear if report.dense else kind)
        assert report.dense or kind is MaskedLinear or module.rank == report.rank
        price = spec.params if report.dense else numbers(packing.parts(unit, report.rank))
        assert report.stored == price <= spec.params
        assert report.dense is (report.stored == spec.params)
        said = {PivotedLinear: {"growth"}, MaskedLinear: {"density"}}
        assert set(report.facts) == said.get(type(module), set())
        assert report.dense or 0 < report.weight_error < 1.5
    assert not torch.equal(found, dense)
    assert not any(p.requires_grad for p in model.parameters())

    # the folder
    by_specomp = specomp.load(record.model_folder)
    assert (logits(by_specomp.model) - found).abs().max() == 0.0
    by_transformers = AutoModelForCausalLM.from_pretrained(record.model_folder)
    assert (logits(by_transformers) - found).abs().max() == 0.0
    assert by_specomp.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("method", COMPRESSING)
def test_the_same_seed_gives_the_same_ranks_and_weights(tmp_path, method):
    """From nothing, twice: the second run shares no cache with the first."""
    runs = []
    for name in ("first", "second"):
        _, record, model, _, linears = compressed(
            tmp_path / name,
            *MODELS["llama_gqa"],
            f"method={method}",
            "ratio=cr60",
            *EXTRA.get(method, []),
        )
        runs.append((record.key, [x.rank for x in linears], model.state_dict()))
    (key, ranks, state), (other_key, other_ranks, other_state) = runs
    assert key == other_key
    assert ranks == other_ranks
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)


@pytest.mark.parametrize(
    "method", ["svd", "svd_llm", "svd_llm_cholesky", "fwsvd", "fwsvd_out", "asvd", "two_sided"]
)
def test_uniform_methods_reach_the_eckart_young_bound_at_published_ranks(tmp_path, method):
    _, _, _, _, linears = compressed(
        tmp_path,
        f"method={method}",
        "ratio=cr40",
        "model=tiny_opt",
        "calibration.precision=float32",
    )
    for report in linears:
        assert report.rank == math.floor(0.6 * report.m * report.n / (report.m + report.n))
        assert report.loss_over_bound == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "qwen3"])
@pytest.mark.parametrize("method", ["specomp", "two_sided"])
def test_our_rows_in_other_architectures(tmp_path, method, architecture):
    """Fused projections, soft caps, heads that do not divide the width; bfloat16 as models come
    from the hub.
    """
    fields = {
        "gemma2": ["+model.config.head_dim=8", "+model.config.query_pre_attn_scalar=8"],
        "qwen3": ["+model.config.head_dim=8"],
    }
    _, record, model, _, linears = compressed(
        tmp_path,
        *(
            "model=tiny_llama",
            f"model.architecture={architecture}",
            "model.dtype=bfloat16",
            *fields.get(architecture, []),
        ),
        *(f"method={method}", "ratio=cr40"),
    )
    assert any(not x.dense for x in linears)
    assert torch.isfinite(logits(model)).all()
    reloaded = AutoModelForCausalLM.from_pretrained(record.model_folder)
    assert reloaded.dtype == torch.bfloat16
    assert (logits(reloaded) - logits(model)).abs().max() == 0.0


@pytest.mark.parametrize("method", [x for x in COMPRESSING if x != "specomp"])
def test_every_method_can_be_packed_pivoted(tmp_path, method):
    """The same budget buys higher ranks, and the record says which kind of rank it was."""
    settings = [f"method={method}", "ratio=cr40", *EXTRA.get(method, [])]
    _, plain, _, _, pairs = compressed(tmp_path, *settings)
    experiment, record, model, _, linears = compressed(
        tmp_path, *settings, "method/packing=pivoted"
    )
    assert record.key != plain.key
    assert (plain.counted.packing, record.counted.packing) == ("factors", "pivoted")
    target = experiment.ratio.retention
    one_rank_each = sum(x.m + x.n for x in linears) / sum(x.m * x.n for x in linears)
    assert record.counted.measured_retention <= target + one_rank_each
    assert method in COARSE or record.counted.measured_retention >= target - one_rank_each
    assert sum(x.rank for x in linears) > sum(x.rank for x in pairs)
    assert max(x.facts["growth"] for x in linears if not x.dense) <= 2.01
    assert (
        any("pivoted, with coefficients up to" in note for note in record.notes) or method == "soco"
    )
    reloaded = AutoModelForCausalLM.from_pretrained(record.model_folder)
    assert (logits(reloaded) - logits(model)).abs().max() == 0.0


def test_training_starts_from_the_two_sided_spectrum_and_packs_pivoted(tmp_path):
    settings = [
        "method=soco",
        "method/whitening=kronecker",
        "method/packing=pivoted",
        "ratio=cr40",
        *EXTRA["soco"],
    ]
    _, record, model, _, linears = compressed(tmp_path, *settings)
    assert record.counted.measured_retention == pytest.approx(0.6, abs=0.02)
    assert max(x.damping for x in linears) == pytest.approx(1e-2)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("compression", ["cr20", "cr40", "cr60"])
@pytest.mark.parametrize("packing", ["factors", "pivoted"])
def test_global_allocation_uses_its_budget_and_loses_less_than_uniform_ranks(
    tmp_path, compression, packing
):
    """Predicted loss, in the two-sided norm that both share."""
    found = {}
    for allocation in ("uniform", "global_loss"):
        settings = [
            "method=specomp",
            f"method/packing={packing}",
            f"method/allocation={allocation}",
            f"ratio={compression}",
        ]
        _, record, _, _, linears = compressed(tmp_path, *settings, "calibration.precision=float32")
        found[allocation] = (record, linears)
    record, linears = found["global_loss"]
    assert (
        0 <= record.counted.target_retention - record.counted.measured_retention < 2e-3
    )  # one rank of the smallest is 1e-3 here
    assert [x.rank for x in linears] != [x.rank for x in found["uniform"][1]]


def test_compensation_never_makes_its_own_loss_worse(tmp_path):
    for method in ("adasvd", "svd_llm_update"):
        _, _, _, _, linears = compressed(tmp_path, f"method={method}", "ratio=cr60")
        gains = [x.compensation_gain for x in linears if not x.dense]
        assert gains
        assert max(gains) <= 1 + 1e-4
        assert min(gains) < 0.999


def test_whitening_beats_plain_svd_on_what_it_optimizes(tmp_path):
    """Mean loss of all linears in the Gram norm at equal ranks: what truncation-aware whitening is
    for.
    """
    reports = {}
    for method in ("svd", "svd_llm"):
        experiment, _, model, _, _ = compressed(tmp_path, f"method={method}", "ratio=cr60")
        dense = experiment.source.load(experiment.cache).model
        batch = experiment.samples.tokens
        with torch.no_grad():
            reports[method] = float(
                (model(input_ids=batch).logits - dense(input_ids=batch).logits).norm()
            )
    assert reports["svd_llm"] < reports["svd"]


def test_both_whitening_routes_of_svd_llm_agree(tmp_path):
    weights = {}
    settings = [
        "calibration.precision=float32",
        "calibration.num_samples=16",
        "calibration.length=64",
    ]
    for method in ("svd_llm", "svd_llm_cholesky"):
        _, _, model, _, _ = compressed(tmp_path, f"method={method}", "ratio=cr40", *settings)
        weights[method] = {name: x.merged_weight() for name, x in substitutes(model).items()}
    assert weights["svd_llm"].keys() == weights["svd_llm_cholesky"].keys()
    for name, weight in weights["svd_llm"].items():
        assert (weights["svd_llm_cholesky"][name] - weight).norm() <= 1e-3 * weight.norm()


def test_adasvd_without_its_parts_is_svd_llm(tmp_path):
    """A method is a row: the same slots are the same weights, the same record, the same folder."""
    one = compressed(tmp_path, "method=svd_llm")
    other = compressed(
        tmp_path, "method=adasvd", "method/allocation=uniform", "method/compensation=none"
    )
    assert one[1].key == other[1].key
    assert describe(one[0].method) | {"name": None} == describe(other[0].method) | {"name": None}
    assert torch.equal(logits(one[2]), logits(other[2]))


def test_v2_refuses_losses_that_its_formula_cannot_take(tmp_path):
    with pytest.raises(UserError, match=r"SVD-LLM V2 divides by log\(loss\).*more tokens"):
        compressed(
            tmp_path, "method=svd_llm_v2", "model.config.initializer_range=0.001", "ratio=cr20"
        )


def test_cholesky_says_which_gram_it_could_not_factorize(tmp_path):
    with pytest.raises(
        UserError,
        match=(
            r"model\.decoder\.layers\.\d\.\S+: Gram matrix \(\d+ x \d+\) is not positive"
            r" definite.*precision=float32"
        ),
    ):
        compressed(
            tmp_path,
            "method=svd_llm_cholesky",
            "model=tiny_opt",
            "calibration.num_samples=1",
            "calibration.length=8",
            "method.whitening.max_damping=1e-8",
        )


def test_search_refuses_a_target_that_no_candidate_reaches(tmp_path):
    with pytest.raises(UserError, match="add lower values to method.allocation.candidates"):
        compressed(
            tmp_path,
            "method=asvd_strs",
            "ratio=cr60",
            "method.allocation.candidates=[0.9]",
            "calibration.num_samples=1",
        )


@pytest.mark.parametrize("method", ["svd", "svd_llm", "adasvd", "specomp"])
def test_nothing_removed_leaves_the_model_as_it_is(tmp_path, method):
    """ratio=dense with any method: every rank is at or above break-even, so every linear stays."""
    _, record, model, dense, linears = compressed(tmp_path, f"method={method}", "ratio=dense")
    assert all(x.dense for x in linears)
    assert record.counted.measured_retention == 1.0
    assert torch.equal(logits(model), dense)
