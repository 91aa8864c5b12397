"""What every training against the dense model has to be told, whatever its gradient steps move."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from specomp.errors import UserError
from specomp.methods.base import Trains
from specomp.phases import Phase
from specomp.settings import configurable

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


@configurable
class Distillation(ABC):
    """The settings that trainings share; see conf/method/training/soco.yaml, where each is explained."""

    trains: ClassVar[Trains]

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

    @model_validator(mode="after")
    def _batches_divide(self) -> "Distillation":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self

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
