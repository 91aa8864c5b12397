"""Settings of a training of singular spectra: which phases, how a score becomes a gate, how it is optimized, what is kept of it."""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from specomp.gates import MAPPINGS, Mapping, MappingName
from specomp.phases import Distillation, Phase, Positive, Trains
from specomp.settings import configurable


@configurable
class Pruning:
    """What is kept of the trained spectrum: SoCo is (score, trained, trained); everything else is an ablation."""

    exact_budget: bool  # one global threshold found by bisection meets the ratio; false: the fixed threshold, whatever it keeps
    ranks: Literal["trained", "allocation"]  # components per linear: as training left them, or uniform at the wanted retention
    order: Literal["score", "singular_value"]  # which ones: the highest gates, or the largest singular values
    values: Literal["trained", "plain"]  # S as trained, or 1


@configurable
class SpectrumTraining(Distillation):
    """The settings of a run; see conf/method/training/soco.yaml, where each is explained."""

    trains: ClassVar[Trains] = "spectrum"

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
    def _phases_exist(self) -> "SpectrumTraining":
        unknown = [name for name in self.phases if name not in self.stages]
        if unknown:
            raise ValueError(f"phases {unknown} are none of the stages {sorted(self.stages)}")
        return self

    @property
    def schedule(self) -> dict[str, Phase]:
        """The phases to run, in order, by name; one used twice gets a number."""
        names = [f"{name}{'' if name not in self.phases[:i] else i + 1}" for i, name in enumerate(self.phases)]
        phases = [self.stages[name] for name in self.phases]
        steps = [max(1, round(phase.steps * self.steps_factor)) for phase in phases]
        return {name: replace(phase, steps=count) for name, phase, count in zip(names, phases, steps, strict=True)}

    @property
    def gate(self) -> Mapping:
        """How a score becomes a gate."""
        return MAPPINGS[self.mapping]
