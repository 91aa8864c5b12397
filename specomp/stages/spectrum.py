"""From spectra to trained gates and back to factors: the run that surrounds stages/train.py, its cache, its checkpoints.

A finished training is cached by what determines it, so that every ablation of what is kept of it (method.training.pruning) reads one run.
An unfinished one leaves its last checkpoint in the cache, and the same command continues there.
"""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from specomp.cache import atomic_path, digest, make_folder, waiting
from specomp.methods.base import Method, describe
from specomp.methods.spectrum import SpectrumTraining
from specomp.modules import GatedLinear, replace_linear
from specomp.ratio import Cost, Ratio, is_low_rank, pair_cost
from specomp.stages.calibrate import lightning_loop, linear_module
from specomp.stages.decompose import DenseSpectra
from specomp.stages.setup import Setup
from specomp.stages.teacher import TeacherStates
from specomp.stages.train import HISTOGRAM, Batches, SpectrumModule, write_curve

log = logging.getLogger(__name__)
# Bumped whenever the same settings would train other scores.
VERSION = 1
FINAL = "final.ckpt"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training decided, per linear: gates (k,), which components still exist (k,), and d (m) or None; and how it went."""

    gates: dict[str, Tensor]
    alive: dict[str, Tensor]
    deviations: dict[str, Tensor | None]
    report: dict[str, Any]


def train(
    setup: Setup,
    method: Method,
    ratio: Ratio,
    ranks: Mapping[str, int],
    spectra: DenseSpectra,
    *,
    seed: int,
    curve_file: Path,
    logger: Callable[[], Any],
) -> Trained:
    """Trained gates: from the cache, from a checkpoint on, or from the start. Raises UserError when the training diverges.

    ranks: components each linear starts with, the largest first; at or above break-even it starts with all of them.
    curve_file: csv with one line per optimizer step; logger: makes a Lightning logger, or None, asked only if there is something to train.
    """
    training, cache = settings_of(method), setup.cache
    settings = describe(training)
    pruning = settings.pop("pruning")
    pair, price = ([cost(x.m, x.n, 2) for x in setup.linears] for cost in (pair_cost, method.packing.stored))
    key = digest(
        {
            "version": VERSION,
            "spectra": spectra.key,
            "samples": setup.samples.hash,
            "half": setup.half_forward,
            "settings": settings | {"stages": {name: describe(phase) for name, phase in training.schedule.items()}},
            "exact_budget": pruning["exact_budget"],
            "retention": ratio.retention,
            "ranks": dict(ranks),
            "seed": seed,
        }
        | ({} if price == pair else {"price": price})
    )
    with waiting(cache.lock("trained", key), "trains this spectrum"):
        stored, report = cache.load("trained", key, "scores"), cache.path("trained", key, "report").with_suffix(".json")
        hit = stored is not None and report.exists()
        cache.count("trained", hit=hit)
        if not hit:
            folder = cache.path("trained", key, "checkpoints").with_suffix("")
            stored, content = _fit(setup, method, ratio, ranks, spectra, seed, folder, curve_file, logger)
            cache.save("trained", key, "scores", stored)
            with atomic_path(report) as temporary:
                temporary.write_text(json.dumps(content))
            shutil.rmtree(folder, ignore_errors=True)
    assert stored is not None
    content = json.loads(report.read_text())
    write_curve(curve_file, content["curve"])
    names = [x.name for x in setup.linears]
    return Trained(
        gates={name: training.gate.to_gate(stored[f"{name}.scores"]) for name in names},
        alive={name: stored[f"{name}.alive"] for name in names},
        deviations={name: stored.get(f"{name}.deviation") for name in names},
        report=content,
    )


def settings_of(method: Method) -> SpectrumTraining:
    """The training slot; that it is one for spectra was checked when the experiment was built."""
    assert isinstance(method.training, SpectrumTraining)
    return method.training


def _fit(
    setup: Setup,
    method: Method,
    ratio: Ratio,
    ranks: Mapping[str, int],
    spectra: DenseSpectra,
    seed: int,
    folder: Path,
    curve_file: Path,
    logger: Callable[[], Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    training, samples, start = settings_of(method), setup.samples, time.perf_counter()
    teacher, device = TeacherStates(setup), setup.model.device
    gated = gate(setup, training, ranks, spectra, method.packing.stored)
    module = SpectrumModule(setup, training, ratio, teacher, gated, cost=method.packing.stored, seed=seed, curve_file=curve_file)
    make_folder(folder)
    checkpoint = _latest(folder)
    log.info(
        "Train %d scores%s of %d linears: %d steps of %d samples of %d tokens, %s%s.",
        *(sum(len(x.scores) for x in gated.values()), " and biases" if training.deviation else "", len(gated)),
        *(module.schedule.total, training.batch_size, samples.length, training.precision),
        f", from checkpoint {checkpoint.stem} on" if checkpoint else "",
    )
    with lightning_loop() as terminable:
        warnings.simplefilter("ignore")  # Lightning's advice on workers, logging intervals and resuming
        if training.activation_checkpointing:
            for layer in setup.layers:
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
        trainer = _trainer(setup, training, module, [terminable], folder, logger())
        batches = Batches(module.schedule.total * trainer.accumulate_grad_batches, module)
        trainer.fit(module, batches, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    module.to(device)
    for layer in setup.layers:
        vars(layer).pop("forward", None)
    # Not from the module: where several processes trained, this one only watched.
    # A run that was killed between its last step and its end resumes at a checkpoint that is the end.
    ended = folder / FINAL if (folder / FINAL).exists() else checkpoint
    assert ended is not None
    final = torch.load(ended, map_location="cpu", weights_only=True)
    stored = {name.removeprefix("student."): value for name, value in final["state_dict"].items()}
    content = {
        "steps": len(final["curve"]),
        "tokens": len(final["curve"]) * training.batch_size * samples.length,
        "seconds": time.perf_counter() - start,
        "trainable": sum(x.numel() for x in stored.values() if x.is_floating_point()),
        "initial_soft_retention": module.initial,
        "phases": final["boundaries"],
        "histogram_top": HISTOGRAM[1],
        "curve": final["curve"],
    }
    return stored, content


class _Checkpoints(ModelCheckpoint):
    """Knows after a resume which step it has: it would save it again, in the middle of an accumulated gradient."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step


