"""SoCo on tiny models: its start, its budget, what is packed, what falls in training, what is
cached, and resuming to the last bit.
"""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest
import torch
from command import command, typed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from running import CONF, compose_config, compose_run, make_run, random_tokens, store, stored_record
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import specomp.compression.loop
import specomp.methods.spectrum
from specomp.cache import Cache
from specomp.compression.calibrate import calibrate
from specomp.compression.loop import compress_layers
from specomp.compression.report import LinearReport
from specomp.compression.run import Progress, Run
from specomp.compression.spectra import Spectra
from specomp.errors import UserError
from specomp.experiment import pipeline
from specomp.forms.factors import Factors
from specomp.forms.menu import options
from specomp.methods.soco import (
    AlternatingOptimization,
    CoarseCompression,
    Recovery,
    Sparsification,
)
from specomp.methods.svd import (
    FullRank,
    NoCompensation,
    NoRefinement,
    NoWhitening,
    UniformAllocation,
    Weight,
)
from specomp.methods.svd_llm import GramWhitening
from specomp.models.family import Unit
from specomp.quantization.none import NoQuantizer
from specomp.slots import Allocation, Choice, Method
from specomp.training.gated import GatedLinear, SpectrumModule
from specomp.training.schedule import PhaseSchedule
from specomp.training.spectrum import GatedChoice, Gates, choose, gate, stored_as, train
from specomp.training.teacher import TeacherStates

PHASES = ["coarse", "alternate", "sparsify", "polish"]
STEPS = {"coarse": 2, "alternate": 2, "sparsify": 2, "polish": 1}
ENDS = [2, 4, 6, 7]
LAST = ENDS[-1]
# The settings that the tests' numbers depend on, whatever the yaml's defaults become; so fast that
# a few steps move gates across 0.5.
PINNED = {
    "precision": "float32",
    "phases": PHASES,
    "stages": {
        "coarse": {"steps": STEPS["coarse"], "price": 10.0, "prune_margin": 1.25},
        "alternate": {"steps": STEPS["alternate"], "price": 10.0},
        "sparsify": {"steps": STEPS["sparsify"], "price": 10.0, "polarization": 1.0, "fade": 0.5},
        "polish": {"steps": STEPS["polish"], "cut_losers": True},
    },
    "temperature_start": 0.3,
    "temperature_end": 0.1,
    "learning_rate": 0.3,
    "learning_rate_deviation": 0.02,
    "warmup": 0.0,
    "checkpoint_every": 1000,
}
OVERRIDES = [
    *(
        "method=soco",
        "ratio=cr40",
        "benchmark=none",
        "options.save=false",
        f"method.training.phases=[{','.join(PHASES)}]",
    ),
    *(f"method.training.stages.{name}.steps={steps}" for name, steps in STEPS.items()),
    *("method.training.learning_rate=0.3", "method.training.checkpoint_every=1"),
]


def soco(*, whitened: bool = False, **changes: Any) -> Method:
    """The method of conf/method/soco.yaml with PINNED and other changes to its training."""
    return Method(
        name="soco",
        target=Weight(),
        whitening=GramWhitening(solve="auto") if whitened else NoWhitening(solve="auto"),
        allocation=FullRank(),
        compensation=NoCompensation(),
        refinement=NoRefinement(),
        training=instantiate(
            OmegaConf.merge(
                OmegaConf.load(CONF / "method" / "training" / "soco.yaml"), PINNED, changes
            )
        ),
        packing=Factors(),
        rounding=NoQuantizer(),
    )


class Curve(Progress):
    """Keeps the curve of a training."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def curve_file(self) -> Path:
        return self.path


def soco_run(
    family_name: str, cache: Cache, chosen: Method, *, compression: float = 0.4, seed: int = 0
) -> Run:
    """A dense tiny model and a method that trains; the curve is in the cache's folder."""
    curve = Curve(cache.root / "training.csv")
    run = make_run(family_name, cache, method=chosen, compression=compression, progress=curve)
    return replace(run, seed=seed)


def spectra_of(run: Run) -> Spectra:
    return Spectra(run, run.method.target, run.method.whitening, calibrate(run), complete=True)


def allocated(run: Run, allocation: Allocation) -> dict[Unit, Choice]:
    menu = options(run.units, [run.method.packing], run.budget, run.model.dtype, None, None)
    return allocation(menu, run.budget.retention, None)


def fit(run: Run, allocation: Allocation = FullRank()) -> GatedChoice:  # noqa: B008
    """The training; afterwards the run's model is the student, unless it was read from the
    cache.
    """
    choices, teacher, target = allocated(run, allocation), TeacherStates(run), run.budget.retention
    settings, spectra = run.method.training, spectra_of(run)
    return train(run, settings, choices, spectra, teacher, target=target, gains={}, by="gates")


