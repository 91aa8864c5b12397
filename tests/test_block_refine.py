"""Block refinement: packed decoder layers come closer to the dense ones, cost nothing, and never
get worse.
"""

import dataclasses

import pytest
import torch
from running import compose_config, compose_run, key_of, make_run
from test_stages import method, ranks_of, run_method

from specomp.cache import Cache
from specomp.errors import UserError
from specomp.experiment import pipeline
from specomp.forms.factors import Factors
from specomp.forms.pivoted import Pivoted
from specomp.methods.block_refine import BlockRefine, output_loss

REFINE = BlockRefine(steps=30, learning_rate=0.01, warmup=0.1, learning_rate_final=0.1)


def final_error(folder, family_name: str = "llama", **slots) -> float:
    """Relative error of the compressed model's last hidden states on the calibration set."""
    run = make_run(family_name, Cache(folder), num_samples=12, length=32, batch_size=4)
    with torch.no_grad():
        dense = run.family.decoder(run.model)(input_ids=run.samples.tokens).last_hidden_state
        run_method(run, method(**slots), ranks=ranks_of(run, 6))
        own = run.family.decoder(run.model)(input_ids=run.samples.tokens).last_hidden_state
    return float((own - dense).norm() / dense.norm())


@pytest.mark.parametrize("family_name", ["llama", "opt"])
@pytest.mark.parametrize(
    "packing", [Factors(), Pivoted(max_growth=2.0)], ids=["factors", "pivoted"]
)
def test_it_brings_the_model_closer(tmp_path, family_name, packing):
    plain = final_error(tmp_path / "plain", family_name, packing=packing)
    refined = final_error(tmp_path / "refined", family_name, packing=packing, refinement=REFINE)
    assert refined < 0.9 * plain


def test_each_decoder_layer_says_what_it_gained_and_nothing_is_trainable(tmp_path):
    run = make_run("llama", Cache(tmp_path), num_samples=12, length=32, batch_size=4)
    reports = run_method(run, method(refinement=REFINE), ranks=ranks_of(run, 6))
    by_layer = {x.name.split(".")[2]: x.compensation_gain for x in reports}
    assert len(by_layer) == len(run.layers) and all(0 < gain < 1 for gain in by_layer.values())
    assert not any(p.requires_grad or p.grad is not None for p in run.model.parameters())


@pytest.mark.parametrize("rank", [2, 8, 14])
def test_one_rate_serves_decoder_layers_that_are_nearly_right_and_far_off(tmp_path, rank, caplog):
    """The rate is a multiple of the error: everywhere the fit helps."""
    run = make_run("llama", Cache(tmp_path), num_samples=12, length=32, batch_size=4)
    reports = run_method(
        run, method(refinement=REFINE, packing=Pivoted(max_growth=2.0)), ranks=ranks_of(run, rank)
    )
    assert max(x.compensation_gain for x in reports if not x.dense) < 0.97
    assert "was put back" not in caplog.text


def test_a_fit_that_makes_it_worse_is_put_back(tmp_path, caplog):
    wild = dataclasses.replace(REFINE, learning_rate=10.0, learning_rate_final=1.0)
    plain, after = (
        final_error(tmp_path / name, refinement=x)
        for name, x in (("plain", method().refinement), ("wild", wild))
    )
    assert after == pytest.approx(plain, rel=1e-6)
    assert "was put back" in caplog.text


