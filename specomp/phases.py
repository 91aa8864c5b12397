"""Training as an ordered list of phases: what a step knows, how a phase weighs it, the one callback that runs them, their settings."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import lightning as L
from pydantic import Field, model_validator
from torch import Tensor

from specomp.errors import UserError
from specomp.settings import configurable

log = logging.getLogger(__name__)
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Trains = Literal["nothing", "spectrum", "stored"]
"""What a training's gradient steps move: gates of singular components, before packing; or the numbers that are stored, after it."""


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
class Phase:
    """One stage of a training schedule; by itself, one that only lowers the performance loss."""

    steps: Count  # optimizer steps, at most
    until: Convergence | None  # null: exactly `steps`
    # Physical pruning at the end of the phase: keep the best components worth this multiple of the wanted retention; null: keep all.
    prune_margin: Annotated[float, Field(ge=1)] | None

    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """The scalar to minimize; progress in [0, 1) within the phase."""
        return terms.performance

    def cut(self, progress: float) -> float:
        """How far the components below the threshold are faded out, in [0, 1]."""
        return 0.0


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


@configurable
class Distillation(ABC):
    """The settings that trainings share; see conf/method/training/soco.yaml, where each is explained."""

    trains: ClassVar[Trains]

    num_samples: Count | None
    label_weight: Weight
    learning_rate: Positive
    learning_rate_final: Share
    warmup: Annotated[float, Field(ge=0, lt=1)]
    betas: tuple[Share, Share]
    gradient_clip: Positive | None
    batch_size: Count
    micro_batch_size: Count
    precision: Literal["float32", "bfloat16"]
    token_chunk: Count
    activation_checkpointing: bool
    held_out: Count
    checkpoint_every: Count
    divergence: Positive

    @property
    @abstractmethod
    def schedule(self) -> Mapping[str, Phase]:
        """The phases to run, in order, by name."""

    def samples_of(self, calibration: int) -> int:
        """How many samples of the calibration's text it trains on: what was asked for, or those of the calibration set."""
        return self.num_samples or calibration

    @model_validator(mode="after")
    def _batches_divide(self) -> "Distillation":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self

    def check(self, num_samples: int, processes: int) -> None:
        """Whether the samples to train on and a trainer fit. Raises UserError."""
        if num_samples <= self.held_out:
            raise UserError(
                f"method.training.held_out={self.held_out} samples are kept aside, but there are {num_samples} to train on: "
                "raise method.training.num_samples, or calibration.num_samples."
            )
        if self.batch_size % (processes * self.micro_batch_size):
            raise UserError(
                f"method.training.batch_size={self.batch_size} is not a multiple of trainer.devices={processes} processes times "
                f"micro_batch_size={self.micro_batch_size}."
            )


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