def packed(run: Run, found: GatedChoice) -> list[LinearReport]:
    """What is kept takes the place of what was trained."""
    return compress_layers(run, found.choices, calibrate(run), spectra_of(run), found)


def untrained(run: Run) -> GatedChoice:
    """What a training of no step would return."""
    settings, counts = run.method.training, {x.name: min(x.m, x.n) for x in run.linears}
    trained = Gates(
        gates={
            name: settings.gate.to_gate(torch.full((k,), settings.gate.start))
            for name, k in counts.items()
        },
        alive={name: torch.ones(k, dtype=torch.bool) for name, k in counts.items()},
        deviations={x.name: torch.zeros(x.m) for x in run.linears},
        report={},
    )
    kept, account = choose(run, settings, trained, run.budget.retention)
    return GatedChoice(
        choices={unit: stored_as(run, unit, len(kept[unit.name])) for unit in run.units},
        by="gates",
        account={"pruning": account},
        gains={},
        trained=trained,
        kept=kept,
        components=spectra_of(run),
        plain=False,
    )


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=random_tokens(3, 20, seed=5).clamp(max=250)).logits


def students(run: Run) -> dict[str, GatedLinear]:
    return {x.name: run.model.get_submodule(x.name) for x in run.linears}


def flat(found: GatedChoice) -> torch.Tensor:
    """Everything that training decided, in one vector."""
    trained = found.trained
    parts = [*trained.gates.values(), *(x.float() for x in trained.alive.values())]
    return torch.cat(parts + [x for x in trained.deviations.values() if x is not None])


def timeless(report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The curve and the phases, without how long they took."""
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in report["curve"]
    ], report["phases"]


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("family_name", ["llama", "llama_gqa", "opt", "qwen2"])
def test_at_the_start_the_student_is_the_dense_model(cache, family_name, whitened):
    run = soco_run(family_name, cache, soco(whitened=whitened))
    expected, spectra = logits_of(run.model), spectra_of(run)
    gated = gate(run, run.method.training, allocated(run, FullRank()), spectra)
    assert gated.keys() == {x.name for x in run.linears}
    assert all(isinstance(x, GatedLinear) for x in students(run).values())
    if family_name in ("opt", "qwen2"):
        assert any(x.bias is not None for x in gated.values())
    assert (logits_of(run.model) - expected).abs().max() <= 1e-4
    trainable = {
        name.rpartition(".")[2] for name, p in run.model.named_parameters() if p.requires_grad
    }
    assert trainable == {"scores", "deviation"}


@pytest.mark.parametrize("mapping", ["two_sigmoid", "identity", "exp"])
@pytest.mark.parametrize("family_name", ["llama", "opt"])
def test_keeping_everything_is_the_dense_model(cache, family_name, mapping):
    run = soco_run(family_name, cache, soco(mapping=mapping), compression=0.0)
    expected, spectra = logits_of(run.model), spectra_of(run)
    gate(run, run.method.training, allocated(run, FullRank()), spectra)
    found = untrained(run)
    reports = packed(run, found)
    assert found.account["pruning"]["threshold"] == 0.0
    assert all(x.dense for x in reports)
    assert (logits_of(run.model) - expected).abs().max() <= 1e-4


def test_the_first_step_sees_the_dense_model_without_dropout(cache):
    """OPT's configuration has dropout; the student, like the teacher, runs without."""
    run = soco_run("opt", cache, soco())
    assert run.model.config.dropout > 0
    report = fit(run).trained.report
    assert abs(report["curve"][0]["kl"]) <= 1e-5


# --- the budget and what is packed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family_name", "compression"), [("llama_gqa", 0.2), ("llama_gqa", 0.8), ("opt", 0.4)]
)
def test_the_counted_budget_is_met_within_one_component(cache, family_name, compression):
    run = soco_run(family_name, cache, soco(), compression=compression)
    found = fit(run)
    reports, account = packed(run, found), found.account["pruning"]
    total, target = sum(x.m * x.n for x in reports), 1 - compression
    stored = sum(x.stored for x in reports) / total
    assert stored <= target + 1e-9
    assert stored > target - max(x.m + x.n for x in reports) / total
    assert account["exact_retention"] == pytest.approx(stored)
    assert account["kept"] >= sum(x.rank for x in reports if not x.dense)


