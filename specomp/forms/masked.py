"""Most weights are zero: a bit for every weight says which are not, and only these are stored.

Masked   the weights of the largest score; what the others lose is made up for, or not
         magnitude, Wanda (arXiv:2306.11695), SparseGPT (arXiv:2301.00774): numerics/masks.py
Stored are one bit a weight and the numbers at it, on a grid where there is one: half of them in 16
bits are 9 bits a weight, not 8; a pattern such as 2:4 could do with less than a bit, which its mask
takes all the same.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from specomp.errors import UserError
from specomp.forms.options import read_off
from specomp.forms.prices import Part
from specomp.models.family import Unit
from specomp.models.modules import Substitute
from specomp.numerics.factors import Norm
from specomp.numerics.grid import GridSpec
from specomp.numerics.masks import Pattern, largest, sparsegpt, wanda
from specomp.settings import configurable
from specomp.slots import Chain, Evidence, SizeOf

# Shares of a row at which losses are measured; read off between.
MEASURED = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
PER_BYTE = 8


@configurable
class Masked:
    """Every setting is explained in conf/method/packing/masked.yaml."""

    score: Literal["magnitude", "wanda", "sparsegpt"]
    compare: Literal["row", "matrix"]
    pattern: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=2)]] | None
    damping: Annotated[float, Field(ge=0, le=1)]
    size_of: ClassVar[SizeOf] = "weights"

    @field_validator("pattern")
    @classmethod
    def _some_stay(cls, pattern: Pattern | None) -> Pattern | None:
        if pattern is not None and pattern[0] >= pattern[1]:
            raise ValueError("[N,M] keeps N of every M weights, N smaller than M, such as [2,4]")
        return pattern

    def sizes(self, unit: Unit) -> range:
        """Weights kept of a row, on average. Raises UserError where a pattern does not fit."""
        (linear,) = unit.linears
        if self.pattern is None:
            return range(1, linear.n)
        kept, of = self.pattern
        if linear.n % of:
            fits = ", ".join(f"[{x // 2},{x}]" for x in (2, 4, 8, 16) if not linear.n % x)
            raise UserError(
                f"{unit.name} has rows of {linear.n}, no multiple of the {of} of a pattern"
                f" {kept}:{of}: set method.packing.pattern=null{fits and f', or to {fits}'}."
            )
        return range(linear.n // of * kept, linear.n // of * kept + 1)

    def parts(self, unit: Unit, size: Any, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """m k numbers, and a bit for each of the m n."""
        (linear,) = unit.linears
        if grid is not None and grid.group_size is None and not self._by_row:
            raise UserError(
                "method.packing.compare=matrix keeps numbers that belong to no row, and"
                " quantizer.group_size=null is one scale a row: set either otherwise."
            )
        m, n = linear.m, linear.n
        shape = (m, size) if self._by_row else (1, m * size)
        mask = Part((m, -(-n // PER_BYTE)), index_bits=PER_BYTE)
        return {"mask": mask, "kept.weight": Part(shape, grid)}

    @property
    def _by_row(self) -> bool:
        """Whether every row keeps as many."""
        return self.pattern is not None or self.compare == "row"

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """What is lost where it was measured, read off between; nothing of a row in full;
        (sizes) in float64.
        """
        found = self._measured(unit, evidence)
        return read_off(found["sizes"], found["losses"], sizes)

    def _measured(self, unit: Unit, evidence: Evidence) -> Mapping[str, Tensor]:
        (linear,) = unit.linears

        def make() -> dict[str, Tensor]:
            norm, weight = evidence.norm(linear), evidence.weight(linear).float()
            at = self._at(unit)
            lost = [norm.loss(self.pruned(weight, norm, x, linear.name)[0] - weight) for x in at]
            lost = [norm.loss(weight), *lost, 0.0]
            return {
                "sizes": torch.tensor([0, *at, linear.n]),
                "losses": torch.tensor(lost, dtype=torch.float64).square(),
            }

        return evidence.remembered(unit, self, make)

    def _at(self, unit: Unit) -> list[int]:
        sizes = self.sizes(unit)
        if len(sizes) == 1:
            return list(sizes)
        return sorted({min(sizes[-1], max(1, round(x * unit.linears[0].n))) for x in MEASURED})

    def kept(self, unit: Unit) -> int:
        """Sizes and losses where they were measured, in 8 bytes."""
        return 8 * 2 * (len(self._at(unit)) + 2)

    def pruned(
        self, weight: Tensor, norm: Norm, size: int, name: str
    ) -> tuple[Tensor, Tensor, float]:
        """The weight (m n) with zeros, its mask, and the damping that was needed, in the norm's
        Gram: where it has none, all inputs are alike. Raises UserError where that is numerically
        impossible.
        """
        gram = weight.new_ones(weight.shape[1]) if norm.gram is None else norm.gram
        if self.score == "sparsegpt":
            gram = gram.diag() if gram.ndim == 1 else gram
            try:
                return sparsegpt(
                    weight,
                    gram,
                    size,
                    damping=self.damping,
                    by_row=self.compare == "row",
                    pattern=self.pattern,
                )
            except ValueError as error:
                raise UserError(
                    f"{name}, pruning it: {error}: calibrate on more tokens, or raise"
                    " method.packing.damping."
                ) from error
        scores = weight.float().abs()
        if self.score == "wanda":
            scores = wanda(weight, gram.diagonal() if gram.ndim == 2 else gram)
        mask = largest(scores, size, by_row=self._by_row, pattern=self.pattern)
        return weight.float() * mask, mask, 0.0

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """A MaskedLinear."""
        (linear,) = unit.linears
        weight, mask, _ = self.pruned(
            evidence.weight(linear), evidence.norm(linear), size, linear.name
        )
        numbers = weight[mask].view(linear.m if self._by_row else 1, -1)

        def assembled(numbers: Tensor) -> Tensor:
            return numbers.new_zeros(mask.shape).masked_scatter_(mask, numbers)

        (found,) = evidence.rounded(linear, Chain((numbers,), assembled, mask=mask))
        made = MaskedLinear.of(found.values, mask, evidence.bias(linear), **evidence.place(linear))
        made.kept = found.stored(made.kept)
        return {linear.name: made}

    def facts(self, module: nn.Module) -> dict[str, float]:
        """The share of weights that are stored."""
        masked = cast(MaskedLinear, module)
        whole = masked.in_features * masked.out_features
        return {"density": masked.kept.in_features * masked.kept.out_features / whole}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """How many there are, and what they are read from."""
        shares = dict.fromkeys(f"{f(x['density'] for x in facts.values()):.0%}" for f in (min, max))
        return [
            f"{len(facts)} of {count} linears store {' to '.join(shares)} of their weights and one"
            " bit for each of all; their products are made of the whole weight, zeros included"
        ]


class MaskedLinear(Substitute):
    """y = W x + b of a weight (m n) most of which is zero: `kept`, its other numbers row by row,
    and `mask` (m, n / 8), in bits, which says where they stand.
    """

    mask: Tensor
    kept: nn.Linear
    unserved = "the numbers that its masks leave are read out of a linear, which engines rewrite"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rows: int,
        columns: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """rows, columns: of what is kept."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kept = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        # Where the caller makes tensors, not `device` (see PivotedLinear).
        words = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8)
        self.register_buffer("mask", words)

    @classmethod
    def of(
        cls,
        numbers: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "MaskedLinear":
        """From the numbers (rows, columns) at a mask (m n), row by row, and the bias (m); all are
        copied.
        """
        (m, n), (rows, columns) = mask.shape, numbers.shape
        module = cls(n, m, rows, columns, bias=bias is not None, dtype=dtype, device="meta")
        whole = torch.nn.functional.pad(mask, (0, -n % 8)).view(m, -1, 8)
        powers = 2 ** torch.arange(8, device=mask.device)
        module.mask = (whole * powers).sum(2).to(device, torch.uint8)
        made = numbers.detach().to(device=device, dtype=dtype, copy=True).contiguous()
        module.kept.weight = nn.Parameter(made)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
        return module

    def macs(self) -> int:
        """Multiply-adds a token: of the whole weight, zeros too."""
        return self.in_features * self.out_features

    def arguments(self) -> dict:
        """Sizes, and whether there is a bias."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rows": self.kept.out_features,
            "columns": self.kept.in_features,
            "bias": self.bias is not None,
        }

    def places(self) -> Tensor:
        """(m n): True where a number is kept."""
        bits = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        found = (self.mask[..., None] >> bits) & 1
        return found.flatten(1)[:, : self.in_features].bool()

    def whole(self) -> Tensor:
        """The weight (m n) in the dtype of what is kept."""
        kept = self.kept
        numbers = kept.merged_weight() if isinstance(kept, Substitute) else kept.weight
        return torch.zeros(
            self.out_features, self.in_features, dtype=numbers.dtype, device=numbers.device
        ).masked_scatter(self.places(), numbers)

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        return nn.functional.linear(x, self.whole().to(x.dtype), self.bias)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n) in at least float32."""
        whole = self.whole()
        return whole.to(torch.promote_types(whole.dtype, torch.float32))
