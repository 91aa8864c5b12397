"""KL to the dense model and agreement with it: against both models' logits, from a run and from a
folder.
"""

import math
import shutil

import pytest
import torch
from running import compose_config, compose_run
from tiny import tiny_model, tiny_tokenizer
from torch.nn import functional as F

import specomp
from specomp.errors import UserError
from specomp.evaluation import divergence
from specomp.evaluation.divergence import compared
from specomp.experiment.config import ask, build
from specomp.experiment.plan import plan_of
from specomp.models.sources import RandomModel

SVD = ("method=svd", "ratio=cr40")
TEXT = (
    "benchmark=divergence",
    "corpus@benchmark.parts.wikitext2.corpus=pydocs",
    "~benchmark.parts.c4",
    "~benchmark.parts.code",
    "benchmark.window=48",
    "benchmark.max_windows=3",
    "benchmark.batch_size=2",
)


def of(metrics):
    ((name, values),) = [x for x in metrics.items() if x[0].startswith("kl_")]
    assert name.startswith("kl_pydocs@1:48x3:")
    return values


def test_it_is_what_both_models_say(tmp_path):
    """In a run the dense model is at hand; for a folder that is there it is loaded once more."""
    plain = compose_run(tmp_path / "two", *SVD)
    assert not any(x.startswith("kl_") for x in plain.metrics)
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        record = compose_run(folder, *SVD, *TEXT)
        found.append(of(record.metrics))
        dense = of(record.dense_metrics)
        assert dense["kl"] == pytest.approx(0, abs=1e-9) and dense["agreement"] == 1
    assert found[0] == found[1]
    assert found[0]["tokens"] == 144 and found[0]["nonfinite_windows"] == 0

    experiment = build(compose_config(tmp_path / "one", *SVD, *TEXT))
    ((_, part),) = experiment.suite.parts.items()
    ids = part.windows(experiment.tokenizer)
    models = experiment.source.load(experiment.cache).model, specomp.load(record.model_folder).model
    with torch.no_grad():
        p, q = (F.log_softmax(x.eval()(ids).logits.double(), -1) for x in models)
    wanted = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert found[0]["kl"] == pytest.approx(float(wanted), rel=1e-4) and wanted > 1e-3
    same = (p.argmax(-1) == q.argmax(-1)).sum() / 144
    assert found[0]["agreement"] == pytest.approx(float(same), abs=1.5 / 144) and same < 1


def test_the_dense_row_is_at_distance_zero(tmp_path):
    found = of(compose_run(tmp_path, "method=dense", *TEXT).metrics)
    assert found["kl"] == pytest.approx(0, abs=1e-9) and found["agreement"] == 1


def test_what_is_no_number_is_counted(tmp_path, monkeypatch, caplog):
    """And left in the mean, which is none either."""
    sums = iter([(1.0, 48.0), (math.nan, 0.0), (2.0, 24.0)] * 2)
    monkeypatch.setattr(divergence, "compared", lambda *_: next(sums))
    found = of(compose_run(tmp_path, *SVD, *TEXT).metrics)
    assert math.isnan(found["kl"]) and found["nonfinite_windows"] == 1
    assert found["agreement"] == 0.5
    assert "KL not finite in 1 of 3 windows" in caplog.text


def test_by_hand():
    """Two outcomes: p = (3/4, 1/4), q = (1/2, 1/2); and q = p."""
    p, q = torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    kl, same = compared(lambda x: x, p.log(), q.log())
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert same == 2, "of equal ones the first"


def test_what_is_no_number_agrees_with_nothing():
    """The most likely of no numbers is the first one."""
    nan = torch.full((1, 2), math.nan)
    for p, q in ((nan, nan), (nan, torch.zeros(1, 2)), (torch.zeros(1, 2), nan)):
        assert compared(lambda x: x, p, q)[1] == 0
    never = torch.tensor([[0.0, -math.inf]])
    assert compared(lambda x: x, never, never) == (0, 1)


def test_without_an_experiment_it_is_one_line(tmp_path):
    (part,) = ask(compose_config(tmp_path, *SVD, *TEXT)).suite.benchmarks
    with pytest.raises(UserError, match="only an experiment knows"):
        part(tiny_model("llama"), tiny_tokenizer())


def test_only_what_is_missing_needs_the_dense_model(tmp_path, monkeypatch):
    record = compose_run(tmp_path, *SVD, *TEXT)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(
        RandomModel, "load", lambda *_: pytest.fail("the dense model was loaded for nothing")
    )
    again = compose_run(tmp_path, *SVD, *TEXT, "reference=false")
    assert again.metrics == record.metrics


def test_a_plan_counts_the_dense_pass(tmp_path):
    """Also where no dense metrics are asked for."""
    request = ask(compose_config(tmp_path, *SVD, *TEXT, "reference=false"))
    (stage,) = [x for x in plan_of(request).stages if x.name == "evaluate dense"]
    assert stage.detail == "144 tokens"
    compose_run(tmp_path, *SVD, *TEXT)
    kept = list((tmp_path / "cache" / "dense").rglob("*.safetensors"))
    header = 512  # of a file, about
    planned = plan_of(request).compared_cached
    assert planned <= sum(x.stat().st_size for x in kept) <= planned + header * len(kept)
