"""A spectrum trained after a compensation: the components are those of what was stored, the linears
keep their ranks and their price.
"""

import pytest
import torch
from command import typed
from running import compose_config, compose_run, make_run, store
from test_block_refine import REFINE
from test_stages import method, ranks_of, run_method
from torch import nn

import specomp.compression.loop
from specomp.cache import Cache
from specomp.compression.calibrate import calibrate
from specomp.compression.run import Run
from specomp.compression.spectra import StoredSpectra
from specomp.errors import UserError
from specomp.experiment import pipeline
from specomp.experiment.config import ask
from specomp.experiment.plan import plan_of
from specomp.forms.factors import Factors
from specomp.forms.pivoted import Pivoted

COMMON = ["method=specomp", "ratio=cr40", "benchmark=none", "save=false"]
REFINED = [
    *COMMON,
    "method/units=none",
    "method/refinement=block_refine",
    "method.refinement.steps=3",
]
STILL = ["method.training.learning_rate=1e-12", "method.training.learning_rate_deviation=1e-12"]
POLISH = [
    "method/training=polish",
    "method.training.stages.polish.steps=6",
    "method.training.precision=float32",
]


def stored_spectra(folder, family_name: str, rank: int = 6, **slots) -> tuple[Run, StoredSpectra]:
    """A run whose model is compressed but for its first linear, and the spectra of what it
    stores.
    """
    sizes = {"num_samples": 12, "length": 32, "batch_size": 4}
    run = make_run(family_name, Cache(folder), method=method(**slots), **sizes)
    statistics, dense = calibrate(run), run.linears[0]
    ranks = ranks_of(run, rank) | {dense.name: min(dense.m, dense.n)}
    run_method(run, run.method, ranks=ranks)
    return run, StoredSpectra(run, statistics)


@pytest.mark.parametrize("family_name", ["llama_gqa", "opt"])
@pytest.mark.parametrize(
    "packing", [Factors(), Pivoted(max_growth=2.0)], ids=["factors", "pivoted"]
)
def test_the_components_are_those_of_the_stored_weights(tmp_path, family_name, packing):
    run, spectra = stored_spectra(tmp_path, family_name, packing=packing, refinement=REFINE)
    for linear in run.linears:
        module, spectrum = run.model.get_submodule(linear.name), spectra(linear)
        dense = isinstance(module, nn.Linear)
        weight, rank = (
            (module.weight, min(linear.m, linear.n)) if dense else (module.merged_weight(), 6)
        )
        torch.testing.assert_close(
            spectrum.U[:, :rank] @ spectrum.rows[:rank], weight.detach(), rtol=1e-4, atol=1e-5
        )
        assert dense or spectrum.tail(rank) < 1e-3 * float(spectrum.s[0])
    assert sum(isinstance(run.model.get_submodule(x.name), nn.Linear) for x in run.linears) == 1


def test_they_are_cached_by_the_numbers_that_are_stored(tmp_path):
    _, spectra = stored_spectra(tmp_path, "llama", refinement=REFINE)
    run, again = stored_spectra(tmp_path, "llama", refinement=REFINE)
    _, plain = stored_spectra(tmp_path, "llama")
    assert spectra.key == again.key != plain.key
    with torch.no_grad():
        next(run.model.get_submodule(run.linears[-1].name).parameters()).view(-1)[0] += 1e-3
    assert StoredSpectra(run, again.statistics).key != again.key


def test_a_training_that_moves_nothing_leaves_the_repaired_model(tmp_path, monkeypatch):
    """So a gate is a factor on a component of the repaired weight, and nothing else has changed on
    the way.
    """
    found = {}

    def keep(model, *args, **options):
        found[len(found)] = model
        return original(model, *args, **options)

    original = specomp.compression.loop.measure
    monkeypatch.setattr(specomp.compression.loop, "measure", keep)
    compose_run(tmp_path, *REFINED)
    refined = found[len(found) - 1]
    record = compose_run(tmp_path, *REFINED, *POLISH, *STILL)
    trained = found[len(found) - 1]
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        before, after = refined(input_ids=ids).logits, trained(input_ids=ids).logits
    assert float((after - before).norm() / before.norm()) < 1e-3, (
        "rounding, in directions that the norm hardly sees"
    )
    balance = record.counted
    assert balance.measured_retention == pytest.approx(balance.target_retention, abs=0.02)