@pytest.mark.parametrize("fixed", [0.3, 0.9])
def test_the_fixed_threshold_keeps_what_it_keeps(cache, fixed):
    run = soco_run("llama", cache, soco(threshold=fixed, pruning={"exact_budget": False}))
    found = fit(run)
    reports, account, trained = packed(run, found), found.account["pruning"], found.trained
    assert account["threshold"] == account["fixed_threshold"] == fixed
    assert account["fixed_retention"] == pytest.approx(
        sum(x.stored for x in reports) / sum(x.m * x.n for x in reports)
    )
    for report in reports:
        gates = trained.gates[report.name][trained.alive[report.name]]
        assert report.dense or report.rank == max(1, int((gates >= fixed).sum()))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("family_name", ["llama", "qwen2"])
def test_packed_factors_are_the_weights_of_the_training(cache, family_name, whitened):
    """Of the student, cut at the threshold that the packing reports."""
    run = soco_run(family_name, cache, soco(whitened=whitened))
    found = fit(run)
    before, account, trained = students(run), found.account["pruning"], found.trained
    reports = packed(run, found)
    seen = set()
    for report in reports:
        gated = before[report.name]
        gates = gated.gates().detach()
        # Not the student's own: of as many numbers as were left, the sigmoid may round the last bit
        # otherwise.
        keep = trained.gates[report.name][trained.alive[report.name]] >= account["threshold"]
        if not keep.any():
            keep[gates.argmax()] = True
        if report.dense:
            keep[:] = True
        expected = (gated.U * (gates * keep)) @ gated.rows
        module = run.model.get_submodule(report.name)
        weight = module.weight if report.dense else module.merged_weight()
        assert (weight - expected).norm() <= 1e-5 * expected.norm(), report.name
        bias = module.bias if report.dense else module.u_proj.bias
        assert torch.allclose(
            bias, gated.deviation if gated.bias is None else gated.bias + gated.deviation, atol=1e-7
        )
        assert gated.deviation.abs().sum() > 0
        seen.add(report.dense)
        gated.mask = keep.float()
    after = logits_of(run.model)
    for name, gated in before.items():
        parent, _, leaf = name.rpartition(".")
        setattr(run.model.get_submodule(parent), leaf, gated)
    assert (logits_of(run.model) - after).abs().max() <= 1e-4
    assert False in seen


def test_gates_that_are_all_equal_still_meet_the_budget(cache):
    """A first step of learning rate 0, as warm-up has, leaves every gate at its start."""
    stages = {"coarse": {"steps": 1, "prune_margin": None}}
    run = soco_run("llama", cache, soco(phases=["coarse"], stages=stages, warmup=0.5))
    reports = packed(run, fit(run))
    assert sum(x.stored for x in reports) <= 0.6 * sum(x.m * x.n for x in reports)


def test_physical_pruning_keeps_the_best_worth_the_margin(cache):
    run = soco_run("llama", cache, soco(phases=["coarse"]))
    trained = fit(run).trained
    (phase,) = trained.report["phases"]
    alive = {x.name: int(trained.alive[x.name].sum()) for x in run.linears}
    assert phase["existing_before"] == sum(min(x.m, x.n) for x in run.linears)
    assert phase["existing"] == sum(alive.values()) < phase["existing_before"]
    stored = sum(min(alive[x.name] * (x.m + x.n), x.params) for x in run.linears)
    assert stored <= 1.25 * 0.6 * sum(x.params for x in run.linears)
    assert stored >= 0.6 * sum(x.params for x in run.linears)
    assert all(
        len(gated.rows) == alive[name] == gated.U.shape[1] for name, gated in students(run).items()
    )


# --- what falls -----------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch) -> list[tuple[Any, Any]]:
    """(phase, terms) of every forward pass."""
    seen = []
    for cls in (CoarseCompression, AlternatingOptimization, Sparsification, Recovery):

        def spy(self, terms, progress, original=cls.loss):
            seen.append((self, terms))
            return original(self, terms, progress)

        monkeypatch.setattr(cls, "loss", spy)
    return seen


def test_the_loss_falls_in_every_phase(cache, steps):
    """What falls is each phase's own loss, as it is weighed at the end of the phase: the mean of
    its last steps against its first.
    """
    stages = {
        "coarse": {"steps": 30},
        "alternate": {"steps": 20},
        "sparsify": {"steps": 20, "fade": 0.0},
        "polish": {"steps": 20},
    }
    rates = {"learning_rate": 0.1, "learning_rate_deviation": 0.02, "learning_rate_final": 0.5}
    chosen = soco(stages=stages, temperature_start=0.2, temperature_end=0.2, **rates)
    fit(soco_run("llama_gqa", cache, chosen))
    seen, falls = list(steps), {}
    for name, phase in chosen.training.schedule.items():
        with torch.no_grad():
            losses = [
                float(phase.loss(terms, 1.0)) for used, terms in seen if type(used) is type(phase)
            ]
        assert len(losses) == phase.steps
        falls[name] = (sum(losses[:5]) / 5, sum(losses[-5:]) / 5)
    assert all(last < first for first, last in falls.values()), falls


