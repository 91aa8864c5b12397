"""Whole runs: what is done once, what is done again, what a key depends on, and what stays after a
failure.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from command import typed
from running import compose_config, compose_run, key_of, store, stored_record
from transformers import AutoModelForCausalLM

from specomp.errors import UserError
from specomp.evaluation.perplexity import Perplexity
from specomp.experiment.config import build
from specomp.experiment.pipeline import run
from specomp.models.sources import RandomModel

SVD = ["method=svd", "ratio=cr40"]


@pytest.fixture
def loads(monkeypatch):
    """Names of the models whose weights were drawn."""
    names = []
    original = RandomModel.load

    def counted(self, cache):
        names.append(self.name)
        return original(self, cache)

    monkeypatch.setattr(RandomModel, "load", counted)
    return names


@pytest.fixture
def evaluations(monkeypatch):
    """Ids of the perplexities that were measured, and whether on a compressed model."""
    measured = []
    original = Perplexity.__call__

    def counted(self, model, tokenizer):
        measured.append(
            (
                self.id,
                any(
                    "v_proj.weight" in name and "u_proj" not in name
                    for name in model.state_dict()
                    if "proj.v_proj" in name
                ),
            )
        )
        return original(self, model, tokenizer)

    monkeypatch.setattr(Perplexity, "__call__", counted)
    return measured


def contents(folder):
    """Every record as stored."""
    return {path.name: path.read_text() for path in store(folder).folder.glob("*.json")}


# --- one run --------------------------------------------------------------------------------------


def test_a_run_leaves_a_complete_record(tmp_path):
    record = compose_run(tmp_path, *SVD)
    assert record.status == "ok"
    assert record.error is None
    assert record.choices["method"] == "svd"
    assert record.choices["ratio"] == "cr40"
    assert record.choices["method/whitening"] == "none"
    assert record.config["ratio"]["compression"] == 0.4
    assert {"method=svd", "ratio=cr40"} <= set(record.config["overrides"])
    assert record.calibration["samples"] == 4
    assert record.calibration["hash"]
    assert record.counted.target_retention == pytest.approx(0.6)
    assert 0.5 < record.counted.measured_retention <= 0.6
    assert record.counted.num_linears == 21
    assert record.counted.num_dense == 0
    (values,) = record.metrics.values()
    (dense,) = record.dense_metrics.values()
    assert record.metrics.keys() == record.dense_metrics.keys()
    assert values["ppl"] > 1
    assert dense["ppl"] > 1
    assert dense["ppl"] != values["ppl"]
    assert {"load", "calibrate", "allocate", "compress", "save", "evaluate"} <= set(record.seconds)
    assert record.provenance["packages"]["torch"]
    assert record.provenance["device"] == "cpu"
    assert any("measured retention" in note for note in record.notes)
    with (store(tmp_path).folder / f"{record.key[:12]}.linears.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21
    for row in rows:  # the plain SVD: its sampled spectrum starts at 1 and only falls
        values = [float(x) for x in row["spectrum"].split()]
        assert values[0] == 1 and values == sorted(values, reverse=True)
    assert (
        json.loads(
            (
                tmp_path
                / "outputs"
                / "models"
                / f"tiny_llama-svd-cr40-{record.key[:12]}"
                / "specomp.json"
            ).read_text()
        )["record"]
        == record.key
    )


def test_the_return_value_is_the_first_metric(tmp_path):
    cfg = compose_config(tmp_path, *SVD)
    value = run(cfg)
    assert value == next(iter(next(iter(stored_record(tmp_path, cfg).metrics.values())).values()))
    assert run(compose_config(tmp_path, *SVD)) == value


def test_the_terminal_shows_dense_beside_compressed(tmp_path, capsys):
    record = compose_run(tmp_path, *SVD)
    out = capsys.readouterr().out
    assert "tiny_llama, svd, compression 40%" in out
    assert record.key[:12] in out


def test_without_benchmarks(tmp_path, evaluations):
    assert run(compose_config(tmp_path, *SVD, "benchmark=none")) is None
    (record,) = [x for x in store(tmp_path).all() if x.choices["method"] == "svd"]
    assert record.status == "ok"
    assert record.metrics == {}
    assert evaluations == []


def test_the_dense_row(tmp_path, loads):
    record = compose_run(tmp_path, "method=dense")
    assert record.counted.measured_retention == 1.0
    assert record.counted.target_compression == 0.0
    assert record.model_folder is None
    assert not (tmp_path / "outputs" / "models").exists()
    assert loads == ["tiny_llama"]
    assert compose_run(tmp_path, "method=dense", "ratio=cr80").key == record.key, (
        "its ratio is ignored"
    )
    assert loads == ["tiny_llama"]


# --- resuming -------------------------------------------------------------------------------------


def test_the_second_run_does_nothing(tmp_path, monkeypatch, evaluations):
    first = compose_run(tmp_path, *SVD)
    before, done = contents(tmp_path), len(evaluations)
    stamps = {path: path.stat().st_mtime_ns for path in store(tmp_path).folder.glob("*.json")}

    def refuse(self, cache):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(RandomModel, "load", refuse)
    monkeypatch.setattr("specomp.experiment.pipeline.load_folder", refuse)
    assert compose_run(tmp_path, *SVD) == first
    assert contents(tmp_path) == before
    assert {
        path: path.stat().st_mtime_ns for path in store(tmp_path).folder.glob("*.json")
    } == stamps
    assert len(evaluations) == done


def test_a_new_benchmark_joins_the_record_without_recompressing(tmp_path, loads, evaluations):
    first = compose_run(tmp_path, *SVD)
    weights = Path(first.model_folder) / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    loads.clear()
    evaluations.clear()
    second = compose_run(tmp_path, *SVD, "benchmark.window=16")
    assert second.key == first.key
    assert len(second.metrics) == 2
    assert first.metrics.items() <= second.metrics.items()
    assert second.provenance == first.provenance
    assert second.seconds["compress"] == first.seconds["compress"], "not compressed again"
    assert second.model_folder == first.model_folder and weights.stat().st_mtime_ns == stamp
    assert set(second.metrics) <= set((weights.parent / "README.md").read_text().split())
    (new,) = second.metrics.keys() - first.metrics.keys()
    assert (new, True) in evaluations
    assert second.dense_metrics.keys() == second.metrics.keys(), (
        "options.reference asks for the dense model's number too"
    )
    assert sorted(evaluations) == [(new, False), (new, True)]
    assert next(iter(first.metrics)) not in [name for name, _ in evaluations]


def test_a_benchmark_measured_on_the_saved_folder_equals_one_measured_at_once(tmp_path):
    at_once = compose_run(tmp_path / "a", *SVD, "benchmark.window=16")
    compose_run(tmp_path / "b", *SVD)
    later = compose_run(tmp_path / "b", *SVD, "benchmark.window=16")
    assert at_once.metrics.items() <= later.metrics.items()


def test_redo_does_everything_again(tmp_path, loads, evaluations):
    first = compose_run(tmp_path, *SVD)
    loads.clear()
    evaluations.clear()
    second = compose_run(tmp_path, *SVD, "options.redo=true")
    assert loads == ["tiny_llama"]
    assert [compressed for _, compressed in evaluations] == [True], (
        "the dense reference is shared, not redone"
    )
    assert second.metrics == first.metrics
    assert second.key == first.key


def test_redo_keeps_nothing_of_a_benchmark_it_does_not_run(tmp_path):
    compose_run(tmp_path, *SVD, "benchmark.window=16")
    second = compose_run(tmp_path, *SVD, "options.redo=true")
    assert len(second.metrics) == 1


def test_a_deleted_model_folder_is_made_again(tmp_path, evaluations):
    first = compose_run(tmp_path, *SVD)
    state = AutoModelForCausalLM.from_pretrained(first.model_folder).state_dict()
    shutil.rmtree(first.model_folder)
    evaluations.clear()
    second = compose_run(tmp_path, *SVD)
    assert second.metrics == first.metrics
    assert evaluations == [], "its numbers are known"
    again = AutoModelForCausalLM.from_pretrained(second.model_folder).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_without_saving_no_folder_and_still_resumable(tmp_path, loads):
    first = compose_run(tmp_path, *SVD, "options.save=false")
    assert first.model_folder is None
    assert not (tmp_path / "outputs" / "models").exists()
    loads.clear()
    assert compose_run(tmp_path, *SVD, "options.save=false") == first
    assert loads == []
    later = compose_run(tmp_path, *SVD, "options.save=false", "benchmark.window=16")
    assert len(later.metrics) == 2
    assert loads == ["tiny_llama"], "nothing was kept to measure, so it is compressed again"


def test_the_dense_export_is_a_plain_model_of_the_same_numbers(tmp_path):
    factors = compose_run(tmp_path, *SVD)
    dense = compose_run(tmp_path, *SVD, "options.export=dense")
    assert dense.key == factors.key
    assert dense.metrics == factors.metrics
    folder = f"{factors.model_folder}-dense"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        difference = (
            (
                model(ids).logits
                - AutoModelForCausalLM.from_pretrained(factors.model_folder)(ids).logits
            )
            .abs()
            .max()
        )
    assert difference < 1e-4


# --- dense reference ------------------------------------------------------------------------------


def test_the_dense_reference_is_measured_once(tmp_path, evaluations):
    records = [
        compose_run(tmp_path, f"method={method}", f"ratio={ratio}")
        for method in ("svd", "svd_llm")
        for ratio in ("cr20", "cr60")
    ]
    assert [compressed for _, compressed in evaluations] == [False, True, True, True, True]
    assert all(record.dense_metrics == records[0].dense_metrics for record in records)
    dense = compose_run(tmp_path, "method=dense", "ratio=dense")
    assert dense.metrics == records[0].dense_metrics
    assert len(evaluations) == 5, "the dense row is the shared reference"
    assert dense.choices["method"] == "dense"


def test_the_dense_row_first_serves_as_the_reference(tmp_path, evaluations):
    dense = compose_run(tmp_path, "method=dense")
    record = compose_run(tmp_path, *SVD)
    assert record.dense_metrics == dense.metrics
    assert [compressed for _, compressed in evaluations] == [False, True]


def test_no_reference_when_not_asked_for(tmp_path, evaluations):
    record = compose_run(tmp_path, *SVD, "options.reference=false")
    assert record.dense_metrics == {}
    assert [compressed for _, compressed in evaluations] == [True]
    assert len(contents(tmp_path)) == 1


# --- failures -------------------------------------------------------------------------------------


def test_a_failed_run_says_why_and_is_tried_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("specomp.compression.module.compress", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            compose_run(tmp_path, *SVD)
    cfg = compose_config(tmp_path, *SVD)
    record = stored_record(tmp_path, cfg)
    assert record.status == "failed"
    assert record.error == "RuntimeError: no luck"
    assert record.ledger is None
    with pytest.raises(
        UserError, match=r"failed before \(RuntimeError: no luck\) and options.retry=false"
    ):
        compose_run(tmp_path, *SVD, "options.retry=false")
    assert stored_record(tmp_path, cfg).error == "RuntimeError: no luck", (
        "a refusal is not a new failure"
    )
    again = compose_run(tmp_path, *SVD)
    assert again.status == "ok"
    assert again.error is None
    assert len(again.metrics) == 1


def fail(*args, **options):
    raise RuntimeError("no luck\nmore about it")


def test_an_error_for_the_user_is_recorded_too(tmp_path):
    with pytest.raises(UserError, match="lower ratio.compression"):
        compose_run(tmp_path, "method=svd", "ratio.compression=0.9999")
    (record,) = [x for x in store(tmp_path).all() if x.choices["method"] == "svd"]
    assert record.status == "failed"
    assert "lower ratio.compression" in record.error


def test_a_failing_benchmark_keeps_the_compressed_model(tmp_path, monkeypatch, loads):
    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "__call__", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            compose_run(tmp_path, *SVD, "options.reference=false")
    record = stored_record(tmp_path, compose_config(tmp_path, *SVD))
    assert record.status == "failed"
    assert record.counted.num_linears == 21
    loads.clear()
    again = compose_run(tmp_path, *SVD, "options.reference=false")
    assert again.status == "ok"
    assert len(again.metrics) == 1
    assert loads == [], "evaluated from the saved folder"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_benchmark_keeps_the_finished_ones(
    tmp_path, monkeypatch, evaluations, interruption
):
    """Three perplexities, the second interrupted: the first is kept, the others are run by the same
    command.
    """
    suite = [
        "+corpus@benchmark.parts.{0}.corpus=pydocs",
        "+benchmark/part@benchmark.parts.{0}=perplexity",
        "benchmark.parts.{0}.name={0}",
    ]
    overrides = [
        *SVD,
        "options.reference=false",
        *(x.format(name) for name in ("second", "third") for x in suite),
    ]
    original = Perplexity.__call__

    def interrupt(self, model, tokenizer):
        if self.name == "second":
            raise interruption("now")
        return original(self, model, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "__call__", interrupt)
        with pytest.raises(interruption):
            compose_run(tmp_path, *overrides)
    cfg = compose_config(tmp_path, *overrides)
    record = stored_record(tmp_path, cfg)
    assert [name.split("@")[0] for name in record.metrics] == ["pydocs"]
    assert record.status == ("running" if interruption is KeyboardInterrupt else "failed")
    evaluations.clear()
    again = compose_run(
        tmp_path,
        *overrides,
        *(["options.retry=false"] if interruption is KeyboardInterrupt else []),
    )
    assert again.status == "ok"
    assert again.error is None
    assert [name.split("@")[0] for name, _ in evaluations] == ["second", "third"]
    assert [name.split("@")[0] for name in again.metrics] == ["pydocs", "second", "third"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("specomp.experiment.pipeline.save_compressed", full)
    with pytest.raises(UserError, match=r"paths.cache .* elsewhere") as caught:
        compose_run(tmp_path, *SVD)
    assert "\n" not in str(caught.value)


def test_whatever_is_wrong_with_a_context_is_said_before_loading(tmp_path, no_weights_read):
    with pytest.raises(UserError, match="context of 256"):
        compose_run(tmp_path, *SVD, "calibration.length=300")
    with pytest.raises(UserError, match="256"):
        compose_run(tmp_path, *SVD, "benchmark.window=300")
    assert not store(tmp_path).folder.exists()


def test_a_gradient_whitening_on_compressed_inputs_is_refused_before_loading(
    tmp_path, no_weights_read
):
    with pytest.raises(UserError, match=r"calibration\.upstream=dense"):
        compose_run(tmp_path, "method=fwsvd", "calibration.upstream=compressed")


@pytest.mark.parametrize(
    "method", ["svd_llm", "svd_llm_v2", "svd_llm_update", "adasvd", "asvd", "asvd_strs"]
)
def test_every_activation_method_runs_on_compressed_inputs(tmp_path, method):
    extra = (
        ["method.allocation.candidates=[0.2]", "calibration.num_samples=1"]
        if method == "asvd_strs"
        else []
    )
    record = compose_run(
        tmp_path,
        f"method={method}",
        "ratio=cr60",
        "calibration.upstream=compressed",
        "benchmark=none",
        *extra,
    )
    assert record.status == "ok"
    assert record.counted.measured_retention < 0.55


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "model.device=auto",
        "tracking=wandb",
        "benchmark=none",
        "options.export=dense",
        "options.save=false",
        "options.threads=1",
        "calibration.batch_size=1",
        "calibration.layers_at_once=1",
        "method.name=another",
        "ratio=cr40",
        "trainer.devices=1",
    ],
)
def test_the_key_does_not_depend_on(tmp_path, override):
    base = key_of(compose_config(tmp_path / "a", "method=svd_llm"))
    assert key_of(compose_config(tmp_path / "elsewhere", "method=svd_llm", override)) == base


@pytest.mark.parametrize(
    "override",
    [
        "method=svd",
        "method=adasvd",
        "method.whitening.solve=float64",
        "method/allocation=adacr",
        "method.allocation.exact_budget=true",
        "ratio=cr20",
        "ratio.compression=0.41",
        "calibration.num_samples=3",
        "calibration.length=31",
        "calibration.sampler.seed=4",
        "calibration/sampler=contiguous",
        "calibration.corpus.split=test",
        "calibration.precision=float32",
        "calibration.accumulate=float64",
        "calibration.upstream=compressed",
        "seed=1",
        "model.seed=1",
        "model.dtype=bfloat16",
        "model.config.num_hidden_layers=2",
    ],
)
def test_the_key_depends_on(tmp_path, override):
    base = ["method=svd_llm", "calibration.precision=bfloat16"]
    assert key_of(compose_config(tmp_path, *base, override)) != key_of(
        compose_config(tmp_path, *base)
    )


def test_another_way_to_the_same_tokens_is_the_same_record(tmp_path):
    cfg = compose_config(tmp_path, "method=svd_llm")
    torch.save(build(cfg).samples.tokens, tmp_path / "ids.pt")
    other = compose_config(
        tmp_path,
        "method=svd_llm",
        "calibration=token_ids",
        f"calibration.path={tmp_path / 'ids.pt'}",
    )
    assert key_of(other) == key_of(cfg)


# --- the command line -----------------------------------------------------------------------------


def test_a_sweep_goes_on_after_a_failing_job_and_then_does_only_what_is_missing(tmp_path):
    """Three methods at 20 %, and at 99.99 %, where not even rank 1 is left."""
    sweep = ["-m", "debug=tiny", "method=svd,svd_llm,adasvd", "ratio.compression=0.2,0.9999"]
    done = typed(tmp_path, *sweep)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "lower ratio.compression" in text
    records = store(tmp_path).all()
    outcome = {
        (x.choices["method"], x.config["ratio"]["compression"]): x.status
        for x in records
        if x.choices["method"] != "dense"
    }
    failed = {job for job, status in outcome.items() if status == "failed"}
    assert outcome.keys() == {
        (method, ratio) for method in ("svd", "svd_llm", "adasvd") for ratio in (0.2, 0.9999)
    }
    assert failed == {("svd", 0.9999), ("svd_llm", 0.9999), ("adasvd", 0.9999)}
    assert "Traceback" not in text

    finished = {
        path: path.stat().st_mtime_ns
        for x in records
        if x.status == "ok"
        for path in [store(tmp_path).path(x.key)]
    }
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs" / "models").iterdir()}
    assert len(finished) == 4
    assert len(models) == 3
    one_more = typed(
        tmp_path, "-m", "debug=tiny", "method=svd,svd_llm,adasvd", "ratio.compression=0.2,0.4"
    )
    assert one_more.returncode == 0, one_more.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, (
        "finished jobs are not touched"
    )
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert len(list((tmp_path / "outputs" / "models").iterdir())) == 6


def test_a_user_error_is_one_line_and_exit_1(tmp_path):
    done = typed(tmp_path, "debug=tiny", "method=svd", "calibration.length=300")
    assert done.returncode == 1
    assert "Samples of 300 tokens do not fit the model's context of 256" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_place_that_cannot_be_written_is_one_line_and_exit_1(tmp_path, mode):
    """Hydra's own logs go there too, before any of our code runs."""
    (tmp_path / "outputs").touch()
    done = typed(tmp_path, *mode, "debug=tiny", "method=svd")
    assert done.returncode == 1
    assert "specomp: Cannot write" in done.stderr and "paths.outputs" in done.stderr
    assert "Traceback" not in done.stderr
