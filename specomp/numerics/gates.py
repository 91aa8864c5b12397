"""Gates over singular components: how a trained score becomes a factor on its component, and what
the kept components cost.

SoCo (arXiv:2502.15092) multiplies the i-th singular value by a learnable S_i and prunes where S_i
stays below a threshold. The paper publishes neither how S is parametrized nor how its compression
ratio is made differentiable: the mappings and the soft count are ours.

Shapes: K components of all linears in one vector, linear after linear; m out_features, n
in_features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

MappingName = Literal["two_sigmoid", "sigmoid", "identity", "exp"]
Price = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(m, n, ranks), each (L,) -> numbers (L,) that are stored; arithmetic alone."""
BISECTIONS = 60
TIE = 1e-14  # a million of these are less than one float32 step at the usual threshold


@dataclass(frozen=True)
class Mapping:
    """S = to_gate(score); `start` is the score that training begins with."""

    to_gate: Callable[[Tensor], Tensor]
    start: float


def two_sigmoid(score: Tensor) -> Tensor:
    """S in (0, 2) and 1 at score 0: the model begins as the dense one, and components can be
    amplified.
    """
    return 2 * torch.sigmoid(score)


def identity(score: Tensor) -> Tensor:
    """S = score, clamped at 0."""
    return score.clamp_min(0)


MAPPINGS: dict[str, Mapping] = {
    "two_sigmoid": Mapping(two_sigmoid, 0.0),
    "sigmoid": Mapping(torch.sigmoid, 3.0),  # nothing can be amplified; begins at 0.953
    "identity": Mapping(identity, 1.0),
    "exp": Mapping(torch.exp, 0.0),
}


class GateBudget:
    """What gates (K,) cost in parameters, over the linears they belong to. Retention is stored over
    dense parameters of these linears.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        counts: Sequence[int],
        price: Price,
        device: torch.device | str = "cpu",
    ) -> None:
        """sizes: (m, n) of each linear; counts: components of it that still exist; price: of
        linears at ranks.
        """
        self.price = price
        self.counts = list(counts)
        self.m, self.n = (
            torch.tensor([x[i] for x in sizes], dtype=torch.float64, device=device) for i in (0, 1)
        )
        self.dense = self.m * self.n
        one = torch.ones_like(self.dense)
        self.additive = bool((self.stored(2 * one) == 2 * self.stored(one)).all())
        self.owner = torch.repeat_interleave(
            torch.arange(len(sizes), device=device), torch.tensor(self.counts, device=device)
        )
        self._share = (self.stored(torch.ones_like(self.dense)) / self.dense.sum())[
            self.owner
        ].float()
        place = torch.cat(
            [torch.arange(count, dtype=torch.float64) / max(count, 1) for count in self.counts]
        ).argsort(stable=True)
        self._lead = torch.empty(len(place), dtype=torch.float64, device=device)
        self._lead[place.to(device)] = TIE * torch.arange(
            len(place), 0, -1, dtype=torch.float64, device=device
        )

    def soft_retention(
        self, gates: Float[Tensor, " K"], threshold: float, temperature: float
    ) -> Float[Tensor, ""]:
        """Differentiable retention: component i counts sigmoid((S_i - threshold) / temperature).
        May exceed 1: nothing is capped.
        """
        soft = torch.sigmoid((gates - threshold) / temperature)
        if self.additive:
            return (soft * self._share).sum()
        counts = torch.zeros_like(self.dense).index_add(0, self.owner, soft.double())
        return (self.stored(counts).sum() / self.dense.sum()).float()

    def distinct(self, gates: Float[Tensor, " K"]) -> Float64[Tensor, " K"]:
        """Gates (K,) in float64 without ties: of equal ones that of the larger singular value comes
        first.

        Ties are the rule, not the exception, after few steps: AdamW's first ones have the same
        length for every score.
        """
        return gates.detach().double() + self._lead

    def ranks(self, gates: Float[Tensor, " K"], threshold: float) -> Float64[Tensor, " L"]:
        """Components (L,) of each linear at or above the threshold, at least one."""
        kept = torch.zeros_like(self.dense).index_add_(
            0, self.owner, (self.distinct(gates) >= threshold).double()
        )
        return kept.clamp_min(1)

    def stored(self, ranks: Float[Tensor, " L"]) -> Float[Tensor, " L"]:
        """Numbers (L,) that factors of these ranks (L,) take."""
        return self.price(self.m, self.n, ranks)

    def retention_of(self, ranks: Float[Tensor, " L"]) -> float:
        """Retention of ranks (L,); from break-even on a linear is stored dense and costs m n."""
        return float(torch.minimum(self.stored(ranks), self.dense).sum() / self.dense.sum())

    def hard_retention(self, gates: Float[Tensor, " K"], threshold: float) -> float:
        """Retention when everything below the threshold is pruned."""
        return self.retention_of(self.ranks(gates, threshold))

    def threshold_for(self, gates: Float[Tensor, " K"], retention: float) -> float:
        """The global threshold, by bisection, that keeps as much as `retention` allows; 0 when
        everything fits.

        Halfway between the last gate dropped and the first one kept, so that no rounding of a gate
        decides anything.
        """
        low, high = 0.0, float(gates.detach().max()) * (1 + 1e-6) + 1e-6
        if self.hard_retention(gates, low) <= retention:
            return low
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.hard_retention(gates, middle) > retention else (low, middle)
            )
        gates = self.distinct(gates)
        kept, dropped = gates[gates >= high], gates[gates < high]
        return float((kept.min() + dropped.max()) / 2) if len(kept) and len(dropped) else high

    def kept(self, gates: Float[Tensor, " K"], threshold: float) -> Bool[Tensor, " K"]:
        """Which components (K,) stay: at or above the threshold, all of a linear stored dense
        anyway, the best of each.
        """
        ranks = self.ranks(gates, threshold)
        gates = self.distinct(gates)
        keep = gates >= threshold
        keep |= (self.stored(ranks) >= self.dense)[self.owner]
        alone = torch.zeros_like(self.dense).index_add_(0, self.owner, keep.double()) == 0
        for linear in alone.nonzero().flatten().tolist():
            first = sum(self.counts[:linear])
            keep[first + int(gates[first : first + self.counts[linear]].argmax())] = True
        return keep
