"""Trained scales: integers stay, the model comes closer to the dense one, and what is stored is
what was trained.
"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import command
from running import compose_config, compose_run, make_run, random_tokens
from safetensors.torch import load_file
from test_soco_runs import Curve, at_step, dies
from test_stages import method, ranks_of, run_method
from tiny import tiny_model
from torch import nn

import specomp
from specomp import rows
from specomp.cache import Cache
from specomp.errors import UserError
from specomp.experiment.config import ask
from specomp.experiment.plan import plan_of
from specomp.forms.factors import Factors
from specomp.forms.pivoted import Pivoted
from specomp.forms.prices import bits, parts_of
from specomp.models.modules import CodedLinear, GridLinear
from specomp.training.recovery import RecoveryModule
from specomp.training.scales import Multiple, rescale, rescaled, vectors_of
from specomp.training.teacher import TeacherStates

PINNED = {
    "steps": 30,
    "learning_rate": 0.01,
    "warmup": 0.0,
    "precision": "float32",
    "checkpoint_every": 1000,
}
TOKENS = random_tokens(8, 32)


def trained(folder: Path, quantizer: str, packing=None, *, half=None, **changes):
    """(run, report, state before) of a model that was compressed to rank 6, rounded and trained."""
    sizes = {"num_samples": 12, "length": 32, "batch_size": 4}
    run = make_run("opt", Cache(folder), progress=Curve(folder / "curve.csv"), **sizes)
    if half is not None:
        run.model.to(half)
    chosen = method(packing=packing or Factors(), rounding=rows.slot("quantizer", quantizer))
    run = replace(run, seed=0, method=chosen)
    teacher = TeacherStates(run)
    run_method(run, chosen, ranks=ranks_of(run, 6))
    before = {name: (x, held(x)) for name, x in run.model.named_modules() if held(x) is not None}
    size = sum(bits(parts_of(run.model.get_submodule(x.name)), torch.float32) for x in run.linears)
    report = rescaled(run, rows.slot("training", "scales", **PINNED | changes), teacher)
    after = sum(bits(parts_of(run.model.get_submodule(x.name)), torch.float32) for x in run.linears)
    assert size == after, "not a bit more"
    return run, report, before


def held(module: nn.Module):
    """(integers, scales) of what lies on a grid or is made of codes; None of everything else."""
    if isinstance(module, CodedLinear):
        return module.codes.clone(), module.largest.clone()
    if isinstance(module, GridLinear):
        return module.grid.integers(module.weight), module.grid.scales.clone()
    return None


@pytest.mark.parametrize("shape", [(5, 12), (5, 14), (3, 3)])
@pytest.mark.parametrize("by_row", [True, False])
def test_a_multiple_is_of_numbers_that_follow_each_other(shape, by_row):
    torch.manual_seed(0)
    W = torch.randn(shape)
    made = Multiple(W, 4, by_row)
    assert torch.equal(made(W), W), "of one, nothing"
    made.gain.data = torch.randn_like(made.gain)
    lines = W if by_row else W.view(1, -1)
    wanted = [
        torch.cat([part * g for part, g in zip(row.split(4), gain, strict=True)])
        for row, gain in zip(lines, made.gain, strict=True)
    ]
    assert torch.equal(made(W), torch.stack(wanted).view(shape))


@pytest.mark.parametrize("quantizer", ["gptq_int4", "rtn_int4", "awq_int4", "nf4"])
@pytest.mark.parametrize(
    "packing", [Factors(), Pivoted(max_growth=2.0)], ids=["factors", "pivoted"]
)
def test_scales_move_and_integers_stay(tmp_path, quantizer, packing):
    run, report, before = trained(tmp_path, quantizer, packing)
    first, last = (x["kl"] for x in report["phases"])
    assert last < first, "on samples it was not trained on"
    assert before
    for name, (module, (integers, scales)) in before.items():
        now = run.model.get_submodule(name)
        assert type(now) is type(module)
        found = held(now)
        assert torch.equal(found[0], integers), name
        assert found[1].dtype == scales.dtype and not torch.equal(found[1], scales), name
        if isinstance(now, GridLinear):
            assert torch.equal(now.grid.values(integers), now.weight), "on its new grid"
    assert not any(p.requires_grad for p in run.model.parameters())
    assert not any("parametrizations" in name for name, _ in run.model.named_modules())
    # of weights, norms and biases
    vectors = sum(getattr(x, y).numel() for x, y in vectors_of(run.family.decoder(run.model)))
    grids = [x for _, x in (held(run.model.get_submodule(n)) for n in before)]
    codes = quantizer == "nf4"
    assert report["trainable"] == vectors + sum(len(x) if codes else x.numel() for x in grids)


@pytest.mark.parametrize("vectors", [True, False])
def test_norms_and_biases_are_asked_for(tmp_path, vectors):
    fresh = tiny_model("opt")
    run, _, _ = trained(tmp_path, "rtn_int4", steps=3, vectors=vectors)
    old = dict(fresh.named_parameters())
    moved = {
        name
        for name, parameter in run.model.named_parameters()
        if parameter.ndim == 1 and name in old and not torch.equal(parameter, old[name])
    }
    assert bool(moved) is vectors


def test_a_scale_of_16_bits_is_what_counts(tmp_path):
    """The weight is the one that its stored scale gives, in a bfloat16 model too."""
    run, _, before = trained(tmp_path, "gptq_int4", half=torch.bfloat16, precision="bfloat16")
    for name, (_, (integers, _)) in before.items():
        module = run.model.get_submodule(name)
        assert module.grid.scales.dtype == module.weight.dtype == torch.bfloat16
        wanted = module.grid.values(integers).to(torch.bfloat16)
        assert torch.equal(module.weight, wanted), name


def test_nothing_to_do_changes_nothing(tmp_path):
    _, _, before = trained(tmp_path, "gptq_int4", steps=1)
    module, _ = next(iter(before.values()))
    weight, scales = module.weight.clone(), module.grid.scales.clone()
    rescale(module, torch.ones_like(scales, dtype=torch.float32))
    assert torch.equal(module.weight, weight) and torch.equal(module.grid.scales, scales)


def test_the_cache_has_the_result(tmp_path):
    first, _, _ = trained(tmp_path, "gptq_int4", steps=3)
    again, report, _ = trained(tmp_path, "gptq_int4", steps=3)
    assert again.cache.hits["trained"] == 1 and report["steps"] == 3
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("row", "ratio"), [("wanda", 0.5), ("specomp", specomp.Bits(bits=4.0)), ("adasvd", 0.4)]
)
def test_any_row_may_be_trained_so_and_its_folder_is_the_model(tmp_path, row, ratio):
    quantizer = "grids" if row == "specomp" else "gptq_int4"
    plain = specomp.method(row, quantizer=quantizer)
    training = rows.slot("training", "scales", **PINNED | {"steps": 2})
    chosen = specomp.Method(**vars(plain) | {"training": training})
    model = tiny_model("llama")
    report = specomp.compress(model, TOKENS, chosen, ratio)
    assert report.training["steps"] == 2
    again = specomp.load(specomp.save(model, tmp_path / "out")).model
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_without_scales_there_is_nothing_to_train():
    chosen = specomp.method("svd_llm", training="scales")
    with pytest.raises(UserError, match=r"quantizer=none stores none.*lora, or a quantizer"):
        specomp.compress(tiny_model("llama"), TOKENS, chosen, 0.4)


@pytest.mark.parametrize("quantizer", ["gptq_int4", "nf4"])
def test_the_dense_row_on_a_grid_may_be_trained(tmp_path, quantizer):
    """GPTQ with EfficientQAT's second stage: no budget is spent, whatever the ratio says."""
    record = compose_run(
        tmp_path,
        *("method=dense", f"quantizer={quantizer}", "method/training=scales"),
        *("method.training.steps=2", "benchmark=tiny"),
    )
    assert record.status == "ok" and record.training["steps"] == 2
    plain = specomp.method("dense", quantizer=quantizer)
    training = rows.slot("training", "scales", **PINNED | {"steps": 2})
    chosen = specomp.Method(**vars(plain) | {"training": training})
    for ratio in (0.4, specomp.Bits(bits=3.0)):
        model = tiny_model("llama")
        assert specomp.compress(model, TOKENS, chosen, ratio).training["steps"] == 2


