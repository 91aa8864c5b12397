"""What a compression works on: a model, a method, a budget, tokens. Everything that is decided
before numbers are seen.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specomp.cache import Cache
from specomp.compression.route import Route
from specomp.data.calibration import Calibration, CalibrationSet
from specomp.forms.prices import Budget
from specomp.models.family import LinearSpec, ModelFamily, Unit
from specomp.models.store import LayerStore
from specomp.numerics.statistics import Precision
from specomp.slots import Form, Method

log = logging.getLogger(__name__)


class Progress:
    """What a run tells whoever listens; by itself it keeps time and notes. An experiment's listener
    also writes them down.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a stage; one that is entered twice adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def note(self, text: str) -> None:
        """Something a reader of the numbers should know."""
        if text not in self.notes:
            self.notes.append(text)
        log.warning("%s", text)

    def layer(self, index: int) -> None:
        """The modules of a decoder layer are final; those of a streamed model lose their numbers
        after that.
        """

    def trained(self, account: dict[str, Any], figure: Any = None) -> None:
        """A training is over; account: JSON-able, with its curve; figure: what a drawing of it is
        made of.
        """

    @property
    def curve_file(self) -> Path | None:
        """csv with one line per optimizer step, written while it trains; None: nowhere."""
        return None

    def training_logger(self) -> Any:
        """One of Lightning's loggers, or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One compression. Nothing in it changes but the model, in place."""

    model: PreTrainedModel
    family: ModelFamily
    method: Method
    budget: Budget
    calibration: Calibration
    samples: CalibrationSet
    training_samples: CalibrationSet
    held_out: CalibrationSet | None = None  # a search measures on it
    cache: Cache
    model_key: str  # what the model's numbers are known by in the cache
    seed: int = 0
    trainer: Callable[..., Any] | None = (
        None  # makes a lightning.Trainer; None: a training's own default
    )
    processes: int = 1  # of the trainer
    store: LayerStore | None = None  # where the decoder layers of a streamed model are
    progress: Progress = field(default_factory=Progress)
    left: frozenset[str] = frozenset()  # linears that stay as they are, by name

    @cached_property
    def linears(self) -> list[LinearSpec]:
        """The compressible linears, as they were when the run began."""
        return [x for x in self.family.linears(self.model) if x.name not in self.left]

    @cached_property
    def units(self) -> list[Unit]:
        """What the budget is shared out among."""
        return [x for x in self.family.units(self.model) if x.name not in self.left]

    @cached_property
    def wide_units(self) -> dict[Unit, Sequence[Form]]:
        """Units of several linears that the method may store as one, and how."""
        if not self.method.spends:
            return {}
        found = self.method.units.forms(self.family.functional_units(self.model))
        return {unit: self.method.rounding.wide(forms) for unit, forms in found.items()}

    @cached_property
    def forms(self) -> Sequence[Form]:
        """What a linear may be stored in by itself."""
        return self.method.rounding.single(self.method.packing)

    @cached_property
    def route(self) -> Route:
        """Which statistics, streams, spectra and stages the method takes."""
        return Route.of(self.method, self.calibration.upstream, self.samples.num_samples)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return self.family.layers(self.model)

    def resident(self, decoder_layer: int) -> AbstractContextManager[None]:
        """While it is open the decoder layer has its numbers, which a streamed model's has only
        then.
        """
        return nullcontext() if self.store is None else self.store.resident(decoder_layer)

    def device(self, decoder_layer: int) -> torch.device:
        """Where a decoder layer is worked on."""
        return (
            next(self.layers[decoder_layer].parameters()).device
            if self.store is None
            else self.store.device
        )

    def forward_precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products in the forward pass where asked for; the residual stream and the norms
        keep the model's precision.
        """
        return (
            torch.autocast(self.model.device.type, torch.bfloat16)
            if self.half_forward
            else nullcontext()
        )

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
        """Of the statistics."""
        return self.calibration.statistics_precision
