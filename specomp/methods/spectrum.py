"""Settings of a training of singular spectra: which phases, how a score becomes a gate, how it is optimized, what is kept of it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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
    mapping: MappingName
    deviation: bool
    threshold: Positive
    temperature_start: Positive
    temperature_end: Positive
    straight_through: bool
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
        return {f"{name}{'' if name not in self.phases[:i] else i + 1}": self.stages[name] for i, name in enumerate(self.phases)}

    @property
    def gate(self) -> Mapping:
        """How a score becomes a gate."""
        return MAPPINGS[self.mapping]
