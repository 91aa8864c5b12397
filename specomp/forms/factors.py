"""Two factors: a matrix of rank r in r (m + n) numbers."""

import torch
from torch import Tensor, nn

from specomp.forms.prices import Part
from specomp.forms.ranked import RankForm
from specomp.models.family import LinearSpec
from specomp.models.modules import TwoStage
from specomp.numerics.grid import GridSpec
from specomp.settings import configurable
from specomp.slots import Chain, Evidence


@configurable
class Factors(RankForm):
    """U (m, r) and Vt (r, n), rounded where there is a grid."""

    def shapes(self, m: int, n: int, rank: int, grid: GridSpec | None) -> dict[str, Part]:
        """r (m + n) numbers."""
        return {"v_proj.weight": Part((rank, n), grid), "u_proj.weight": Part((m, rank), grid)}

    def module(self, linear: LinearSpec, rank: int, evidence: Evidence) -> nn.Module:
        """A LowRankLinear in the model's dtype."""
        factors = evidence.factors(linear, rank)
        chain = Chain(
            (factors.Vt, factors.U),
            lambda Vt, U: U @ Vt,
            free_basis=True,
            lefts=lambda x: (x[1], None),
        )
        Vt, U = evidence.rounded(linear, chain)
        made = LowRankLinear.from_factors(
            U.values, Vt.values, evidence.bias(linear), **evidence.place(linear)
        )
        made.v_proj, made.u_proj = Vt.stored(made.v_proj), U.stored(made.u_proj)
        return made


class LowRankLinear(TwoStage):
    """y = U (Vt x) + b: a linear of weight U Vt (m n) kept as its factors, `v_proj` (n -> r, no
    bias) and `u_proj` (r -> m, with the bias).

    At full rank equals the nn.Linear it was made from, to rounding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.v_proj = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.u_proj = nn.Linear(rank, out_features, bias=bias, dtype=dtype, device=device)

    @classmethod
    def from_factors(
        cls,
        U: Tensor,
        Vt: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "LowRankLinear":
        """The linear of weight U Vt, from U (m r), Vt (r n) and the bias (m) of the linear it
        replaces; all are copied.
        """
        (m, rank), (_, n) = U.shape, Vt.shape
        # On the meta device nothing is drawn that would be overwritten at once.
        module = cls(n, m, rank, bias=bias is not None, dtype=dtype, device="meta")
        for owner, name, value in (
            (module.v_proj, "weight", Vt),
            (module.u_proj, "weight", U),
            (module.u_proj, "bias", bias),
        ):
            if value is not None:
                copy = value.detach().to(
                    device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
                )
                setattr(owner, name, nn.Parameter(copy))
        return module

    @property
    def first(self) -> nn.Linear:  # type: ignore[override]
        """Vt."""
        return self.v_proj

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(m) of the linear, which u_proj has."""
        return self.u_proj.bias

    def shards(self, style: str) -> dict[str, str] | None:
        """The side that the linear is split on; the rank stays whole."""
        return self.split("v_proj" if style.startswith("rowwise") else "u_proj", style)

    def expand(self, hidden: Tensor) -> Tensor:
        """y (... m) from Vt x (... r)."""
        out: Tensor = self.u_proj(hidden)
        return out

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """U Vt (m n), multiplied in at least float32 and returned so."""
        return self.acting(self.u_proj) @ self.acting(self.v_proj)
