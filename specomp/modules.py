"""Modules that stand in for nn.Linear. m out_features, n in_features, r rank."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from specomp.grid import Grid


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

    @property
    def bias(self) -> Tensor | None:
        """(m) of the linear, which u_proj has."""
        return self.u_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        return self.expand(self.v_proj(x))

    def expand(self, hidden: Tensor) -> Tensor:
        """y (... m) from Vt x (... r)."""
        out: Tensor = self.u_proj(hidden)
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


class GridLinear(nn.Linear):
    """An nn.Linear whose weight (m n), held in the model's dtype, lies on a grid: what a folder stores as integers (models/packed.py)."""

    grid: Grid

    @classmethod
    def of(cls, linear: nn.Linear, grid: Grid) -> "GridLinear":
        """Takes over the parameters of a linear whose weight was rounded to this grid."""
        module = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        module.weight, module.bias, module.grid = linear.weight, linear.bias, grid
        return module


class PivotedLinear(nn.Module):
    """y = [P x, C (P x)] in the order of the outputs, + b: a linear of rank r kept as r (m + n - r) numbers (PIFA, arXiv:2501.19090).

    `pivots` P (r, n) are r rows of the weight itself, `others` C (m - r, r) write the remaining rows in terms of them, and `order` (m),
    int32, says where among both each output is found. There is no `weight`: ask `merged_weight()`.
    """

    order: Tensor

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
        self.pivots = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.others = nn.Linear(rank, out_features - rank, bias=False, dtype=dtype, device=device)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))

    @classmethod
    def from_pivots(
        cls,
        rows: Tensor,
        coefficients: Tensor,
        order: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "PivotedLinear":
        """From pivot rows (r n), coefficients (m-r r), order (m) and the bias (m) of the linear it replaces; all are copied."""
        (rank, n), m = rows.shape, len(order)
        # On the meta device nothing is drawn that would be overwritten at once.
        module = cls(n, m, rank, bias=bias is not None, dtype=dtype, device="meta")
        for owner, name, value in ((module.pivots, "weight", rows), (module.others, "weight", coefficients), (module, "bias", bias)):
            if value is not None:
                copy = value.detach().to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
                setattr(owner, name, nn.Parameter(copy))
        module.order = order.detach().to(device=device, dtype=torch.int32, copy=True)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        return self.expand(self.pivots(x))

    def expand(self, pivots: Tensor) -> Tensor:
        """y (... m) from P x (... r)."""
        rows = torch.cat([pivots, self.others(pivots)], -1)
        out = rows.gather(-1, self.order.long().expand_as(rows))  # on a CPU several times as fast as index_select
        return out if self.bias is None else out + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n), multiplied in at least float32 and returned so."""
        wide = torch.promote_types(self.pivots.weight.dtype, torch.float32)
        rows = self.pivots.weight.to(wide)
        return torch.cat([rows, self.others.weight.to(wide) @ rows])[self.order.long()]

    def growth(self) -> float:
        """The largest coefficient in absolute value: how much rounding errors of the pivots can grow."""
        return float(self.others.weight.detach().abs().max())

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them, plus the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class GatedLinear(nn.Module):
    """y = U (g * (R x)) + b + d: a linear as its singular components, each with a trainable gate g = to_gate(score) (SoCo).

    U (m, a) and R (a, n) are frozen, a the components that still exist of the k there were; scores (k,) and the deviation d (m) train.
    `mask` (a,), where set, multiplies the gates: how a schedule fades components out. Scores of components that no longer exist rest.
    """

    def __init__(
        self, U: Tensor, rows: Tensor, bias: Tensor | None, *, to_gate: Callable[[Tensor], Tensor], start: float, deviation: bool
    ) -> None:
        super().__init__()
        self.to_gate = to_gate
        self.alive: Tensor
        self.existing: Tensor
        self.U = nn.Parameter(U, requires_grad=False)
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.scores = nn.Parameter(torch.full((len(rows),), start, dtype=torch.float32, device=U.device))
        self.deviation = nn.Parameter(torch.zeros(len(U), dtype=torch.float32, device=U.device)) if deviation else None
        self.register_buffer("alive", torch.ones(len(rows), dtype=torch.bool, device=U.device))
        # Where `alive` is true. Reading by a mask would make a GPU wait for the host, four times per linear and step.
        self.register_buffer("existing", torch.arange(len(rows), device=U.device), persistent=False)
        self.mask: Tensor | None = None

    def gates(self) -> Tensor:
        """g (a,) of the components that exist, without the mask."""
        return self.to_gate(self.scores.index_select(0, self.existing))

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Drop components physically; keep (a,) is over those that exist."""
        self.U.data, self.rows.data = self.U.data[:, keep].contiguous(), self.rows.data[keep].contiguous()
        self.existing = self.existing[keep]
        self.alive.zero_()[self.existing] = True
        self.mask = None

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        gates = self.gates() if self.mask is None else self.gates() * self.mask
        hidden = nn.functional.linear(x.to(self.rows.dtype), self.rows)
        out = nn.functional.linear(hidden * gates.to(hidden.dtype), self.U)
        for addend in (self.bias, self.deviation):
            out = out if addend is None else out + addend.to(out.dtype)
        return out


def replace_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule of full dotted name `name` is, in the same train/eval mode. AttributeError if there is none."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, module)
