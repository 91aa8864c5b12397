"""Sizes known without data: the model's, the ranks', the statistics', the spectra's. Nothing here depends on a machine.

Shapes: m out_features, n in_features, k = min(m, n), r rank.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specomp.compression.ledger import Size, measure
from specomp.compression.observe import stats_of
from specomp.errors import UserError
from specomp.forms.options import fill_ranks, full_rank, stored
from specomp.forms.pivoted import Pivoted
from specomp.models.families import family_of
from specomp.models.family import LinearSpec
from specomp.models.load import skeleton
from specomp.numerics.ratio import Ratio, break_even_rank, is_low_rank
from specomp.numerics.statistics import Precision, Statistic
from specomp.slots import Method, Quantizer, Whitening

META = torch.device("meta")
FLOAT = 4  # bytes: statistics of float32 sums, spectra


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model is counted."""

    linears: list[LinearSpec]
    biased: frozenset[str]  # linears that have a bias
    size: Size
    dtype: torch.dtype
    num_layers: int
    hidden: int
    vocabulary: int
    attention: int  # width of all query heads together
    context: int | None  # tokens

    @property
    def layer(self) -> list[LinearSpec]:
        """The linears of the first decoder layer, which stands for all."""
        return [x for x in self.linears if x.decoder_layer == 0]

    @property
    def head(self) -> int:
        """Multiply-adds of the head for one token."""
        return self.size.macs_per_token - self.size.linear_params

    @property
    def widest(self) -> int:
        """The largest width inside a decoder layer: that of the MLP."""
        return max(max(x.m, x.n) for x in self.layer)


def shape_of(config: Any, dtype: str) -> ModelShape:
    """Count the skeleton of a model, as a run counts the model itself. Raises UserError for an unsupported architecture."""
    family, model = family_of(config), skeleton(config, dtype)
    linears = family.linears(model)
    heads = int(config.num_attention_heads)
    return ModelShape(
        linears=linears,
        biased=frozenset(x.name for x in linears if model.get_submodule(x.name).bias is not None),
        size=measure(model, linears),
        dtype=getattr(torch, dtype),
        num_layers=len(family.layers(model)),
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        attention=heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        context=getattr(config, "max_position_embeddings", None),
    )


class _NeedsDataError(Exception):
    """An allocation asked for what only a run knows."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks by linear name. asked: None where they are exact, else what the allocation wanted to look at: then they are uniform."""

    by_name: dict[str, int]
    asked: str | None


def ranks_of(method: Method, ratio: Ratio, linears: Sequence[LinearSpec]) -> Ranks:
    """The allocation's ranks where it looks at no data; else uniform ones at the same budget. Raises UserError as the allocation does."""

    def refuse(what: str) -> Callable[..., Any]:
        def asked(*_: object) -> Any:
            raise _NeedsDataError(what)

        return asked

    def bounded(ranks: dict[str, int]) -> dict[str, int]:
        return {x.name: min(ranks[x.name], full_rank(x)) for x in linears}

    if method.is_dense:
        return Ranks(by_name={x.name: full_rank(x) for x in linears}, asked=None)
    cost, wanted = method.packing.stored, "a training"
    if method.training.trains != "spectrum":
        try:
            found = method.allocation(linears, ratio, refuse("statistics"), refuse("spectra"), cost, refuse("trials"))
            return Ranks(by_name=bounded(found), asked=None)
        except _NeedsDataError as error:
            wanted = str(error)
    uniform = fill_ranks(linears, {x.name: ratio.retention for x in linears}, ratio.retention, cost)
    return Ranks(by_name=bounded(uniform), asked=wanted)


def compressed_size(shape: ModelShape, method: Method, quantizer: Quantizer, ranks: dict[str, int]) -> Size:
    """What the ledger will count at these ranks."""
    cost, item = method.packing.stored, shape.dtype.itemsize
    weights = sum(stored(x, ranks[x.name], cost) for x in shape.linears)
    low = [x for x in shape.linears if is_low_rank(x.m, x.n, ranks[x.name], cost)]
    more = sum(x.m for x in shape.linears if x.name not in shape.biased) if getattr(method.training, "deviation", False) else 0
    params = shape.size.model_params - shape.size.linear_params + weights + more
    order = 4 * sum(x.m for x in low) if isinstance(method.packing, Pivoted) else 0  # int32: where a pivoted linear finds its outputs
    held = params * item + order
    rounded = 0
    if quantizer.bits < 16:
        rounded = sum(m * n * item - packed_bytes(m, n, quantizer) for x in low for m, n in ((x.m, ranks[x.name]), (ranks[x.name], x.n)))
    return Size(
        linear_params=weights,
        model_params=params,
        model_bytes=held - rounded,
        held_bytes=held,
        macs_per_token=shape.head + weights,
    )


def packed_bytes(m: int, n: int, quantizer: Any) -> int:
    """A factor (m, n) as Grid.num_bytes counts it."""
    groups = math.ceil(n / min(quantizer.group_size or n, n))
    return m * 4 * math.ceil(n * quantizer.bits / 32) + m * groups * (2 if quantizer.symmetric else 3) + 2 * 8


def values_of_layer(statistics: Iterable[Statistic], shape: ModelShape, precision: Precision) -> dict[str, Tensor]:
    """What one decoder layer accumulates, by place and statistic as an observer names it, on the meta device.

    The accumulators themselves say it: they are fed two tokens without content.
    """

    def tokens(width: int) -> Tensor:
        return torch.empty(1, 2, width, device=META)

    found = {}
    for statistic in statistics:
        for linear in shape.layer:
            place, seen = {
                "site": (f"site{linear.site}", (tokens(linear.n),)),
                "pair": (f"site{linear.site}", (tokens(linear.n), tokens(linear.n))),
                "linear": (linear.kind, (torch.empty(linear.m, linear.n, device=META),)),
                "output": (linear.kind, (tokens(linear.m), tokens(linear.n))),
                "decoder_layer": ("layer", (tokens(shape.hidden), tokens(shape.hidden))),
            }[statistic.scope]
            name = f"{place}:{statistic.name}"
            if name not in found:
                accumulator = statistic.start(precision, 1)
                accumulator.update(*seen)
                found[name] = accumulator.value()
    return found


def num_bytes(values: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in values)


def norm_of(whitening: Whitening, linear: LinearSpec, values: dict[str, Tensor]) -> Any:
    """The norm of a linear, made of statistics without content."""
    return whitening(stats_of(linear, values, whitening.needs))


def kept_components(linear: LinearSpec, *, complete: bool) -> int:
    """Components whose vectors a stored spectrum has."""
    k = min(linear.m, linear.n)
    return k if complete else min(k, math.ceil(break_even_rank(linear.m, linear.n)))


def spectrum_bytes(linear: LinearSpec, *, complete: bool) -> int:
    """One linear's entry in the cache: U, s, rows, damping."""
    keep = kept_components(linear, complete=complete)
    return FLOAT * (keep * (linear.m + linear.n) + min(linear.m, linear.n) + 1)


def check_context(shape: ModelShape, length: int) -> None:
    """As a run does before it draws its samples. Raises UserError."""
    if shape.context is not None and length > shape.context:
        raise UserError(f"Samples of {length} tokens do not fit the model's context of {shape.context}: lower calibration.length.")