@pytest.mark.parametrize(
    "packing", [Factors(), Pivoted(max_growth=2.0)], ids=["factors", "pivoted"]
)
def test_an_interrupted_refinement_goes_on_behind_the_last_finished_decoder_layer(
    tmp_path, monkeypatch, packing
):
    """And gives the model that it would have given at once."""
    real, fitted = BlockRefine.__call__, []

    def interrupted(self, index, *given):
        if index == 1 and not fitted.count(1):
            fitted.append(1)
            raise KeyboardInterrupt
        fitted.append(index)
        return real(self, index, *given)

    def refined_model(folder):
        run = make_run("opt", Cache(folder), num_samples=12, length=32, batch_size=4)
        reports = run_method(
            run, method(refinement=REFINE, packing=packing), ranks=ranks_of(run, 6)
        )
        return run, {x.name: x.compensation_gain for x in reports}, run.model.state_dict()

    _, gains, at_once = refined_model(tmp_path / "other")
    monkeypatch.setattr(BlockRefine, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refined_model(tmp_path / "cache")
    assert fitted == [0, 1]
    run, resumed_gains, resumed = refined_model(tmp_path / "cache")
    assert fitted == [0, 1, *range(1, len(run.layers))]
    assert run.cache.hits["refined"] == 1 and resumed_gains == gains
    assert resumed.keys() == at_once.keys() and all(
        torch.equal(resumed[name], at_once[name]) for name in resumed
    )


def test_other_ranks_in_a_shared_cache_are_refined_anew(tmp_path):
    """To the weights that an empty cache gives."""
    weights = []
    for rank, folder in ((6, "shared"), (4, "shared"), (4, "own")):
        run = make_run("opt", Cache(tmp_path / folder), num_samples=8, length=32, batch_size=4)
        run_method(run, method(refinement=REFINE), ranks=ranks_of(run, rank))
        weights.append(run.model.state_dict())
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[2])


def test_what_is_trained_on_top_shares_the_refined_decoder_layers(tmp_path):
    """Packed as factors too, where a training reads complete spectra that nothing else needs."""
    common = (
        "method=two_sided",
        "method/refinement=block_refine",
        "method.refinement.steps=2",
        "ratio=cr40",
        "benchmark=none",
    )
    plain, trained, more = (
        compose_run(tmp_path, *common, *typed, "save=false")
        for typed in (
            ["method/training=none"],
            [
                "method/training=polish",
                "method.training.stages.polish.steps=2",
                "method.training.num_samples=30",
            ],
            ["method.refinement.steps=3"],
        )
    )
    layers = plain.cache["misses"]["refined"]
    assert "refined" not in plain.cache["hits"]
    assert trained.cache["hits"]["refined"] == layers and "refined" not in trained.cache["misses"]
    assert more.cache["misses"]["refined"] == layers, "other steps, another model"


def test_as_a_compensation_it_is_the_refinement(tmp_path):
    keys = set()
    for slot in ("compensation", "refinement"):
        typed = ["method=svd_llm", f"method/{slot}=block_refine", "method.refinement.steps=2"]
        keys.add(key_of(compose_config(tmp_path, *typed)))
    assert len(keys) == 1


def test_half_precision_models_are_fitted_in_float32_and_stored_as_they_were(tmp_path):
    record = compose_run(
        tmp_path,
        "method=svd_llm",
        "method/refinement=block_refine",
        "model.dtype=bfloat16",
        "ratio=cr60",
    )
    assert record.status == "ok"
    assert record.counted.compensation_gain < 1
    plain = compose_run(tmp_path, "method=svd_llm", "model.dtype=bfloat16", "ratio=cr60")
    assert record.counted.compressed == plain.counted.compressed, "it costs nothing"
    assert any("before the block refinement" in note for note in record.notes)


def test_the_loss_is_relative_per_token():
    wanted = torch.randn(2, 5, 8)
    assert float(output_loss(wanted, wanted)) == 0
    assert float(output_loss(2 * wanted, wanted)) == pytest.approx(1)
    scaled = wanted * torch.logspace(0, 3, 5)[:, None]  # massive tokens count as others do
    assert float(output_loss(1.1 * scaled, scaled)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["method=svd_llm", "quantizer=rtn_int4", "save=false"], "off the grid"),
        (["method=soco"], "method/refinement=none"),
        (["method=soco", "method/compensation=adacomp"], "method/compensation=none"),
    ],
)
def test_what_it_cannot_be_combined_with_is_said_before_any_work(tmp_path, typed, message):
    with pytest.raises(UserError, match=message):
        pipeline.run(compose_config(tmp_path, *typed, "method/refinement=block_refine"))
