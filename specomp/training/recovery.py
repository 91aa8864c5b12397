"""A training of what a compressed model stores: what is put into it to be trained, one run of it,
cached (adapters.py, scales.py).
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specomp.cache import digest
from specomp.compression.run import Run
from specomp.compression.spectra import stored_numbers
from specomp.slots import describe
from specomp.training.distill import DistillationModule
from specomp.training.fit import Result, fit, trained_once
from specomp.training.phases import Phase, Recovery
from specomp.training.teacher import TeacherStates

log = logging.getLogger(__name__)


class RecoveryModule(DistillationModule):
    """The student: the compressed model, with parameters of these names put in, which train."""

    def __init__(
        self, run: Run, settings: Recovery, teacher: TeacherStates, trains: tuple[str, ...]
    ) -> None:
        super().__init__(run, settings, teacher)
        self.stored = trains

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


def recovered(
    run: Run,
    settings: Recovery,
    teacher: TeacherStates,
    put_in: Callable[[], None],
    *,
    part: str,
    trains: tuple[str, ...],
    what: str,
    version: int,
) -> dict[str, Any]:
    """Train what `put_in` puts into the model, or take it from the cache; it is in the model then.
    Returns how it went; `curve` included.

    part: file of what trains in its cache entry; trains: the names of its parameters in their
    modules; what: they are, for the log; version: of how they are trained.
    """
    key = digest(
        {
            "version": version,
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
    put_in()

    def fitted(folder: Path) -> Result:
        return fit(run, RecoveryModule(run, settings, teacher, trains), folder, what)

    found, report = trained_once(run.cache, key, part, run.progress.curve_file, fitted)
    unexpected = run.model.load_state_dict(found, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return report
