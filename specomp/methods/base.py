"""A method is a row: one choice for each slot. The slots' protocols, and what the pipeline hands them.

Slots are frozen settings with a `__call__`; they see names, shapes and statistics, never a model, a tokenizer or a config.
Shapes: W (m, n), r rank.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from specomp.cache import digest
from specomp.factors import LowRankFactors, Norm, Spectrum
from specomp.models.family import LinearSpec
from specomp.phases import Trains
from specomp.ratio import Cost, Ratio
from specomp.settings import configurable
from specomp.statistics import Statistic, Stats

# Files of specomp/methods and specomp/quantization whose formulas are pinned by tests; one beside them is somebody's own.
# fmt: off
OURS = frozenset({
    "adasvd", "anchored", "asvd", "base", "block_refine", "fwsvd", "global_loss", "kronecker", "lora", "pivoted", "soco", "spectrum", "svd",
    "svd_llm", "factors", "gptq", "none", "rtn",
})
# fmt: on
Upstream = Literal["dense", "compressed"]
Probe = Callable[[str, int], float]
"""Mean token loss on the calibration set when one linear (name) is cut to a rank; dense when the name is ''."""


class Spectra(Protocol):
    """Lazy, cached spectra of the dense model, by linear name."""

    def __call__(self, name: str) -> Spectrum:
        """The spectrum of one linear."""


class StatsOf(Protocol):
    """Lazy, cached statistics of the dense model, by linear name."""

    def __call__(self, name: str) -> Stats:
        """The statistics of one linear."""


@runtime_checkable
class Target(Protocol):
    """What W' approximates."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it is made of."""

    def __call__(self, W: Tensor, stats: Stats) -> Tensor:
        """T (m, n)."""


@runtime_checkable
class Whitening(Protocol):
    """In which norm."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics the norm is made of."""

    def __call__(self, stats: Stats) -> Norm:
        """The norm of one linear."""


@runtime_checkable
class Allocation(Protocol):
    """How much rank where."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it reads, of the dense model."""

    def __call__(
        self, linears: Sequence[LinearSpec], target: Ratio, stats: StatsOf, spectra: Spectra, cost: Cost, probe: Probe
    ) -> dict[str, int]:
        """Rank per linear name; at or above break-even means dense. cost: what the packing stores at a rank."""


@runtime_checkable
class Compensation(Protocol):
    """Repair of the factors after truncation, without a gradient step."""

    upstream: Upstream

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it reads, of inputs that passed through `upstream` decoder layers."""

    @property
    def num_samples(self) -> int | None:
        """How many of the calibration samples it reads; None is all."""

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """Better factors of the same rank."""


@runtime_checkable
class Training(Protocol):
    """Gradient steps end to end: specomp.methods.spectrum.SpectrumTraining, specomp.methods.lora.LoRA, or none."""

    trains: Trains


@runtime_checkable
class Packing(Protocol):
    """How factors are stored."""

    def stored(self, m: int, n: int, rank: int) -> int:
        """Numbers it stores for a low-rank m x n matrix (specomp.ratio.Cost)."""

    def __call__(self, linear: nn.Linear, factors: LowRankFactors) -> nn.Module:
        """The module that takes the linear's place."""


@runtime_checkable
class Quantizer(Protocol):
    """Quantization of the factors; bits per stored number, 16 where they stay in the model's dtype."""

    bits: int

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it reads, of the inputs that the method itself last looked at."""

    def __call__(self, factors: LowRankFactors, stats: Stats, dtype: torch.dtype) -> LowRankFactors:
        """The factors for a model of this dtype: QuantizedFactors, or unchanged."""


@configurable
class Method:
    """A compression method: what to approximate, in which norm, how much rank where, how to repair, whether to train, how to store."""

    name: str
    target: Target
    whitening: Whitening
    allocation: Allocation
    compensation: Compensation
    training: Training
    packing: Packing

    @property
    def is_dense(self) -> bool:
        """Whether nothing is compressed: the reference row."""
        return self.name == "dense"

    @property
    def repairs(self) -> bool:
        """Whether a compensation changes what truncation left, before anything is trained."""
        return bool(self.compensation.needs) or self.compensation.upstream == "compressed"


def describe(slot: Any) -> dict[str, Any]:
    """A slot's class and settings, JSON-able: what a cache key or a record says of it; of a class that is not specomp's also its source."""
    settings = {x.name: getattr(slot, x.name) for x in fields(slot)}
    return {"class": type(slot).__name__} | _origin(type(slot)) | {k: _plain(v) for k, v in settings.items()}


def _origin(kind: type) -> dict[str, str]:
    """Module and source of somebody's own class: a name that specomp has too, or an edited formula, must not find what another one left."""
    package, *rest = kind.__module__.split(".")
    if package == "specomp" and (rest[0] not in ("methods", "quantization") or rest[-1] in OURS):
        return {}
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):  # typed into an interpreter
        source = ""
    return {"module": kind.__module__, "source": digest(source)[:16]}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return describe(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