def test_training_brings_the_refined_model_closer(tmp_path):
    plain = compose_run(tmp_path, *REFINED)
    common = [
        *REFINED,
        *POLISH,
        "method.training.num_samples=40",
        "method.training.stages.polish.steps=38",
    ]
    record = compose_run(
        tmp_path,
        *common,
        "method.training.learning_rate=0.01",
        "method.training.learning_rate_deviation=0.0005",
    )
    still = compose_run(tmp_path, *common, *STILL)
    assert record.status == "ok" and record.training["samples"] == 40 and plain.training == {}
    kl, before = (x.training["phases"][0]["kl"] for x in (record, still))
    assert kl < 0.95 * before, "of the samples that it was not trained on"
    # No component is lost, and only the biases d are stored besides.
    assert column(tmp_path, record.key, "linears.csv", "stored") == column(
        tmp_path, plain.key, "linears.csv", "stored"
    )
    assert column(tmp_path, record.key, "linears.csv", "rank") == column(
        tmp_path, plain.key, "linears.csv", "rank"
    )
    gains = column(tmp_path, record.key, "linears.csv", "compensation_gain")
    assert gains == column(tmp_path, plain.key, "linears.csv", "compensation_gain")
    assert not any("before the block refinement" in note for note in record.notes), (
        "errors are those of what is stored in the end"
    )
    assert any("pivoted" in note for note in record.notes)


def column(folder, key: str, suffix: str, name: str) -> list[str]:
    header, *rows = store(folder).companion(key, suffix).read_text().splitlines()
    return [row.split(",")[header.split(",").index(name)] for row in rows]


def test_after_a_closed_form_repair_too_and_rounded_once(tmp_path):
    common = ["method=adasvd", "ratio=cr40", "benchmark=none", "save=false", *POLISH]
    exact = compose_run(tmp_path, *common)
    record = compose_run(tmp_path, *common, "quantizer=rtn_int4")
    assert record.cache["hits"]["trained"] == 1, "what is rounded afterwards was trained already"
    errors = [
        float(x) for x in column(tmp_path, record.key, "linears.csv", "quantization_error") if x
    ]
    assert errors and all(0 < x < 1 for x in errors)
    assert record.counted.compensation_gain == exact.counted.compensation_gain < 1


def test_the_command_resumes_from_the_cache(tmp_path):
    first = typed(tmp_path, "debug=tiny", *REFINED, *POLISH)
    assert first.returncode == 0, first.stderr
    (record,) = store(tmp_path).all()
    store(tmp_path).path(record.key).unlink()
    again = typed(tmp_path, "debug=tiny", *REFINED, *POLISH)
    assert again.returncode == 0, again.stderr
    (second,) = store(tmp_path).all()
    assert second.cache["hits"]["trained"] == 1 and second.ledger == record.ledger


@pytest.mark.parametrize(
    ("slot", "choice"), [("refinement", "block_refine"), ("compensation", "adacomp")]
)
def test_where_nothing_is_truncated_there_is_nothing_to_repair(tmp_path, monkeypatch, slot, choice):
    monkeypatch.setattr(pipeline, "load_dense", lambda *_: pytest.fail("loaded"))
    said = f"nothing to repair: use method/{slot}=none, or an allocation that truncates"
    with pytest.raises(UserError, match=said):
        pipeline.run(compose_config(tmp_path, "method=soco", f"method/{slot}={choice}"))


def test_a_plan_compresses_first(tmp_path):
    asked = (REFINED, COMMON + POLISH, REFINED + POLISH)
    refined, trained, both = (plan_of(ask(compose_config(tmp_path, *x))) for x in asked)
    assert trained.route.stages[-3:] == ("allocate", "train", "compress")
    assert both.route.stages[-4:] == ("train", "compress", "train", "compress"), "the teacher first"
    flops = [{x.name: x.work.flops for x in plan.stages} for plan in (refined, trained, both)]
    assert flops[2]["train"] == pytest.approx(flops[1]["train"] - trained.spectra().flops)
    assert flops[2]["compress"] > flops[0]["compress"]
    assert both.compressed == trained.compressed