@pytest.mark.parametrize("quantizer", ["gptq_int4", "nf4"])
def test_a_training_that_fails_leaves_the_model_as_it_was_stored(tmp_path, quantizer):
    plain = specomp.method("svd_llm", quantizer=quantizer)
    model, other = tiny_model("llama"), tiny_model("llama")
    specomp.compress(other, TOKENS, plain, 0.4)
    settings = PINNED | {"steps": 2, "divergence": 1e-9}
    training = rows.slot("training", "scales", **settings)
    with pytest.raises(UserError, match="diverged"):
        specomp.compress(model, TOKENS, specomp.Method(**vars(plain) | {"training": training}), 0.4)
    copy.deepcopy(model)
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, monkeypatch, step):
    options = {"steps": 6, "checkpoint_every": 2}
    whole = trained(tmp_path / "whole", "gptq_int4", **options)[0].model.state_dict()
    with dies(monkeypatch, "training_step", at_step(step), RecoveryModule):
        trained(tmp_path / "killed", "gptq_int4", **options)
    run, report, _ = trained(tmp_path / "killed", "gptq_int4", **options)
    assert report["steps"] == 6
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_two_processes_train_as_one(tmp_path):
    """Forked, sharded, and started anew, where the module is pickled before."""
    common = [
        *("method=svd_llm", "ratio=cr40", "quantizer=gptq_int4", "method/training=scales"),
        *("method.training.steps=4", "method.training.checkpoint_every=2", "benchmark=none"),
        *("save=false", "method.training.batch_size=2", "method.training.precision=float32"),
    ]
    found = {}
    spawned = ("trainer=ddp_cpu", "trainer.strategy=ddp_spawn")
    kinds = (("trainer=default",), ("trainer=ddp_cpu",), ("trainer=fsdp_cpu",), spawned)
    for index, trainer in enumerate(kinds):
        folder = tmp_path / str(index)
        folder.mkdir()
        done = command(folder, *common, *trainer)
        assert done.returncode == 0, done.stderr
        (file,) = (folder / "cache" / "trained").glob("*/scales.safetensors")
        found[index] = load_file(file)
    assert found[0]
    for other in list(found.values())[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_a_plan_counts_gradients_of_weights(tmp_path):
    asked = ["method=svd_llm", "ratio=cr40", "quantizer=gptq_int4", "benchmark=none"]
    plans = [
        plan_of(ask(compose_config(tmp_path, *asked, f"method/training={x}")))
        for x in ("none", "scales")
    ]
    (train,) = [x for x in plans[1].stages if x.name == "train"]
    assert train.held > 0 and "250 steps" in train.detail
    assert plans[0].route.stages[:-1] == plans[1].route.stages[:2]
