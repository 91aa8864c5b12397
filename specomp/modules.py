"""Modules that stand in for nn.Linear. m out_features, n in_features, r rank."""

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = U (Vt x) + b: a linear of weight U Vt (m n) kept as its factors, `v_proj` (n -> r, no bias) and `u_proj` (r -> m, with the bias).

    At full rank equals the nn.Linear it was made from, to rounding. There is no `weight`: ask `merged_weight()`.
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
        """The linear of weight U Vt, from U (m r), Vt (r n) and the bias (m) of the linear it replaces; all are copied."""
        (m, rank), (_, n) = U.shape, Vt.shape
        # On the meta device nothing is drawn that would be overwritten at once.
        module = cls(n, m, rank, bias=bias is not None, dtype=dtype, device="meta")
        for owner, name, value in ((module.v_proj, "weight", Vt), (module.u_proj, "weight", U), (module.u_proj, "bias", bias)):
            if value is not None:
                copy = value.detach().to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
                setattr(owner, name, nn.Parameter(copy))
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        out: Tensor = self.u_proj(self.v_proj(x))
        return out

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """U Vt (m n), multiplied in at least float32 and returned so."""
        U, Vt = self.u_proj.weight, self.v_proj.weight
        wide = torch.promote_types(U.dtype, torch.float32)
        return U.to(wide) @ Vt.to(wide)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them, plus the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.u_proj.bias is not None}"


def replace_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule of full dotted name `name` is, in the same train/eval mode. AttributeError if there is none."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, module)
