"""Hooks that feed accumulators while a decoder layer runs, and nothing else: no storage of
activations, no change to the model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specomp.models.calls import hidden_input, hidden_output
from specomp.models.family import LinearSpec, ModelFamily
from specomp.numerics.statistics import Accumulator, Precision, Statistic, Stats


class LayerObserver:
    """Accumulates statistics of one decoder layer: site inputs, gradients of its linears and of
    their outputs, its own input and output.

    Where a statistic compares two models, every batch runs first inside `reference()`, as the dense
    model sees it, then as this one does.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: ModelFamily,
        statistics: Iterable[Statistic],
        precision: Precision,
        num_samples: int,
    ) -> None:
        self.layer, self.family = layer, family
        self.accumulators: dict[str, Accumulator] = {}
        self.statistics = tuple(statistics)
        self._precision, self._num_samples = precision, num_samples
        self._handles: list[RemovableHandle] = []
        self._batch: tuple[int, ...] = ()
        self._in_reference = False
        self._seen: dict[int, Tensor] = {}

    def __enter__(self) -> "LayerObserver":
        by_scope: dict[str, list[Statistic]] = defaultdict(list)
        for statistic in self.statistics:
            by_scope[statistic.scope].append(statistic)
        if by_scope["site"] or by_scope["pair"]:
            self._handles.append(
                self.layer.register_forward_pre_hook(self._remember_batch, with_kwargs=True)
            )
            for index, site in enumerate(self.family.sites):
                feeds = [self._start(f"site{index}", by_scope[scope]) for scope in ("site", "pair")]
                first = self.layer.get_submodule(site.linears[0])
                self._handles.append(
                    first.register_forward_pre_hook(
                        lambda _, args, i=index, feeds=feeds: self._see(i, args[0], *feeds)
                    )
                )
        if by_scope["linear"]:
            for name in (name for site in self.family.sites for name in site.linears):
                weight = self.layer.get_submodule(name).weight
                assert isinstance(weight, nn.Parameter)
                weight.requires_grad_(True)
                feed = self._start(name, by_scope["linear"])
                self._handles.append(
                    weight.register_post_accumulate_grad_hook(
                        lambda p, feed=feed: _consume(feed, p)
                    )
                )
        if by_scope["output"]:
            for name in (name for site in self.family.sites for name in site.linears):
                feed = self._start(name, by_scope["output"])
                self._handles.append(
                    self.layer.get_submodule(name).register_forward_hook(
                        lambda _, args, output, feed=feed: _follow(feed, args[0], output)
                    )
                )
        if by_scope["decoder_layer"]:
            feed = self._start("layer", by_scope["decoder_layer"])
            self._handles.append(
                self.layer.register_forward_hook(
                    lambda _, args, kwargs, output, feed=feed: _update(
                        feed, hidden_input(args, kwargs), hidden_output(output)
                    ),
                    with_kwargs=True,
                )
            )
        return self

    def _start(self, place: str, statistics: Iterable[Statistic]) -> list[Accumulator]:
        started = {
            f"{place}:{x.name}": x.start(self._precision, self._num_samples) for x in statistics
        }
        self.accumulators |= started
        return list(started.values())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """While it is open, inputs are the dense model's: kept for the pair that the same batch
        makes afterwards, and counted nowhere.
        """
        self._in_reference, self._seen = True, {}
        try:
            yield
        finally:
            self._in_reference = False

    def _see(
        self, site: int, x: Tensor, alone: list[Accumulator], paired: list[Accumulator]
    ) -> None:
        x = self._by_sample(x)
        if self._in_reference:
            self._seen[site] = x
            return
        _update(alone, x)
        if paired:
            _update(paired, self._seen.pop(site), x)

    def _remember_batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = tuple(hidden_input(args, kwargs).shape[:-1])

    def _by_sample(self, x: Tensor) -> Tensor:
        # OPT's MLP runs on (batch x length, n).
        return x.reshape(*self._batch, x.shape[-1])

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for name in (name for site in self.family.sites for name in site.linears):
            weight = getattr(self.layer.get_submodule(name), "weight", None)
            if isinstance(weight, nn.Parameter):
                weight.requires_grad_(False)
                weight.grad = None

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up what several processes saw, accumulator by accumulator in the same order
        everywhere.
        """
        for accumulator in self.accumulators.values():
            accumulator.merge(total)

    def values(self) -> dict[str, Tensor]:
        """What was accumulated, by place and statistic; tensors of scalars keep one element."""
        return {name: accumulator.value() for name, accumulator in self.accumulators.items()}


def stats_of(
    linear: LinearSpec, values: Mapping[str, Tensor], statistics: Iterable[Statistic]
) -> Stats:
    """The statistics of one linear out of its decoder layer's values. Raises KeyError when one was
    never collected.
    """
    return Stats({x: values[f"{place_of(linear, x)}:{x.name}"] for x in statistics})


def place_of(linear: LinearSpec, statistic: Statistic) -> str:
    """Where in a decoder layer a linear's statistic is taken, as observers name it."""
    site = f"site{linear.site}"
    places = {
        "site": site,
        "pair": site,
        "linear": linear.kind,
        "output": linear.kind,
        "decoder_layer": "layer",
    }
    return places[statistic.scope]


def _update(feed: list[Accumulator], *observation: Tensor) -> None:
    detached = [tensor.detach() for tensor in observation]
    # A statistic says in what precision it multiplies; the autocast of the forward pass, still on
    # here, would overrule it.
    with torch.autocast(detached[0].device.type, enabled=False):
        for accumulator in feed:
            accumulator.update(*detached)


def _follow(feed: list[Accumulator], x: Tensor, output: Tensor) -> None:
    # No parameter asks for a gradient: the backward pass ends at the first linear observed, and
    # makes no gradient of a weight.
    if not output.requires_grad:
        output.requires_grad_(True)
    output.register_hook(lambda grad: _update(feed, grad, x))


def _consume(feed: list[Accumulator], weight: Tensor) -> None:
    # The gradient is used as soon as it is complete and dropped, so that all gradients are never in
    # memory together.
    assert weight.grad is not None
    _update(feed, weight.grad)
    weight.grad = None
