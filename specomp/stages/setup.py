"""What every stage works on, gathered once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.cache import Cache
from specomp.data.calibration import CalibrationSet, CalibrationSpec
from specomp.models.family import LinearSpec, ModelFamily
from specomp.models.store import LayerStore
from specomp.statistics import Precision


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
    processes: int = 1  # of the trainer
    store: LayerStore | None = None  # where the decoder layers of a streamed model are

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return self.family.layers(self.model)

    def resident(self, decoder_layer: int) -> AbstractContextManager[None]:
        """While it is open the decoder layer has its numbers, which a streamed model's has only then."""
        return nullcontext() if self.store is None else self.store.resident(decoder_layer)

    def device(self, decoder_layer: int) -> torch.device:
        """Where a decoder layer is worked on."""
        return next(self.layers[decoder_layer].parameters()).device if self.store is None else self.store.device

    def forward_precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products in the forward pass where asked for; the residual stream and the norms keep the model's precision."""
        return torch.autocast(self.model.device.type, torch.bfloat16) if self.half_forward else nullcontext()

    @property
    def is_dense(self) -> bool:
        """Whether every linear is still the dense one."""
        return all(isinstance(self.model.get_submodule(x.name), nn.Linear) for x in self.linears)

    @property
    def half_forward(self) -> bool:
        """Whether a float32 model runs its calibration passes in bfloat16."""
        return self.calibration.precision == "bfloat16" and self.model.dtype == torch.float32

    @property
    def precision(self) -> Precision:
        """Of the statistics: sums in `accumulate`, products in float32 unless less was asked for, or float64 sums were."""
        if self.calibration.accumulate == "float64":
            return Precision(torch.float64, torch.float64)
        return Precision(torch.float32, torch.float32 if self.calibration.precision == "float32" else torch.bfloat16)
