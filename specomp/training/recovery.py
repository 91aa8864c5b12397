"""A training of what a compressed model stores: what is put into it to be trained, one run of it,
cached (adapters.py, scales.py).
"""

import logging
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from specomp.cache import digest
from specomp.compression.run import Run
from specomp.compression.spectra import stored_numbers
from specomp.slots import describe
from specomp.training.distill import DistillationModule
from specomp.training.fit import Result, fit, trained_once
from specomp.training.phases import LastTraining, Phase
from specomp.training.teacher import TeacherStates

log = logging.getLogger(__name__)


class Trainees(Protocol):
    """What is put into a model to be trained. Every process of a training puts in its own: it has
    to be picklable before.

    part: file of it in a cache entry; trains: the names of its parameters in their modules; what:
    it is, for the log; version: raised whenever the same settings would train other numbers.
    """

    part: ClassVar[str]
    trains: ClassVar[tuple[str, ...]]
    version: ClassVar[int]

    @property
    def what(self) -> str:
        """For the log."""

    def put_in(self, model: nn.Module) -> None:
        """Into a model in which nothing trains."""

    def take_out(self, model: nn.Module, *, keep: bool) -> None:
        """With what it has become, or as if it had never been there."""


class RecoveryModule(DistillationModule):
    """The student: the compressed model with trainees in it."""

    def __init__(
        self, run: Run, settings: LastTraining, teacher: TeacherStates, trainees: Trainees
    ) -> None:
        super().__init__(run, settings, teacher)
        self.trainees, self.stored = trainees, trainees.trains

    def configure_model(self) -> None:
        """In every process for itself: what is put in may not be picklable."""
        if not are_in(self.student, self.trainees):
            self.trainees.put_in(self.student)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay, as for gates; `base_lr` is what the schedule multiplies."""
        settings = self.settings
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        group = {
            "params": parameters,
            "lr": settings.learning_rate,
            "base_lr": settings.learning_rate,
        }
        return torch.optim.AdamW([group], betas=settings.betas, weight_decay=0.0)

    def training_step(self, batch: int, batch_idx: int) -> torch.Tensor:
        """The distillation loss: there is no budget left to meet."""
        return self.step_performance(batch_idx)

    def on_train_start(self) -> None:
        """Where it starts from, unless it goes on from a checkpoint."""
        if not self.boundaries:
            self.boundaries.append({"phase": "start", "step": 0, "kl": self.held_out()})

    def end_phase(self, name: str, phase: Phase) -> None:
        """And where it has come to."""
        self.boundaries.append(
            {"phase": name, "step": self.trainer.global_step, "kl": self.held_out()}
        )
        log.info(
            "%s: held-out KL %.3f before, %.3f after.",
            name,
            self.boundaries[0]["kl"],
            self.boundaries[-1]["kl"],
        )


def are_in(model: nn.Module, trainees: Trainees) -> bool:
    """Whether they were put into a model."""
    return any(set(trainees.trains) & set(name.split(".")) for name, _ in model.named_parameters())


def recovered(
    run: Run, settings: LastTraining, teacher: TeacherStates, trainees: Trainees
) -> dict[str, Any]:
    """Train, or take from the cache, in place. Returns how it went; `curve` included. What fails
    leaves the model as it was stored.

    teacher: made while the model was dense.
    """
    key = digest(
        {
            "version": trainees.version,
            "settings": describe(settings),
            "samples": run.training_samples.hash,
            "teacher": teacher.key,
            "half": run.half_forward,
            "seed": run.seed,
            "stored": stored_numbers(run),
            "torch": torch.__version__,
        }
    )
    run.model.requires_grad_(False)
    kept = False

    def fitted(folder: Path) -> Result:
        return fit(run, RecoveryModule(run, settings, teacher, trainees), folder, trainees.what)

    try:
        curve = run.progress.curve_file
        found, report = trained_once(run.cache, key, trainees.part, curve, fitted)
        if not are_in(run.model, trainees):
            trainees.put_in(run.model)
        unexpected = run.model.load_state_dict(found, strict=False).unexpected_keys
        assert not unexpected, unexpected
        kept = True
    finally:
        if are_in(run.model, trainees):
            trainees.take_out(run.model, keep=kept)
        run.model.requires_grad_(False)
    return report