def test_recovery_of_a_truncated_spectrum_lowers_the_divergence(cache):
    chosen = soco(
        phases=["polish"], stages={"polish": {"steps": 30, "cut_losers": False}}, learning_rate=0.05
    )
    found = fit(soco_run("llama_gqa", cache, chosen), UniformAllocation(exact_budget=False))
    curve = found.trained.report["curve"]
    first, last = (sum(row["kl"] for row in rows) / 5 for rows in (curve[:5], curve[-5:]))
    assert last < 0.8 * first
    assert all(row["soft"] < 1 for row in curve)


def test_coarse_compression_reaches_the_budget(cache):
    chosen = soco(phases=["coarse"], stages={"coarse": {"steps": 20}}, learning_rate=0.15)
    curve = fit(soco_run("llama_gqa", cache, chosen)).trained.report["curve"]
    assert curve[0]["soft"] > 1
    assert curve[-1]["soft"] < 0.75 * curve[0]["soft"]
    assert curve[-1]["hard"] < curve[0]["hard"]


# --- the cache ------------------------------------------------------------------------------------


def test_other_prunings_read_the_same_training(tmp_path):
    run = soco_run("llama", Cache(tmp_path), soco())
    first = fit(run)
    assert run.cache.misses["trained"] == 1
    for change in ({"order": "singular_value"}, {"ranks": "allocation"}, {"values": "plain"}):
        again = soco_run("llama", Cache(tmp_path), soco(pruning=change))
        found = fit(again)
        assert again.is_dense, "nothing was trained"
        assert (again.cache.hits["trained"], again.cache.misses.get("trained", 0)) == (1, 0)
        assert torch.equal(flat(found), flat(first))
        reports = packed(again, found)
        assert sum(x.stored for x in reports) <= 0.6 * sum(x.m * x.n for x in reports)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"stages": {"polish": {"steps": 9}}, "phases": PHASES[:3]}, False),
        ({"pruning": {"exact_budget": False}}, False),  # where the losers are faded out
        ({"learning_rate": 0.2}, False),
        ({"mapping": "exp"}, False),
        ({"deviation": False}, False),
        ({"whitened": True}, False),
        ({}, True),
    ],
)
def test_what_a_cached_training_depends_on(tmp_path, change, shared):
    stages = {name: {"steps": 1} for name in PHASES}
    fit(soco_run("llama_gqa", Cache(tmp_path), soco(stages=stages)))
    other = soco_run("llama_gqa", Cache(tmp_path), soco(**{"stages": stages} | change))
    fit(other)
    assert other.cache.hits.get("trained", 0) == int(shared)


def test_stages_that_are_not_run_do_not_matter(tmp_path):
    fit(soco_run("llama_gqa", Cache(tmp_path), soco(phases=["coarse"])))
    chosen = soco(phases=["coarse"], stages={"polish": {"steps": 99}})
    other = soco_run("llama_gqa", Cache(tmp_path), chosen)
    fit(other)
    assert other.cache.hits["trained"] == 1


def test_the_seed_orders_the_samples(tmp_path):
    one, two = (fit(soco_run("llama_gqa", Cache(tmp_path), soco(), seed=seed)) for seed in (0, 1))
    again = fit(soco_run("llama_gqa", Cache(tmp_path / "other"), soco()))
    assert not torch.equal(flat(one), flat(two))
    assert torch.equal(flat(one), flat(again)), "and nothing else is random"


# --- resuming -------------------------------------------------------------------------------------

EARLY = {
    "_target_": "specomp.training.phases.Convergence",
    "window": 2,
    "tolerance": 1.0,
}  # always, once the budget is met
VARIANTS: dict[str, dict[str, Any]] = {
    "pruned": {},
    "whole": {"stages": {"coarse": {"prune_margin": None}}},
    "accumulated": {"batch_size": 2, "micro_batch_size": 1},
    "batched": {"batch_size": 2, "micro_batch_size": 2, "label_weight": 0.5, "deviation": False},
    "early": {"stages": {"polish": {"steps": 9, "until": EARLY}}},
}


