"""Columns of a weight scaled before they are rounded, so that those of large inputs lose less (AWQ,
arXiv:2306.00978).

W' = Q(W diag(s)) diag(1/s) with s = mean |x|^alpha over the root of its largest times its smallest,
alpha the best of a grid for the output error (Eq. 4, 5). Differs from the published code: every
matrix has scales of its own, which are stored (16 bits a column) instead of folded into the norm
before (CHOICE); so linears that share inputs need not share them, and any form can have them.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specomp.models.modules import GridLinear, Substitute
from specomp.numerics.linalg import trace_of_square
from specomp.quantization.rtn import Spacing, round_to_nearest
from specomp.slots import Rounded

LEAST = 1e-4  # of a mean |x|^alpha, as published


def scales_for(
    weight: Float[Tensor, "m n"],
    gram: Float[Tensor, "n n"],
    size: Float[Tensor, " n"],
    count: int,
    spacing: Spacing,
) -> Float[Tensor, " n"]:
    """1/s, as it is stored, of the best of the exponents 0, 1/count, ... below 1; size: mean |x| of
    the inputs.
    """
    nearest, found = replace(spacing, search=0), list[tuple[float, Tensor]]()
    for step in range(count):
        s = size.float().pow(step / count).clamp_min(LEAST)
        inverse = ((s.max() * s.min()).sqrt() / s).to(spacing.scale_dtype)
        scale = inverse.float()
        error = round_to_nearest(weight / scale, nearest).values() * scale - weight
        found.append((trace_of_square(error, gram.to(error.dtype)), inverse))
    return min(found, key=lambda x: x[0])[1]


@dataclass(frozen=True, eq=False)
class Scaled(Rounded):
    """A matrix on a grid but for a scale of every column."""

    scale: Tensor | None = None  # 1/s (n), 16 bits
    on_grid: Tensor | None = None  # the matrix without it

    def stored(self, linear: nn.Linear) -> nn.Module:
        """A ScaledLinear."""
        assert self.grid is not None and self.scale is not None and self.on_grid is not None
        inner = GridLinear.of(linear, self.grid)
        inner.weight = nn.Parameter(self.on_grid.to(linear.weight).contiguous())
        return ScaledLinear.of(inner, self.scale.to(linear.weight.device))


class ScaledLinear(Substitute):
    """y = inner (x * scale): a linear whose columns were scaled before its weight was rounded."""

    inner: nn.Linear
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.inner = nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)
        half = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
        # Where the caller makes tensors, not `device` (see PivotedLinear).
        self.register_buffer("scale", torch.ones(in_features, dtype=half))

    @classmethod
    def of(cls, inner: nn.Linear, scale: Tensor) -> "ScaledLinear":
        """Of a linear and the scale (n) of its inputs."""
        module = cls(
            inner.in_features, inner.out_features, bias=inner.bias is not None, device="meta"
        )
        module.inner, module.scale = inner, scale
        return module

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(m) of the linear, which `inner` has."""
        return self.inner.bias

    def arguments(self) -> dict:
        """Sizes, and whether there is a bias."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    def shards(self, style: str) -> dict[str, str] | None:
        """The linear itself, where it is split on its outputs."""
        return None if style.startswith("rowwise") else {"inner": style}

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        out: Tensor = self.inner(x * self.scale.to(x.dtype))
        return out

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n) in at least float32."""
        weight = self.acting(self.inner)
        return weight * self.scale.to(weight.dtype)
