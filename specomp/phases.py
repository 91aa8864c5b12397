"""Training as an ordered list of phases: what a step knows, how a phase weighs it, and the one callback that runs them in order."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import lightning as L
from pydantic import Field
from torch import Tensor

from specomp.settings import configurable

log = logging.getLogger(__name__)
Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What one training step knows. Computed once by the module; a phase only weighs it."""

    performance: Tensor  # per token: KL(dense || compressed), plus the label loss where asked for
    soft_retention: Tensor  # differentiable
    hard_retention: float  # counted at the threshold
    gates: Tensor  # (K,) of all components
    threshold: float
    target: float  # retention wanted
    initial: float  # soft retention when the training began


@configurable
class Convergence:
    """When a phase may end before its steps are used up: the budget is met and the performance loss no longer falls."""

    window: Annotated[int, Field(ge=2)]  # steps averaged; compared with as many before them
    tolerance: Annotated[float, Field(ge=0)]  # relative fall of the mean performance loss that still counts as progress

    def reached(self, history: Sequence[float], hard_retention: float, target: float) -> bool:
        """history: performance loss of every step of the phase so far."""
        if len(history) < 2 * self.window or hard_retention > target:
            return False
        now, before = (sum(part) / self.window for part in (history[-self.window :], history[-2 * self.window : -self.window]))
        return now >= before * (1 - self.tolerance)


@configurable
class Phase(ABC):
    """One stage of a training schedule."""

    steps: Steps  # optimizer steps, at most
    until: Convergence | None  # null: exactly `steps`
    # Physical pruning at the end of the phase: keep the best components worth this multiple of the wanted retention; null: keep all.
    prune_margin: Annotated[float, Field(ge=1)] | None

    @abstractmethod
    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """The scalar to minimize; progress in [0, 1) within the phase."""

    def cut(self, progress: float) -> float:
        """How far the components below the threshold are faded out, in [0, 1]."""
        return 0.0


@configurable
class Recovery(Phase):
    """Performance loss alone: with the losers cut, a polish; on a truncated spectrum, the equal-budget control of SoCo."""

    cut_losers: bool

    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """Performance loss."""
        return terms.performance

    def cut(self, progress: float) -> float:
        """All or nothing."""
        return float(self.cut_losers)


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
    """Runs phases in order: tells the module where it is, sets the learning rate, ends the run. Its state goes into the checkpoint."""

    def __init__(self, phases: dict[str, Phase], learning_rate: Callable[[float], float]) -> None:
        """learning_rate: multiple of each group's base rate at a share of the planned run in [0, 1)."""
        self.names, self.phases, self.learning_rate = list(phases), list(phases.values()), learning_rate
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

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Where the run is, as a function of the step and of when the phase began."""
        if self.finished:
            return
        done = trainer.global_step - self.start
        pl_module.phase, pl_module.progress = self.phases[self.index], done / self.phases[self.index].steps
        pl_module.position = (sum(phase.steps for phase in self.phases[: self.index]) + done) / self.total
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["base_lr"] * self.learning_rate(pl_module.position)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move on when the phase is over. Batches that only accumulate a gradient change nothing."""
        if self.finished:
            return
        done, phase = trainer.global_step - self.start, self.phases[self.index]
        if done <= len(self.history):
            return
        self.history.append(pl_module.performance())
        if done < phase.steps and not (phase.until and phase.until.reached(self.history, *pl_module.budget_met())):
            return
        pl_module.end_phase(self.name, phase)
        self.index, self.start, self.history = self.index + 1, trainer.global_step, []
        trainer.should_stop = self.finished

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"index": self.index, "start": self.start, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.index, self.start, self.history = state_dict["index"], state_dict["start"], list(state_dict["history"])


@dataclass(frozen=True)
class Cosine:
    """Multiple of the base learning rate: linear from 0 over the share `warmup` of the run, then half a cosine down to `final`."""

    warmup: float
    final: float

    def __call__(self, done: float) -> float:
        """At a share of the planned run in [0, 1)."""
        if done < self.warmup:
            return done / self.warmup
        share = (done - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2
