"""Turning wished-for retentions into integer ranks that meet a parameter budget: what every allocation shares.

A linear whose rank would reach break-even stays dense and costs m n.
"""

from collections.abc import Mapping, Sequence

from specomp.errors import UserError
from specomp.models.family import LinearSpec
from specomp.ratio import Cost, is_low_rank, pair_cost, rank_for_retention

BISECTIONS = 60
ROUNDING = 1e-9  # of a mean over linears, relative


def stored(linear: LinearSpec, rank: int, cost: Cost = pair_cost) -> int:
    """Parameters a linear costs at a rank: what its packing stores, or m n when dense."""
    m, n = linear.m, linear.n
    return cost(m, n, rank) if is_low_rank(m, n, rank, cost) else m * n


def full_rank(linear: LinearSpec) -> int:
    """The rank that stands for 'dense'."""
    return min(linear.m, linear.n)


def floor_ranks(linears: Sequence[LinearSpec], retention: Mapping[str, float], cost: Cost = pair_cost) -> dict[str, int]:
    """AdaSVD Eq. 21 for each linear, priced by its packing; retention >= 1 means dense. Raises UserError where nothing would be left."""
    ranks = {}
    for linear in linears:
        share = retention[linear.name]
        rank = full_rank(linear) if share >= 1 else rank_for_retention(linear.m, linear.n, share, cost)
        if rank < 1:
            raise UserError(
                f"{linear.name} ({linear.m} x {linear.n}): a retention of {share:.4g} leaves rank 0; lower ratio.compression, "
                "or choose an allocation with a higher minimum retention."
            )
        ranks[linear.name] = rank
    return ranks


def fill_ranks(linears: Sequence[LinearSpec], retention: Mapping[str, float], target: float, cost: Cost = pair_cost) -> dict[str, int]:
    """Eq. 21, then one rank more for each linear the budget still pays for, where the floor took the most first."""
    ranks = floor_ranks(linears, retention, cost)
    budget = target * sum(linear.params for linear in linears)
    used = sum(stored(linear, ranks[linear.name], cost) for linear in linears)

    def lost(linear: LinearSpec) -> float:
        return retention[linear.name] * linear.params - stored(linear, ranks[linear.name], cost)

    for linear in sorted(linears, key=lost, reverse=True):
        more = stored(linear, ranks[linear.name] + 1, cost) - stored(linear, ranks[linear.name], cost)
        if 0 < more <= budget - used:
            ranks[linear.name] += 1
            used += more
    return ranks


def water_fill(
    linears: Sequence[LinearSpec], base: Mapping[str, float], slope: Mapping[str, float], target: float, low: float
) -> dict[str, float]:
    """Retentions clip(base + level * slope, low, 1) with the one level that meets the target on average over parameters.

    slope must be >= 0 and positive somewhere. Equals AdaSVD Eq. 20 with level = trr - mrr where nothing is clipped and all decoder
    layers have the same size. Raises UserError when no level can meet the target.
    """
    total = sum(linear.params for linear in linears)

    def at(level: float) -> dict[str, float]:
        return {x.name: min(1.0, max(low, base[x.name] + level * slope[x.name])) for x in linears}

    def mean(level: float) -> float:
        shares = at(level)
        return sum(x.params * shares[x.name] for x in linears) / total

    bottom, top = -1.0, 1.0
    while mean(top) < target and top < 2**40:
        top *= 2
    most = target * (1 + ROUNDING)  # a floor that is the target itself is no floor above it
    while mean(bottom) > most and bottom > -(2**40):
        bottom *= 2
    if mean(top) < target or mean(bottom) > most:
        raise UserError(
            f"No allocation with retentions in [{low:.3g}, 1] averages {target:.4g}: change ratio.compression or the minimum retention."
        )
    for _ in range(BISECTIONS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if mean(middle) < target else (bottom, middle)
    return at(top)