class _Final(L.Callback):
    """The checkpoint that a complete training ends with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _trainer(
    setup: Setup, training: SpectrumTraining, module: SpectrumModule, callbacks: list[L.Callback], folder: Path, logger: Any
) -> L.Trainer:
    """The configured trainer with what a training needs."""
    checkpoints = _Checkpoints(folder, filename="{step:06d}", every_n_train_steps=training.checkpoint_every, save_top_k=1, monitor=None)
    trainer = setup.trainer(
        max_steps=module.schedule.total,
        max_epochs=1,
        accelerator=_accelerator(setup),
        callbacks=[*callbacks, module.schedule, checkpoints, _Final(folder / FINAL)],
        enable_checkpointing=True,
        logger=logger or False,
        gradient_clip_val=training.gradient_clip,
        precision="bf16-mixed" if training.precision == "bfloat16" else "32-true",
    )
    training.check(setup.samples.num_samples, trainer.world_size)
    trainer.accumulate_grad_batches = training.batch_size // (trainer.world_size * training.micro_batch_size)
    return trainer


def _accelerator(setup: Setup) -> str:
    """What the trainer group says; `auto` is where the model is."""
    chosen = str(getattr(setup.trainer, "keywords", {}).get("accelerator", "auto"))
    return {"cuda": "gpu"}.get(setup.model.device.type, setup.model.device.type) if chosen == "auto" else chosen


def gate(
    setup: Setup, training: SpectrumTraining, ranks: Mapping[str, int], spectra: DenseSpectra, cost: Cost = pair_cost
) -> dict[str, GatedLinear]:
    """Replace every linear of the model by its gated components, in place."""
    setup.model.requires_grad_(False)
    dtype = torch.bfloat16 if training.precision == "bfloat16" else torch.float32
    gated = {}
    for linear in setup.linears:
        spectrum, dense = spectra(linear.name), linear_module(setup.model, linear)
        module = GatedLinear(
            spectrum.U.to(dtype),
            spectrum.rows.to(dtype),
            dense.bias,
            to_gate=training.gate.to_gate,
            start=training.gate.start,
            deviation=training.deviation,
        )
        if is_low_rank(linear.m, linear.n, ranks[linear.name], cost):
            module.prune(torch.arange(len(spectrum.s), device=spectrum.s.device) < ranks[linear.name])
        replace_linear(setup.model, linear.name, module)
        gated[linear.name] = module
    return gated


def _latest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; a damaged one is removed, which is logged."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
            return path
        except Exception as error:
            log.warning("Checkpoint %s is damaged (%s): removed.", path.name, type(error).__name__)
            path.unlink()
    return None
