"""The one callback that runs a training's phases in order."""

from collections.abc import Callable
from typing import Any, Protocol

import lightning as L

from specomp.training.phases import Phase


class Phased(Protocol):
    """What a module must offer to be trained in phases."""

    phase: Phase
    progress: float  # within the phase, in [0, 1)
    position: float  # within the planned run, in [0, 1)

    def performance(self) -> float:
        """Of the last optimizer step, the same on every process."""

    def budget_met(self) -> tuple[float, float]:
        """Hard retention, wanted retention."""

    def end_phase(self, name: str, phase: Phase) -> None:
        """Called once when a phase is over."""


class PhaseSchedule(L.Callback):
    """Runs phases in order: tells the module where it is, sets the learning rate, ends the run. Its
    state goes into the checkpoint.
    """

    def __init__(self, phases: dict[str, Phase], learning_rate: Callable[[float], float]) -> None:
        """learning_rate: multiple of each group's base rate at a share of the planned run in [0,
        1).
        """
        self.names = list(phases)
        self.phases = list(phases.values())
        self.learning_rate = learning_rate
        self.index, self.start = 0, 0
        self.history: list[float] = []

    @property
    def total(self) -> int:
        """Optimizer steps planned."""
        return sum(phase.steps for phase in self.phases)

    @property
    def finished(self) -> bool:
        """Whether every phase is over."""
        return self.index == len(self.phases)

    @property
    def name(self) -> str:
        """Of the current phase, or of the last one when all are over."""
        return self.names[min(self.index, len(self.names) - 1)]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where the run is, as a function of the step and of when the phase began."""
        if self.finished:
            return
        done = trainer.global_step - self.start
        pl_module.phase = self.phases[self.index]
        pl_module.progress = done / self.phases[self.index].steps
        pl_module.position = (
            sum(phase.steps for phase in self.phases[: self.index]) + done
        ) / self.total
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["base_lr"] * self.learning_rate(pl_module.position)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on when the phase is over. Batches that only accumulate a gradient change
        nothing.
        """
        if self.finished:
            return
        done, phase = trainer.global_step - self.start, self.phases[self.index]
        if done <= len(self.history):
            return
        self.history.append(pl_module.performance())
        if done < phase.steps and not (
            phase.until and phase.until.reached(self.history, *pl_module.budget_met())
        ):
            return
        pl_module.end_phase(self.name, phase)
        self.index, self.start, self.history = self.index + 1, trainer.global_step, []
        trainer.should_stop = self.finished

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"index": self.index, "start": self.start, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.index = state_dict["index"]
        self.start = state_dict["start"]
        self.history = list(state_dict["history"])
