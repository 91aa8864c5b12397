"""Inference: the first factors of linears that share an input (q, k and v; gate and up) as one
product.

    model = specomp.load(folder)
    fuse(model)                    # in place; parameters, names and what is saved stay as they are

Three thin products read the same input three times and each fills a machine badly; one with their
rows stacked does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specomp.models.families import family_of
from specomp.models.modules import TwoStage


def fuse(model: PreTrainedModel) -> int:
    """Stack the first factors of every site with two or more factorized linears; returns how many
    sites have that. For inference: the stacked rows are computed for the first linear that sees an
    input and handed to the others, which must see the same tensor next.
    """
    family, count = family_of(model.config), 0
    for layer in family.layers(model):
        for site in family.sites:
            linears = [x for x in map(layer.get_submodule, site.linears) if isinstance(x, TwoStage)]
            if len(linears) > 1 and not any("forward" in vars(x) for x in linears):
                Stacked(linears)
                count += 1
    return count


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        if isinstance(module, TwoStage):
            vars(module).pop("forward", None)


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[int]:
    """Fused while it is open."""
    try:
        yield fuse(model)
    finally:
        unfuse(model)


class Stacked:
    """The first factors of several linears, one below the other; each linear's own is a view of its
    rows.
    """

    def __init__(self, linears: list[TwoStage]) -> None:
        firsts = [x.first for x in linears]
        self.sizes = [x.out_features for x in firsts]
        self.weight = torch.cat([x.weight.detach() for x in firsts])
        for first, rows in zip(firsts, self.weight.split(self.sizes), strict=True):
            first.weight.data = rows
        self.seen: Tensor | None = None
        self.parts: dict[int, Tensor] = {}
        for index, linear in enumerate(linears):
            vars(linear)["forward"] = partial(self.forward, linear, index)

    def forward(self, linear: TwoStage, index: int, x: Tensor) -> Tensor:
        """What linear(x) is. A model that was moved or cast since has other numbers than these
        rows: then each linear is on its own.
        """
        own = linear.first
        if own.weight.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
            return linear.expand(own(x))
        if x is not self.seen or index not in self.parts:
            self.seen = x
            self.parts = dict(enumerate(nn.functional.linear(x, self.weight).split(self.sizes, -1)))
        hidden = self.parts.pop(index)
        if not self.parts:
            self.seen = None  # no activation is kept longer than needed
        return linear.expand(hidden)
