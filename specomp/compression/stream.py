"""Layer streaming: the hidden states of the calibration set travel from decoder layer to decoder
layer.

Lets a decoder layer see what the compressed ones before it produce, at the price of one pass per
stream for the whole model; and lets statistics of a model be taken of which only one decoder layer
is in memory. What each decoder layer is called with is recorded once per batch shape
(models/calls.py).
"""

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from specomp.compression.observe import LayerObserver
from specomp.compression.run import Run
from specomp.data.calibration import CalibrationSet
from specomp.models.calls import Call, hidden_output, on_device, recorded
from specomp.numerics.statistics import Statistic


class HiddenStream:
    """The hidden states (batch, length, hidden) before the current decoder layer, one tensor per
    batch, kept on the CPU.
    """

    def __init__(self, run: Run, samples: CalibrationSet) -> None:
        self.source, self.samples = run, samples
        self.hidden: list[Tensor] = []
        self.calls: dict[int, list[Call]] = {}
        for batch in samples.batches():
            calls = recorded(run.model, run.family, batch.to(run.model.device))
            self.hidden.append(calls.hidden.cpu())
            self.calls.setdefault(len(batch), calls.layers)

    @torch.no_grad()
    def run(self, index: int, *, num_samples: int | None = None) -> Iterable[Tensor]:
        """Outputs of decoder layer `index` (as it is now) on the hidden states before it; at most
        num_samples of them.
        """
        seen = 0
        for hidden in self.hidden:
            if num_samples is not None and seen >= num_samples:
                return
            args, kwargs = self.calls[len(hidden)][index]
            if num_samples is not None and seen + len(hidden) > num_samples:
                hidden, args, kwargs = _cut((hidden, args, kwargs), num_samples - seen, len(hidden))
            seen += len(hidden)
            yield self._call(index, hidden, args, kwargs)

    def output(self, index: int, position: int) -> Tensor:
        """Output (batch, length, hidden) of decoder layer `index` on one batch, with a gradient
        where that is switched on.
        """
        hidden = self.hidden[position]
        return self._call(index, hidden, *self.calls[len(hidden)][index])

    def _call(
        self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        device = self.source.device(index)
        with self.source.forward_precision():
            return hidden_output(
                self.source.layers[index](
                    hidden.to(device), *on_device(args, device), **on_device(kwargs, device)
                )
            )

    def twin(self) -> "HiddenStream":
        """Another stream from here on, of the same samples."""
        other = copy(self)
        other.hidden = list(self.hidden)
        return other

    def observe_beside(
        self, index: int, statistics: Iterable[Statistic], dense: "HiddenStream"
    ) -> dict[str, Tensor]:
        """Statistics of decoder layer `index`, which is still dense, on these hidden states and
        those of the dense model; these stay, the dense model's are replaced by the outputs of the
        decoder layer.
        """
        with self._observer(index, statistics) as observer:
            reference, own = iter(dense.run(index)), iter(self.run(index))
            for position in range(len(self.hidden)):
                with observer.reference():
                    output = next(reference)
                next(own)
                dense.hidden[position] = output.to(dense.hidden[position].dtype).cpu()
            return observer.values()

    def observe(
        self, index: int, statistics: Iterable[Statistic], num_samples: int | None = None
    ) -> dict[str, Tensor]:
        """Statistics of decoder layer `index` on the hidden states before it."""
        with self._observer(index, statistics, num_samples) as observer:
            for _ in self.run(index, num_samples=num_samples):
                pass
            return observer.values()

    def advance(self, index: int, statistics: Iterable[Statistic] = ()) -> dict[str, Tensor]:
        """Replace the hidden states by the outputs of decoder layer `index`; returns statistics of
        it on the way.
        """
        with self._observer(index, statistics) as observer:
            for position, output in enumerate(self.run(index)):
                self.hidden[position] = output.to(self.hidden[position].dtype).cpu()
            return observer.values()

    def _observer(
        self, index: int, statistics: Iterable[Statistic], num_samples: int | None = None
    ) -> LayerObserver:
        total = min(num_samples or self.samples.num_samples, self.samples.num_samples)
        return LayerObserver(
            self.source.layers[index], self.source.family, statistics, self.source.precision, total
        )


def _cut(value: Any, count: int, batch: int) -> Any:
    """The first `count` of `batch` samples in every tensor whose first axis is the batch."""
    if isinstance(value, Tensor):
        return value[:count] if value.ndim and len(value) == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, count, batch) for item in value)
    if isinstance(value, dict):
        return {name: _cut(item, count, batch) for name, item in value.items()}
    return value
