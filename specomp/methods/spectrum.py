"""Settings of a training of singular spectra: which phases, how a score becomes a gate, how it is optimized, what is kept of it."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from specomp.errors import UserError
from specomp.gates import MAPPINGS, Mapping, MappingName
from specomp.phases import Phase
from specomp.settings import configurable

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


@configurable
class Pruning:
    """What is kept of the trained spectrum: SoCo is (score, trained, trained); everything else is an ablation."""

    exact_budget: bool  # one global threshold found by bisection meets the ratio; false: the fixed threshold, whatever it keeps
    ranks: Literal["trained", "allocation"]  # components per linear: as training left them, or uniform at the wanted retention
    order: Literal["score", "singular_value"]  # which ones: the highest gates, or the largest singular values
    values: Literal["trained", "plain"]  # S as trained, or 1


@configurable
class SpectrumTraining:
    """The settings of a run; see conf/method/training/soco.yaml, where each is explained."""

    stages: dict[str, Phase]
    phases: Annotated[list[str], Field(min_length=1)]
    steps_factor: Positive
    mapping: MappingName
    deviation: bool
    threshold: Positive
    temperature_start: Positive
    temperature_end: Positive
    label_weight: Weight
    learning_rate: Positive
    learning_rate_deviation: Positive
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
    pruning: Pruning

    @model_validator(mode="after")
    def _phases_exist(self) -> "SpectrumTraining":
        unknown = [name for name in self.phases if name not in self.stages]
        if unknown:
            raise ValueError(f"phases {unknown} are none of the stages {sorted(self.stages)}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self

    @property
    def schedule(self) -> dict[str, Phase]:
        """The phases to run, in order, by name; one used twice gets a number."""
        names = [f"{name}{'' if name not in self.phases[:i] else i + 1}" for i, name in enumerate(self.phases)]
        phases = [self.stages[name] for name in self.phases]
        steps = [max(1, round(phase.steps * self.steps_factor)) for phase in phases]
        return {name: replace(phase, steps=count) for name, phase, count in zip(names, phases, steps, strict=True)}

    def check(self, num_samples: int, processes: int) -> None:
        """Whether a calibration set and a trainer fit. Raises UserError."""
        if num_samples <= self.held_out:
            raise UserError(
                f"method.training.held_out={self.held_out} samples are kept aside, but the calibration set has {num_samples}: "
                "raise calibration.num_samples."
            )
        if self.batch_size % (processes * self.micro_batch_size):
            raise UserError(
                f"method.training.batch_size={self.batch_size} is not a multiple of trainer.devices={processes} processes times "
                f"micro_batch_size={self.micro_batch_size}."
            )

    @property
    def gate(self) -> Mapping:
        """How a score becomes a gate."""
        return MAPPINGS[self.mapping]
