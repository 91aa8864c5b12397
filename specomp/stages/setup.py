"""What every stage works on, gathered once."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.cache import Cache
from specomp.data.calibration import CalibrationSet, CalibrationSpec
from specomp.models.family import LinearSpec, ModelFamily


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A loaded model with its calibration set and the store that its statistics and spectra are shared through."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: ModelFamily
    linears: list[LinearSpec]
    calibration: CalibrationSpec
    samples: CalibrationSet
    cache: Cache
    model_key: str
    trainer: Callable[..., L.Trainer]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return self.family.layers(self.model)

    @property
    def accumulate(self) -> torch.dtype:
        """Precision of the running sums."""
        return torch.float64 if self.calibration.accumulate == "float64" else torch.float32
