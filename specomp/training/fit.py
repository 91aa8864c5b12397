"""One training: from the cache, or one Lightning run, from its last checkpoint on if there is one.

A finished training is cached by what determines it. An unfinished one leaves its last checkpoint in
the cache, and the same command continues there.
"""

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from specomp.cache import Cache, waiting
from specomp.compression.module import lightning_loop
from specomp.compression.run import Run
from specomp.disk import make_folder, remove
from specomp.training.distill import Batches, DistillationModule, write_curve
from specomp.training.phases import Distillation

log = logging.getLogger(__name__)
FINAL = "final.ckpt"
Result = tuple[dict[str, Tensor], dict[str, Any]]
"""What trained, by its name in the model; and how it went, JSON-able."""


def trained_once(
    cache: Cache, key: str, part: str, curve_file: Path | None, run: Callable[[Path], Result]
) -> Result:
    """What `run` returns, given a folder for its checkpoints, or returned before under this key.

    The report gains `seconds`; its curve is written to curve_file, one line per optimizer step.
    part: file of the tensors in the entry.
    """
    with waiting(cache.lock("trained", key), "does this training"):
        stored = cache.load("trained", key, part)
        name = f"trained/{key[:24]}/report.json"
        content = cache.load_json(name, older=True)
        cache.count("trained", hit=stored is not None and content is not None)
        if stored is None or content is None:
            start = time.perf_counter()
            folder = cache.writable(f"trained/{key[:24]}/checkpoints")
            stored, content = run(folder)
            cache.save("trained", key, part, stored)
            content |= {"seconds": time.perf_counter() - start}
            cache.save_json(name, content)
            remove(folder)
    if curve_file is not None:
        write_curve(curve_file, content["curve"])
    return stored, content


def fit(run: Run, module: DistillationModule, folder: Path, what: str) -> Result:
    """The run itself. Raises UserError when the training diverges.

    folder: of the checkpoints; whoever stores the result removes it. what: trains, for the log. The
    model in `run` may be the trained one afterwards or not: where several processes trained, this
    one only watched.
    """
    settings, samples, device = module.settings, run.training_samples, run.model.device
    make_folder(folder)
    checkpoint = _latest(folder)
    log.info(
        "Train %s: %d steps of %d samples of %d tokens, %s%s.",
        *(what, module.schedule.total, settings.batch_size, samples.length, settings.precision),
        f", from checkpoint {checkpoint.stem} on" if checkpoint else "",
    )
    with lightning_loop() as terminable:
        # Lightning's advice on workers, logging intervals and resuming
        warnings.simplefilter("ignore")
        if settings.activation_checkpointing:
            for layer in run.layers:
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
        trainer = _trainer(run, settings, module, [terminable], folder)
        batches = Batches(module.schedule.total * trainer.accumulate_grad_batches, module)
        trainer.fit(
            module, batches, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
        )
    module.to(device)
    for layer in run.layers:
        vars(layer).pop("forward", None)
    # A run that was killed between its last step and its end resumes at a checkpoint that is the
    # end.
    ended = folder / FINAL if (folder / FINAL).exists() else checkpoint
    assert ended is not None
    final = torch.load(ended, map_location="cpu", weights_only=True)
    stored = {name.removeprefix("student."): value for name, value in final["state_dict"].items()}
    return stored, {
        "steps": len(final["curve"]),
        "tokens": len(final["curve"]) * settings.batch_size * samples.length,
        "trainable": sum(x.numel() for x in stored.values() if x.is_floating_point()),
        "phases": final["boundaries"],
        "curve": final["curve"],
    }


class _Checkpoints(ModelCheckpoint):
    """Knows after a resume which step it has: it would save it again, in the middle of an
    accumulated gradient.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step


class _Final(L.Callback):
    """The checkpoint that a complete training ends with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)


def _trainer(
    run: Run,
    settings: Distillation,
    module: DistillationModule,
    callbacks: list[L.Callback],
    folder: Path,
) -> L.Trainer:
    """The configured trainer with what a training needs."""
    samples = run.training_samples
    checkpoints = _Checkpoints(
        folder,
        filename="{step:06d}",
        every_n_train_steps=settings.checkpoint_every,
        save_top_k=1,
        monitor=None,
    )
    assert run.trainer is not None, "who trains says with what"
    trainer = run.trainer(
        max_steps=module.schedule.total,
        max_epochs=1,
        accelerator=_accelerator(run),
        callbacks=[*callbacks, module.schedule, checkpoints, _Final(folder / FINAL)],
        enable_checkpointing=True,
        logger=run.progress.training_logger() or False,
        gradient_clip_val=settings.gradient_clip,
        precision="bf16-mixed" if settings.precision == "bfloat16" else "32-true",
    )
    settings.check(run.method, run.budget, samples.num_samples, trainer.world_size, dtype="")
    trainer.accumulate_grad_batches = settings.batch_size // (
        trainer.world_size * settings.micro_batch_size
    )
    return trainer


def _accelerator(run: Run) -> str:
    """What the trainer group says; `auto` is where the model is."""
    chosen = str(getattr(run.trainer, "keywords", {}).get("accelerator", "auto"))
    return (
        {"cuda": "gpu"}.get(run.model.device.type, run.model.device.type)
        if chosen == "auto"
        else chosen
    )


def _latest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; a damaged one is removed, which is logged."""
    for path in sorted(
        folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    ):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
            return path
        except Exception as error:
            log.warning("Checkpoint %s is damaged (%s): removed.", path.name, type(error).__name__)
            remove(path)
    return None