def resumable(variant: str = "pruned") -> Method:
    """One checkpoint every step."""
    return soco(checkpoint_every=1, **VARIANTS[variant])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Trainings that nobody disturbed, by variant."""

    @cached
    def made(variant: str) -> GatedChoice:
        return fit(
            soco_run("llama_gqa", Cache(tmp_path_factory.mktemp(variant)), resumable(variant))
        )

    return made


@contextmanager
def dies(monkeypatch, where: str, when, owner: Any = SpectrumModule) -> Iterator[None]:
    """Inside, `owner.where` raises where when(module) says so; checks that it did."""
    original = getattr(owner, where)

    def stop(self, *args, **options):
        if when(self):
            raise RuntimeError("the machine went down")
        return original(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine went down"):
        patch.setattr(owner, where, stop)
        yield


def at_step(step: int):
    """After optimizer step `step`, before its checkpoint."""
    return lambda module: module.trainer.global_step == step


def same(found: GatedChoice, expected: GatedChoice) -> None:
    assert torch.equal(flat(found), flat(expected))
    assert timeless(found.trained.report) == timeless(expected.trained.report)


CASES = [("pruned", step) for step in range(1, LAST + 1)]
CASES += [
    ("whole", 3),
    ("batched", 5),
    ("early", 8),
    ("accumulated", 2),
    ("accumulated", 3),
    ("accumulated", 6),
]


@pytest.mark.parametrize(("variant", "step"), CASES)
def test_a_killed_training_goes_on_to_the_same_bits(
    cache, monkeypatch, uninterrupted, caplog, variant, step
):
    chosen = resumable(variant)
    with dies(monkeypatch, "performance", at_step(step)):
        fit(soco_run("llama_gqa", cache, chosen))
    run = soco_run("llama_gqa", cache, chosen)
    with caplog.at_level("INFO", logger="specomp"):
        caplog.clear()
        found = fit(run)
    same(found, uninterrupted(variant))
    assert ("from checkpoint" in caplog.text) == (step > 1), (
        "the first step has no checkpoint before it"
    )
    assert not list(cache.root.rglob("*.ckpt")), "a complete training needs none"


@pytest.mark.parametrize("batch", [1, 4, 13])
def test_killed_between_two_forward_passes_of_a_step(cache, monkeypatch, uninterrupted, batch):
    """Only one half of the gradient was accumulated; the resumed run takes the whole step."""
    chosen = resumable("accumulated")
    with dies(
        monkeypatch,
        "performance_of",
        lambda module: module.trainer.fit_loop.epoch_loop.batch_idx == batch,
    ):
        fit(soco_run("llama_gqa", cache, chosen))
    same(fit(soco_run("llama_gqa", cache, chosen)), uninterrupted("accumulated"))


def test_killed_twice_at_the_same_place(cache, monkeypatch, uninterrupted):
    """The second time right after the first forward pass of the step it had resumed at, half a
    gradient later.
    """
    chosen = resumable("accumulated")
    for batch in (5, 9, 9):
        with dies(
            monkeypatch,
            "performance_of",
            lambda module, batch=batch: module.trainer.fit_loop.epoch_loop.batch_idx == batch,
        ):
            fit(soco_run("llama_gqa", cache, chosen))
    same(fit(soco_run("llama_gqa", cache, chosen)), uninterrupted("accumulated"))


def test_killed_again_and_again(cache, monkeypatch, uninterrupted):
    for step in (2, 3, 5, LAST):
        with dies(monkeypatch, "performance", at_step(step)):
            fit(soco_run("llama_gqa", cache, resumable()))
    same(fit(soco_run("llama_gqa", cache, resumable())), uninterrupted("pruned"))


@pytest.mark.parametrize("variant", ["pruned", "early"])
def test_killed_after_the_last_checkpoint(cache, monkeypatch, uninterrupted, variant):
    """Every step is done and in a checkpoint, but the training had not ended."""
    chosen = resumable(variant)
    with dies(monkeypatch, "on_train_end", lambda _: True, PhaseSchedule):
        fit(soco_run("llama_gqa", cache, chosen))
    assert list(cache.root.rglob("*.ckpt"))
    same(fit(soco_run("llama_gqa", cache, chosen)), uninterrupted(variant))


@pytest.mark.parametrize("variant", ["pruned", "early"])
def test_killed_before_the_result_was_stored(cache, monkeypatch, uninterrupted, variant):
    chosen = resumable(variant)
    run = soco_run("llama_gqa", cache, chosen)
    original = Cache.save

    def full(self, kind, *args):
        if kind == "trained":
            raise RuntimeError("the machine went down")
        original(self, kind, *args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="went down"):
        patch.setattr(Cache, "save", full)
        fit(run)
    same(fit(soco_run("llama_gqa", cache, chosen)), uninterrupted(variant))


def test_a_damaged_checkpoint_is_logged_and_not_used(cache, monkeypatch, uninterrupted, caplog):
    with dies(monkeypatch, "performance", at_step(5)):
        fit(soco_run("llama_gqa", cache, resumable()))
    (path,) = cache.root.rglob("*.ckpt")
    path.write_bytes(path.read_bytes()[:100])
    same(fit(soco_run("llama_gqa", cache, resumable())), uninterrupted("pruned"))
    assert f"Checkpoint {path.name} is damaged" in caplog.text


def test_a_checkpoint_holds_what_trains_and_little_else(cache, monkeypatch):
    with dies(monkeypatch, "performance", at_step(5)):
        fit(soco_run("llama_gqa", cache, resumable()))
    (path,) = cache.root.rglob("*.ckpt")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert {name.rpartition(".")[2] for name in state} == {"scores", "deviation", "alive"}


def test_ctrl_c_leaves_an_unfinished_record_and_the_same_command_goes_on(tmp_path, monkeypatch):
    cfg = compose_config(tmp_path, *OVERRIDES)
    original = SpectrumModule.performance

    def interrupt(self):
        if self.trainer.global_step == 5:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpectrumModule, "performance", interrupt)
        pipeline.run(cfg)
    record = stored_record(tmp_path, cfg)
    assert (record.status, record.error) == ("running", "interrupted")
    resumed = compose_run(tmp_path, *OVERRIDES)
    assert (resumed.status, resumed.error) == ("ok", None)
    assert resumed.training["steps"] == LAST
    assert [x["step"] for x in resumed.training["phases"]] == ENDS


# --- divergence -----------------------------------------------------------------------------------


def test_a_diverging_training_stops_and_keeps_its_last_checkpoint(tmp_path):
    cfg = compose_config(tmp_path, *OVERRIDES, "method.training.divergence=1e-4")
    with pytest.raises(UserError) as caught:
        pipeline.run(cfg)
    line = str(caught.value)
    assert "\n" not in line
    step = int(
        re.match(
            r"Training diverged at step (\d+): KL [\d.e-]+ per token \(limit"
            r" method.training.divergence=0.0001\)",
            line,
        )[1]
    )
    assert "Lower method.training.learning_rate" in line
    assert step >= 1
    (path,) = (tmp_path / "cache").rglob("*.ckpt")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    assert saved["global_step"] == step
    assert all(torch.isfinite(x).all() for x in saved["state_dict"].values())
    record = stored_record(tmp_path, cfg)
    assert record.status == "failed"
    assert line in record.error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training(cache, monkeypatch, value):
    original = SpectrumModule.performance_of

    def broken(self, indices):
        loss = original(self, indices)
        return loss * value if self.trainer.global_step == 4 else loss

    monkeypatch.setattr(SpectrumModule, "performance_of", broken)
    measured = {
        "kl": 0.0,
        "kl_cut": 0.0,
        "threshold": 0.0,
        "retention": 0.0,
        "retention_at_fixed": 0.0,
    }
    monkeypatch.setattr(SpectrumModule, "measure", lambda self: measured)
    with pytest.raises(UserError, match="diverged at step 4"):
        fit(soco_run("llama_gqa", cache, resumable()))
    (path,) = cache.root.rglob("*.ckpt")
    assert torch.load(path, map_location="cpu", weights_only=True)["global_step"] == 4


def test_samples_kept_aside_are_never_trained_on(cache, monkeypatch):
    """But measured on."""
    original, seen = SpectrumModule.performance_of, {True: set(), False: set()}

    def watched(self, indices):
        seen[torch.is_grad_enabled()].update(indices)
        return original(self, indices)

    monkeypatch.setattr(SpectrumModule, "performance_of", watched)
    run = soco_run("llama_gqa", cache, soco(held_out=2))
    fit(run)
    count = run.training_samples.num_samples
    assert seen[True] == set(range(count - 2)) and seen[False] >= {count - 2, count - 1}


def test_too_few_samples_are_refused(cache):
    with pytest.raises(UserError, match=r"held_out=5 .*there are 5 to train on"):
        fit(soco_run("llama_gqa", cache, soco(held_out=5)))


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def produced(monkeypatch) -> dict[str, Any]:
    """The model that the last run stored, and its training."""
    seen: dict[str, Any] = {}
    training, storing = specomp.methods.spectrum.train, specomp.compression.loop.compress_layers

    def keep_training(*args, **options):
        seen["found"] = training(*args, **options)
        return seen["found"]

    def keep_model(run, *args, **options):
        seen["model"] = run.model
        return storing(run, *args, **options)

    monkeypatch.setattr(specomp.methods.spectrum, "train", keep_training)
    monkeypatch.setattr(specomp.compression.loop, "compress_layers", keep_model)
    return seen


def linears_of(folder: Path, record) -> list[dict[str, str]]:
    with (store(folder).folder / f"{record.key[:12]}.linears.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_record_tells_how_the_training_went(tmp_path, produced):
    record = compose_run(tmp_path, *OVERRIDES)
    assert record.status == "ok"
    assert record.training["steps"] == LAST
    assert [x["phase"] for x in record.training["phases"]] == PHASES
    assert [x["step"] for x in record.training["phases"]] == ENDS
    assert {"kl", "kl_cut", "threshold", "retention", "retention_at_fixed"} <= set(
        record.training["phases"][0]
    )
    assert (
        record.training["phases"][0]["existing"] < record.training["phases"][0]["existing_before"]
    )
    for profile in record.training["profiles"].values():
        assert (
            len(profile["gate"]) == len(profile["kept"])
            and sum(profile["kept"]) > 0
            and max(profile["kept"]) <= 1
        )
        assert all(
            g > 0 or k == 0 for g, k in zip(profile["gate"], profile["kept"], strict=True)
        ), "what is kept has a gate"
    pruning = record.training["pruning"]
    assert {
        "exact_threshold",
        "fixed_threshold",
        "exact_retention",
        "fixed_retention",
        "kept",
        "kept_out_of_order",
    } <= set(pruning)
    assert pruning["exact_retention"] == pytest.approx(record.counted.measured_retention)
    assert 0.58 < record.counted.measured_retention <= 0.6
    curve = produced["found"].trained.report["curve"]
    assert [x["step"] for x in curve] == list(range(1, LAST + 1))
    assert [x["phase"] for x in curve] == [
        name for name, steps in STEPS.items() for _ in range(steps)
    ]
    assert all({"kl", "soft", "hard", "lr", "tokens_per_second"} <= set(x) for x in curve)
    assert {"train", "compress"} <= set(record.seconds)
    (path,) = store(tmp_path).folder.glob(f"{record.key[:12]}*training*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(x["step"]), x["phase"]) for x in rows] == [(x["step"], x["phase"]) for x in curve]
    assert [float(x["kl"]) for x in rows] == pytest.approx(
        [x["kl"] for x in curve], rel=1e-4, abs=1e-9
    )
    other = compose_run(tmp_path, *OVERRIDES, "method.training.pruning.values=plain")
    assert other.key != record.key
    assert (record.cache["misses"]["trained"], other.cache["hits"]["trained"]) == (1, 1)
    assert "trained" not in other.cache["misses"], (
        "another pruning is another record of the same training"
    )
    assert other.training["phases"] == record.training["phases"]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "tiny_qwen"])
def test_the_saved_folder_is_the_model(tmp_path, produced, model):
    record = compose_run(tmp_path, *OVERRIDES, "options.save=true", f"model={model}")
    again = AutoModelForCausalLM.from_pretrained(record.model_folder)
    expected = logits_of(produced["model"])
    assert (logits_of(again) - expected).abs().max() <= 1e-5
    state, saved = produced["model"].state_dict(), again.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in state.items())
    assert any(
        name.endswith("u_proj.bias") and value.abs().sum() > 0 for name, value in saved.items()
    ), "d is stored"


def test_without_deviation_no_bias(tmp_path, produced):
    record = compose_run(
        tmp_path, *OVERRIDES, "options.save=true", "method.training.deviation=false"
    )
    assert all(x is None for x in produced["found"].trained.deviations.values())
    saved = AutoModelForCausalLM.from_pretrained(record.model_folder)
    assert not [name for name in saved.state_dict() if name.endswith("bias")]
    assert (logits_of(saved) - logits_of(produced["model"])).abs().max() <= 1e-5


def test_a_training_can_start_from_a_truncated_spectrum(tmp_path, produced):
    """The equal-budget control: uniform ranks, then KL steps alone."""
    control = [
        "method/allocation=uniform",
        "method.training.phases=[polish]",
        "method.training.stages.polish.cut_losers=false",
    ]
    record = compose_run(tmp_path, *OVERRIDES, *control)
    linears = produced["found"].trained.alive
    for row in linears_of(tmp_path, record):
        m, n = int(row["m"]), int(row["n"])
        uniform = int(0.6 * m * n / (m + n) + 1e-9)
        alive = linears[row["name"]]
        assert alive.tolist() == [i < uniform for i in range(len(alive))], (
            "the largest singular values"
        )
        assert int(row["rank"]) <= uniform
    assert record.counted.measured_retention <= 0.6
    assert record.training["initial_soft_retention"] < 1


def test_recomputed_activations_change_nothing(tmp_path):
    """Less memory, the same training; the decoder layers are left as they were."""
    found = []
    for recompute in (False, True):
        chosen = soco(activation_checkpointing=recompute)
        run = soco_run("llama_gqa", Cache(tmp_path / str(recompute)), chosen)
        found.append(fit(run))
        assert not any("forward" in vars(layer) for layer in run.layers)
    assert torch.equal(flat(found[0]), flat(found[1]))


# --- several processes ----------------------------------------------------------------------------


SHARED = ["method=soco", "method.training.batch_size=2", "method.training.steps_factor=0.04"]
SEVERAL = {
    "ddp_cpu": ["trainer=ddp_cpu"],
    "as ddp": ["trainer=ddp_cpu", "trainer.strategy=ddp_spawn"],
    "fsdp_cpu": ["trainer=fsdp_cpu"],
    "as fsdp": [
        "trainer=fsdp_cpu",
        "trainer.strategy.start_method=spawn",
        "method.training.activation_checkpointing=true",
    ],
}
SHARE = re.compile(r"Process (\d) of 2 holds (\d+) of (\d+) frozen numbers")


def scores_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the one training in a cache ended with."""
    (found,) = (folder / "cache" / "trained").glob("*/scores.safetensors")
    return load_file(found)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Trained by one process that accumulates every batch."""
    folder = tmp_path_factory.mktemp("one")
    done = command(folder, *SHARED, "trainer=default")
    assert done.returncode == 0, done.stderr
    return scores_of(folder)


def same_scores(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(value.float(), found[name].float(), atol=1e-5), name
    assert any(
        float(value.float().std()) > 0.01
        for name, value in expected.items()
        if name.endswith(".scores")
    ), "they did train"


@pytest.mark.parametrize("several", SEVERAL)
def test_two_processes_train_as_one(tmp_path, one_process, several):
    """Two real processes over gloo, each with half of every batch; the sharded ones prune too, and
    each holds half of what is frozen.
    """
    done = command(tmp_path, *SHARED, *SEVERAL[several])
    assert done.returncode == 0, done.stderr
    same_scores(scores_of(tmp_path), one_process)
    if several == "fsdp_cpu":  # whose processes, being forked, log where the run does
        shares = [tuple(map(int, x)) for x in SHARE.findall(done.stdout + done.stderr)]
        totals = sorted({total for _, _, total in shares}, reverse=True)
        assert len(totals) == 2, "as decomposed, and after the pruning"
        for total in totals:
            assert sorted(process for process, _, size in shares if size == total) == [1, 2]
            assert all(
                0.48 * total < mine < 0.52 * total for _, mine, size in shares if size == total
            )


KILLED = """
import sys
from pathlib import Path

