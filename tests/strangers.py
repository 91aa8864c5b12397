"""A form that specomp does not know, as somebody else would write it: one file, torch and the
contracts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specomp.forms.prices import Part
from specomp.models.modules import Substitute
from specomp.settings import configurable


class Halves(Substitute):
    """y = L (R x) + b, with L and R each kept as two halves of their rows."""

    def __init__(self, in_features, out_features, rank, *, bias, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        place = {"dtype": dtype, "device": device}
        self.right = nn.Parameter(torch.empty(rank, in_features, **place))
        self.upper = nn.Parameter(torch.empty(out_features // 2, rank, **place))
        self.lower = nn.Parameter(torch.empty(out_features - out_features // 2, rank, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None

    def arguments(self) -> dict:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"rank": self.rank, "bias": self.bias is not None}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        wide = torch.promote_types(self.right.dtype, torch.float32)
        return torch.cat([self.upper, self.lower]).to(wide) @ self.right.to(wide)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.right)
        return nn.functional.linear(hidden, torch.cat([self.upper, self.lower]), self.bias)


@configurable
class HalvesForm:
    """At even ranks only."""

    def sizes(self, unit):
        (linear,) = unit.linears
        return range(2, min(linear.m, linear.n), 2)

    def parts(self, unit, size, grid=None) -> Mapping[str, Part]:
        (linear,) = unit.linears
        half = linear.m // 2
        return {
            "right": Part((size, linear.n)),
            "upper": Part((half, size)),
            "lower": Part((linear.m - half, size)),
        }

    def losses(self, unit, sizes, evidence):
        (linear,) = unit.linears
        squares = evidence.spectrum(linear).s.double().square()
        return torch.stack([squares[int(size) :].sum() for size in sizes])

    def fit(self, unit, size, evidence):
        (linear,) = unit.linears
        factors, bias = evidence.factors(linear, size), evidence.bias(linear)
        made = Halves(linear.n, linear.m, size, bias=bias is not None, **evidence.place(linear))
        half = linear.m // 2
        with torch.no_grad():
            made.right.copy_(factors.Vt)
            made.upper.copy_(factors.U[:half])
            made.lower.copy_(factors.U[half:])
            if bias is not None:
                made.bias.copy_(bias)
        return {linear.name: made}

    size_of = "rank"

    def kept(self, unit):
        return 0

    def facts(self, module):
        return {"largest": float(module.right.abs().max())}

    def notes(self, facts, count):
        return [f"{len(facts)} of {count} linears are halves"]
