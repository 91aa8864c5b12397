"""LoRA recovery on tiny models: what it merges, that it helps, its cache, resuming to the last bit,
and what it is refused with.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import command
from hydra.utils import instantiate
from omegaconf import OmegaConf
from running import CONF, compose_config, compose_run, make_run, store
from safetensors.torch import load_file
from test_soco_runs import Curve, at_step, dies
from test_stages import method, ranks_of, run_method
from torch import nn
from transformers import AutoModelForCausalLM

import specomp.compression.loop
from specomp.cache import Cache
from specomp.compression.run import Run
from specomp.errors import UserError
from specomp.experiment import pipeline
from specomp.experiment.config import ask
from specomp.experiment.plan import plan_of
from specomp.forms.factors import Factors, LowRankLinear
from specomp.forms.pivoted import Pivoted, PivotedLinear
from specomp.methods.lora import LoRA
from specomp.tables.charts import read_csv, training_curve
from specomp.training.adapters import adapted, stored_matrices
from specomp.training.recovery import RecoveryModule
from specomp.training.teacher import TeacherStates

PINNED = {
    "steps": 40,
    "rank": 4,
    "alpha": 8,
    "learning_rate": 0.01,
    "warmup": 0.0,
    "precision": "float32",
    "checkpoint_every": 1000,
}
OVERRIDES = [
    *(
        "ratio=cr40",
        "method/training=lora",
        "method.training.steps=6",
        "method.training.checkpoint_every=2",
    ),
    *("benchmark=none", "save=false"),
]


def settings(**changes) -> LoRA:
    """Those of conf/method/training/lora.yaml with PINNED and other changes."""
    return instantiate(
        OmegaConf.merge(OmegaConf.load(CONF / "method" / "training" / "lora.yaml"), PINNED, changes)
    )


def dense_run(folder: Path, family_name: str = "llama", *, seed: int = 0) -> Run:
    """Of enough samples to train on; the curve of a training is folder/curve.csv."""
    sizes = {"num_samples": 12, "length": 32, "batch_size": 4}
    run = make_run(family_name, Cache(folder), progress=Curve(folder / "curve.csv"), **sizes)
    return replace(run, seed=seed)


def compressed(folder: Path, family_name: str = "llama", packing=None, *, seed: int = 0):
    """(run, teacher): a model that is compressed, and the states of it that were made
    before that.
    """
    run = dense_run(folder, family_name, seed=seed)
    teacher = TeacherStates(run)
    run_method(run, method(packing=packing or Factors()), ranks=ranks_of(run, 6))
    return run, teacher


def recovered(folder: Path, training: LoRA, *args, seed: int = 0):
    """(run, report) after a recovery."""
    run, teacher = compressed(folder, *args, seed=seed)
    return run, adapted(run, training, teacher)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {x: run.model.get_submodule(x).weight.detach().clone() for x in stored_matrices(run)}


def adapters_of(run: Run) -> dict[str, torch.Tensor]:
    """The only ones in its cache."""
    (file,) = (run.cache.root / "trained").glob("*/adapters.safetensors")
    return load_file(file)


@pytest.mark.parametrize("family_name", ["llama_gqa", "opt", "qwen2"])
@pytest.mark.parametrize(
    "packing", [Factors(), Pivoted(max_growth=2.0)], ids=["factors", "pivoted"]
)
def test_the_model_comes_closer_to_the_dense_one(tmp_path, family_name, packing):
    run, report = recovered(tmp_path, settings(), family_name, packing)
    kl = [row["kl"] for row in report["curve"]]
    assert sum(kl[-10:]) < 0.8 * sum(kl[:10]), "over the ten samples it is trained on, once each"
    rows = read_csv([tmp_path / "curve.csv"])
    assert len(rows) == report["steps"] == 40 and report["tokens"] == 40 * 32
    kind = LowRankLinear if isinstance(packing, Factors) else PivotedLinear
    assert all(type(run.model.get_submodule(x.name)) is kind for x in run.linears)
    assert not any(p.requires_grad for p in run.model.parameters())
    assert not any("lora" in name for name, _ in run.model.named_modules()) and not hasattr(
        run.model, "peft_config"
    )
    assert not any(module.training for module in run.model.modules())


def test_what_is_merged_is_the_scaled_product(tmp_path):
    start = weights(compressed(tmp_path / "start")[0])
    run, _ = recovered(tmp_path / "end", settings(alpha=6))
    adapters = adapters_of(run)
    assert {name.rpartition(".lora_")[0] for name in adapters} == set(start)
    for name, after in weights(run).items():
        A, B = (adapters[f"{name}.lora_{x}.default.weight"] for x in "AB")
        assert A.shape[0] == B.shape[1] == 4
        assert float(B.abs().max()) > 0, "it was trained"
        torch.testing.assert_close(after, start[name] + 6 / 4 * B @ A)


def test_linears_that_stay_dense_are_trained_too(tmp_path):
    run = dense_run(tmp_path)
    teacher, dense = TeacherStates(run), run.linears[0]
    run_method(run, method(), ranks=ranks_of(run, 6) | {dense.name: min(dense.m, dense.n)})
    assert isinstance(run.model.get_submodule(dense.name), nn.Linear)
    before = run.model.get_submodule(dense.name).weight.clone()
    adapted(run, settings(steps=2), teacher)
    assert not torch.equal(before, run.model.get_submodule(dense.name).weight)


def test_the_cache_has_the_result(tmp_path):
    first, _ = recovered(tmp_path, settings(steps=3))
    again, report = recovered(tmp_path, settings(steps=3))
    assert again.cache.hits["trained"] == 1
    assert report["steps"] == 3
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=0, atol=0)
    other, _ = recovered(tmp_path, settings(steps=3), seed=1)
    assert other.cache.misses["trained"] == 1
    assert any(
        not torch.equal(value, weights(other)[name]) for name, value in weights(first).items()
    ), "the seed starts and orders it"


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_killed_recovery_goes_on_to_the_same_bits(tmp_path, monkeypatch, step):
    training = settings(steps=6, checkpoint_every=2)
    expected = weights(recovered(tmp_path / "whole", training)[0])
    with dies(monkeypatch, "training_step", at_step(step), RecoveryModule):
        recovered(tmp_path / "killed", training)
    torch.manual_seed(99)  # nothing depends on what was drawn before
    run, report = recovered(tmp_path / "killed", training)
    assert report["steps"] == 6 and [x["phase"] for x in report["phases"]] == ["start", "recover"]
    for name, value in weights(run).items():
        assert torch.equal(value, expected[name]), name


def test_a_half_precision_model_stays_one(tmp_path):
    record = compose_run(tmp_path, "method=svd_llm", "model.dtype=bfloat16", *OVERRIDES)
    assert record.status == "ok"
    assert record.training["steps"] == 6
    plain = compose_run(
        tmp_path,
        "method=svd_llm",
        "model.dtype=bfloat16",
        "ratio=cr40",
        "benchmark=none",
        "save=false",
    )
    assert record.counted.compressed == plain.counted.compressed, "nothing more is stored"
    assert record.key != plain.key


def test_after_a_block_refinement_and_saved(tmp_path, monkeypatch):
    kept = {}

    def keep(model, *args, **options):
        kept["model"] = model
        return original(model, *args, **options)

    original = pipeline.save_compressed
    monkeypatch.setattr(pipeline, "save_compressed", keep)
    record = compose_run(
        tmp_path,
        "method=specomp",
        "method/refinement=block_refine",
        "method.refinement.steps=3",
        *OVERRIDES[:4],
        "benchmark=tiny",
    )
    assert record.status == "ok"
    assert any("before the recovery" in note for note in record.notes)
    assert {"train", "compress"} <= record.seconds.keys()
    loaded = AutoModelForCausalLM.from_pretrained(record.model_folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, kept["model"](input_ids=ids).logits, rtol=0, atol=0
        )


def test_the_record_of_a_finished_recovery_is_complete(tmp_path):
    cfg = compose_config(tmp_path, "method=svd_llm", *OVERRIDES)
    pipeline.run(cfg)
    (record,) = store(tmp_path).all()
    assert [x["phase"] for x in record.training["phases"]] == ["start", "recover"]
    assert record.training["trainable"] > 0 and "curve" not in record.training
    rows = read_csv([store(tmp_path).companion(record.key, "training.csv")])
    assert len(rows) == 6 and "retention" not in training_curve(rows), "a report draws its KL alone"


def test_it_may_train_on_more_of_the_text_than_the_method_calibrates_on(tmp_path, monkeypatch):
    """The statistics, and so the compressed model it starts from, are those of the calibration set;
    the teacher sees all of it.
    """
    seen: list[int] = []
    ids: dict[int, torch.Tensor] = {}

    def watched(module, indices):
        seen.extend(indices)
        ids.update({i: module._context[0].training_samples.tokens[i] for i in indices})
        return original(module, indices)

    original = RecoveryModule.performance_of
    monkeypatch.setattr(RecoveryModule, "performance_of", watched)
    common = ["method=svd_llm", *OVERRIDES, "calibration.num_samples=8"]
    plain = compose_run(tmp_path, *common)
    assert (
        max(seen) < 8
        and plain.training["samples"] == 8
        and plain.training["samples_hash"] == plain.calibration["hash"]
    )
    first = dict(ids)
    more = compose_run(tmp_path, *common, "method.training.num_samples=40")
    assert max(seen) == 39 and more.training["samples"] == 40 and more.key != plain.key
    assert (
        more.identity["training_samples"]
        == more.training["samples_hash"]
        != more.calibration["hash"]
        == plain.calibration["hash"]
    )
    assert all(torch.equal(value, first[i]) for i, value in ids.items() if i in first), (
        "the calibration set comes first"
    )
    assert more.cache["hits"]["statistics/gram"] == 1
    assert more.counted.norm_error == plain.counted.norm_error
    assert (
        more.training["phases"][0]["phase"] == "start"
        and more.training["phases"][0]["kl"] != plain.training["phases"][0]["kl"]
    )


def test_two_processes_train_as_one(tmp_path):
    """Equal global batch, averaged gradients."""
    common = [
        "method=svd_llm",
        *OVERRIDES,
        "method.training.batch_size=2",
        "method.training.precision=float32",
    ]
    found = {}
    for trainer in ("default", "ddp_cpu", "fsdp_cpu"):
        folder = tmp_path / trainer
        folder.mkdir()
        done = command(folder, *common, f"trainer={trainer}")
        assert done.returncode == 0, done.stderr
        (file,) = (folder / "cache" / "trained").glob("*/adapters.safetensors")
        found[trainer] = load_file(file)
    for trainer in ("ddp_cpu", "fsdp_cpu"):
        for name, value in found["default"].items():
            torch.testing.assert_close(found[trainer][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantizer=rtn_int4", "method/packing=factors"], "LoRA moves numbers off the grid"),
        (["method.training.held_out=99"], "held_out=99"),
        (
            ["method.training.num_samples=2"],
            "held_out=2 samples are kept aside, but there are 2 to train on",
        ),
        (["method.training.num_samples=0"], "num_samples"),
        (["method.training.rank=0"], "rank"),
        (
            ["method.training.batch_size=3", "method.training.micro_batch_size=2"],
            "not a multiple of micro_batch_size 2",
        ),
    ],
)
def test_what_it_cannot_do_is_said_before_the_model_is_loaded(
    tmp_path, monkeypatch, overrides, said
):
    monkeypatch.setattr(pipeline, "load_dense", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        pipeline.run(compose_config(tmp_path, "method=svd_llm", *OVERRIDES, *overrides))


def test_a_plan_trains_after_compressing(tmp_path):
    plain = ["method=svd_llm", "ratio=cr40", "benchmark=none"]
    trains = ["method=svd_llm", *OVERRIDES]
    asked = (plain, trains, [*trains, "method.training.num_samples=30"])
    before, found, more = (plan_of(ask(compose_config(tmp_path, *x))) for x in asked)
    first, last = before.route.stages[:-1], before.route.stages[-1]
    assert found.route.stages == (*first, "train", last, "train"), "the teacher first"
    assert found.compressed == before.compressed
    (train,) = [x for x in more.stages if x.name == "train"]
    assert f"{30 * more.run.samples.length:,} tokens of the teacher; 6 steps" in train.detail


def test_adapters_belong_to_the_numbers_they_were_trained_on(tmp_path, monkeypatch):
    """Another machine may round the same record's factors otherwise."""
    common = ["method=svd_llm", *OVERRIDES]
    record = compose_run(tmp_path, *common)
    store(tmp_path).path(record.key).unlink()
    assert compose_run(tmp_path, *common).cache["hits"]["trained"] == 1
    original = specomp.compression.loop.compress_layers

    def otherwise(run, *args):
        reports = original(run, *args)
        with torch.no_grad():
            next(run.model.get_submodule(run.linears[-1].name).parameters()).view(-1)[0] += 1e-4
        return reports

    monkeypatch.setattr(specomp.compression.loop, "compress_layers", otherwise)
    store(tmp_path).path(record.key).unlink()
    assert compose_run(tmp_path, *common).cache["misses"]["trained"] == 1