sys.path[:0] = [{tests!r}]
from running import compose_config
from specomp.experiment.pipeline import run
from specomp.training.gated import SpectrumModule

original = SpectrumModule.performance


def performance(self):
    if self.trainer.global_step == 5:
        raise RuntimeError("the machine went down")
    return original(self)


SpectrumModule.performance = performance
run(compose_config(Path({folder!r}), *{overrides!r}))
"""


def test_a_killed_sharded_training_goes_on(tmp_path, one_process):
    """After the pruning; the checkpoint holds what trains, as everywhere."""
    overrides = [*SHARED, "trainer=fsdp_cpu", "method.training.checkpoint_every=1"]
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), overrides=overrides)
    )
    killed = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode != 0 and "the machine went down" in killed.stderr, killed.stderr
    (path,) = (tmp_path / "cache").rglob("*.ckpt")
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert state["global_step"] == 4
    assert {name.rpartition(".")[2] for name in state["state_dict"]} == {
        "scores",
        "deviation",
        "alive",
    }
    done = command(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert "from checkpoint" in done.stdout + done.stderr
    same_scores(scores_of(tmp_path), one_process)


def test_a_batch_that_cannot_be_shared_out_is_refused_before_the_model_is_loaded(tmp_path):
    done = typed(tmp_path, "debug=tiny", "method=soco", "trainer=ddp_cpu")
    assert done.returncode != 0
    assert "batch_size=1 is not a multiple of trainer.devices=2" in done.stdout + done.stderr
    assert not (tmp_path / "cache" / "teacher").exists()
