"""Training as an ordered list of phases: what a step knows, how a phase weighs it, what all
trainings share.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from specomp.compression.run import Run
from specomp.errors import UserError
from specomp.numerics.gates import MAPPINGS, MappingName
from specomp.numerics.gates import Mapping as GateMapping
from specomp.settings import configurable
from specomp.slots import Method
from specomp.training.teacher import TeacherStates

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


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
    """When a phase may end before its steps are used up: the budget is met and the performance loss
    no longer falls.
    """

    window: Annotated[int, Field(ge=2)]  # steps averaged; compared with as many before them
    # relative fall of the mean performance loss that still counts as progress
    tolerance: Annotated[float, Field(ge=0)]

    def reached(self, history: Sequence[float], hard_retention: float, target: float) -> bool:
        """history: performance loss of every step of the phase so far."""
        if len(history) < 2 * self.window or hard_retention > target:
            return False
        now, before = (
            sum(part) / self.window
            for part in (history[-self.window :], history[-2 * self.window : -self.window])
        )
        return now >= before * (1 - self.tolerance)


@configurable
class Phase:
    """One stage of a training schedule; by itself, one that only lowers the performance loss."""

    steps: Count  # optimizer steps, at most
    until: Convergence | None  # null: exactly `steps`
    # Physical pruning at the end of the phase: keep the best components worth this multiple of the
    # wanted retention; null: keep all.
    prune_margin: Annotated[float, Field(ge=1)] | None

    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """The scalar to minimize; progress in [0, 1) within the phase."""
        return terms.performance

    def cut(self, progress: float) -> float:
        """How far the components below the threshold are faded out, in [0, 1]."""
        return 0.0


@configurable
class Distillation(ABC):
    """The settings that trainings share; see conf/method/training/soco.yaml, where each is
    explained.
    """

    active: ClassVar[bool] = True
    # whether gradients of whole weights are taken, which are made anew in every forward pass
    weighs: ClassVar[bool] = False

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
        """How many samples of the calibration's text it trains on: what was asked for, or those of
        the calibration set.
        """
        return self.num_samples or calibration

    @model_validator(mode="after")
    def _batches_divide(self) -> "Distillation":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size"
                f" {self.micro_batch_size}"
            )
        return self

    @property
    def work(self) -> "Distillation":
        """The schedule and what a step takes."""
        return self

    def before(self, run: Run) -> TeacherStates:
        """The dense model's states on the samples to train on."""
        with run.progress.stage("train"):
            return TeacherStates(run)

    def check(
        self, method: Method, budget: Any, num_samples: int, processes: int, dtype: str
    ) -> None:
        """Whether the samples to train on, a trainer and the model's dtype fit. Raises
        UserError.
        """
        # autocast mixes bfloat16 with float32 only
        if self.precision == "bfloat16" and dtype == "float16":
            raise UserError(
                f"{type(self).__name__} in bfloat16 cannot train a float16 model: "
                "set model.dtype=bfloat16, or method.training.precision=float32."
            )
        if num_samples <= self.held_out:
            raise UserError(
                f"method.training.held_out={self.held_out} samples are kept aside, but there are"
                f" {num_samples} to train on: raise method.training.num_samples, or"
                " calibration.num_samples."
            )
        if self.batch_size % (processes * self.micro_batch_size):
            raise UserError(
                f"method.training.batch_size={self.batch_size} is not a multiple of"
                f" trainer.devices={processes} processes times"
                f" micro_batch_size={self.micro_batch_size}."
            )


@configurable
class Pruning:
    """What is kept of the trained spectrum: SoCo is (score, trained, trained); everything else is
    an ablation.
    """

    # one global threshold found by bisection meets the ratio; false: the fixed threshold, whatever
    # it keeps
    exact_budget: bool
    # components per linear: as training left them, or uniform at the wanted retention
    ranks: Literal["trained", "allocation"]
    # which ones: the highest gates, or the largest singular values
    order: Literal["score", "singular_value"]
    values: Literal["trained", "plain"]  # S as trained, or 1


@configurable
class SpectrumSettings(Distillation):
    """Which phases, how a score becomes a gate, how it is optimized, what is kept; see
    conf/method/training/soco.yaml.
    """

    stages: dict[str, Phase]
    phases: Annotated[list[str], Field(min_length=1)]
    steps_factor: Positive
    mapping: MappingName
    deviation: bool
    threshold: Positive
    temperature_start: Positive
    temperature_end: Positive
    learning_rate_deviation: Positive
    pruning: Pruning

    @model_validator(mode="after")
    def _phases_exist(self) -> "SpectrumSettings":
        unknown = [name for name in self.phases if name not in self.stages]
        if unknown:
            raise ValueError(f"phases {unknown} are none of the stages {sorted(self.stages)}")
        return self

    @property
    def schedule(self) -> dict[str, Phase]:
        """The phases to run, in order, by name; one used twice gets a number."""
        names = [
            f"{name}{'' if name not in self.phases[:i] else i + 1}"
            for i, name in enumerate(self.phases)
        ]
        phases = [self.stages[name] for name in self.phases]
        steps = [max(1, round(phase.steps * self.steps_factor)) for phase in phases]
        return {
            name: replace(phase, steps=count)
            for name, phase, count in zip(names, phases, steps, strict=True)
        }

    @property
    def gate(self) -> GateMapping:
        """How a score becomes a gate."""
        return MAPPINGS[self.mapping]


@configurable
class LastTraining(Distillation):
    """The settings of a training that comes last and chooses nothing: one phase, after everything
    is stored.
    """

    chooses: ClassVar[bool] = False
    adds_bias: ClassVar[bool] = False

    steps: Count

    @property
    def schedule(self) -> Mapping[str, Phase]:
        """One phase."""
        return {"recover": Phase(steps=self.steps, until=None, prune_margin=None)}

    def forms(
        self, run: Run, prepared: TeacherStates, choices: Any, statistics: Any, spectra: Any
    ) -> None:
        """The allocation's."""

    def after(self, run: Run, prepared: TeacherStates) -> dict[str, Any]:
        """Train, and report without the curve."""
        with run.progress.stage("train"):
            report = self.recover(run, prepared)
        run.progress.trained(report)
        samples = run.training_samples
        kept = {name: value for name, value in report.items() if name != "curve"}
        return kept | {"samples": samples.num_samples, "samples_hash": samples.hash}

    @abstractmethod
    def recover(self, run: Run, teacher: TeacherStates) -> dict[str, Any]:
        """Train what is stored in place; returns how it went, `curve` included."""


@dataclass(frozen=True)
class Cosine:
    """Multiple of the base learning rate: linear from 0 over the share `warmup` of the run, then
    half a cosine down to `final`.
    """

    warmup: float
    final: float

    def __call__(self, done: float) -> float:
        """At a share of the planned run in [0, 1)."""
        if done < self.warmup:
            return done / self.warmup
        share = (done - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2
