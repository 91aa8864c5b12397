"""The values of attention at fewer dimensions a head, and what reads them.

ValueOutput   heads that share values keep the same few directions of them     MoDeGPT Sec. 3, A3
(MoDeGPT, arXiv:2408.09632; A3, arXiv:2505.12942.) The output of a head is a mean of values, so any
basis of them is as good as another if what reads it follows: v' = B^-1 v, o' = o B. In the basis
where directions matter in order, the first few of every group of heads are kept, and o is solved
anew so that they stand in for the rest, as the inner dimensions of an MLP do (forms/cut.py).
Differs from the papers: the basis is that of o's own norm, the Gram of the heads' outputs included,
and one order over all groups of a decoder layer says which keeps how many (CHOICE).

transformers' attention reshapes v by one head_dim: what is kept of every head stands first in it,
zeros behind, and o reads what is there. So the attention itself is left as it is.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from specomp.forms.cut import gram_of, stored_linear
from specomp.forms.prices import Part
from specomp.models.family import LinearSpec, Unit
from specomp.models.modules import Substitute, weight_of
from specomp.numerics.elimination import losses_in_order, positive_root, stand_in
from specomp.numerics.grid import GridSpec
from specomp.numerics.linalg import SOLVE_DTYPE, relative
from specomp.settings import configurable
from specomp.slots import Evidence, SizeOf

FLOOR = 1e-9


@configurable
class ValueOutput:
    """Values and outputs of a decoder layer's attention, at every number of directions that all
    groups of heads keep together.
    """

    size_of: ClassVar[SizeOf] = "dimensions"
    # Added to the diagonal of the Gram of the heads' outputs, relative to it (see Cut).
    ridge: Annotated[float, Field(gt=0, lt=1)]

    def sizes(self, unit: Unit) -> range:
        """Directions kept, one of every group at least."""
        values, _ = unit.linears
        return range(unit.heads[1], values.m)

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """A share of both matrices: that of the directions."""
        values, output = unit.linears
        columns = size * (unit.heads[0] // unit.heads[1])
        return {
            f"{values.kind}.part.weight": Part((size, values.n), grid),
            f"{output.kind}.part.weight": Part((output.m, columns), grid),
        }

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """tr(D W R W^T D^T), R what the kept directions leave of the Gram of the heads' outputs,
        (sizes) in float64.
        """
        return self._order(unit, evidence)["losses"][sizes]

    def kept(self, unit: Unit) -> int:
        """Bases, the groups in order, and losses of every size, all in 8 bytes."""
        values, groups = unit.linears[0].m, unit.heads[1]
        return 8 * (2 * values + 1 + values * values // groups)

    def _order(self, unit: Unit, evidence: Evidence) -> Mapping[str, Tensor]:
        """Bases of the groups, which group gives the next direction, and what every number of them
        loses.
        """
        values, output = unit.linears
        heads, groups = unit.heads
        width, share = output.n // heads, heads // groups

        def make() -> dict[str, Tensor]:
            norm, gram = evidence.norm(output), self._gram(output, evidence)
            F = norm.weigh(evidence.weight(output))
            bases, matter = [], []
            for group in range(groups):
                mine = [group * share + i for i in range(share)]
                blocks = [slice(h * width, (h + 1) * width) for h in mine]
                G = torch.stack([gram[x, x] for x in blocks]).sum(0)
                M = torch.stack([F[:, x].T @ F[:, x] for x in blocks]).sum(0)
                basis, squares = weighted_basis(G, M)
                bases.append(basis)
                matter.append(squares)
            B = torch.stack(bases)
            flat = torch.stack(matter)
            flat[:, 0] = torch.inf  # one of every group at least
            order = flat.flatten().argsort(descending=True, stable=True)
            owner, place = order // width, order % width
            # heads of a group keep the same direction: each of its steps takes one of every head
            steps = torch.arange(share, device=order.device) + owner[:, None] * share
            index = (steps * width + place[:, None]).flatten()
            whole, _, turned = in_bases(B, heads, gram)
            lost = losses_in_order(turned, F @ whole, index)[::share]
            return {
                "bases": B.cpu(),
                "groups": owner.cpu(),
                "losses": lost.cpu(),
            }

        return evidence.remembered(unit, self, make)

    def _gram(self, output: LinearSpec, evidence: Evidence) -> Tensor:
        """Of the heads' outputs, with the ridge, in float64."""
        gram = gram_of(evidence.norm(output), output.name).to(SOLVE_DTYPE)
        gram = (gram + gram.T) / 2
        own = gram.diagonal().clamp_min(0)
        # what never moves has to have some length in a basis
        return gram + torch.diag(self.ridge * own + FLOOR * own.mean())

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """Both linears at fewer directions."""
        values, output = unit.linears
        heads, groups = unit.heads
        width, share = output.n // heads, heads // groups
        found = self._order(unit, evidence)
        W = evidence.weight(output)
        bases = found["bases"].to(W.device)
        counts = torch.bincount(found["groups"][:size], minlength=groups).tolist()
        inverses = torch.linalg.inv(bases)

        V, b = evidence.weight(values).to(SOLVE_DTYPE), evidence.bias(values)
        rows = [inverses[g][:r] @ V[g * width : (g + 1) * width] for g, r in enumerate(counts)]
        bias = None
        if b is not None:
            pieces = b.to(SOLVE_DTYPE).reshape(groups, width)
            bias = torch.cat([inverses[g][:r] @ pieces[g] for g, r in enumerate(counts)])

        norm = evidence.norm(output)
        whole, inverse, turned = in_bases(bases, heads, self._gram(output, evidence))
        per_head = [counts[h // share] for h in range(heads)]
        kept = torch.cat(
            [torch.arange(r, device=W.device) + h * width for h, r in enumerate(per_head)]
        )
        nothing = turned.new_zeros(len(turned))
        columns = stand_in(turned, W.to(SOLVE_DTYPE) @ whole, kept, nothing)

        def values_of(found: Tensor) -> Tensor:
            parts = zip(found.to(SOLVE_DTYPE).split(counts), bases, counts, strict=True)
            return torch.cat([B[:, :r] @ rows for rows, B, r in parts]).float()

        def output_of(found: Tensor) -> Tensor:
            return (found.to(SOLVE_DTYPE) @ inverse[kept]).float()

        own = evidence.bias(output)
        first = HeadsOut(values.n, values.m, counts, bias=bias is not None, device="meta")
        reduced = torch.cat(rows).float()
        left = values_of(torch.eye(len(reduced), device=reduced.device))
        first.part = stored_linear(values, reduced, bias, evidence, values_of, None, left=left)
        last = HeadsIn(output.n, output.m, per_head, bias=own is not None, device="meta")
        last.part = stored_linear(
            output, columns.float(), own, evidence, output_of, inverse[kept].float(), left=None
        )
        error = W.float() - output_of(weight_of(last.part))
        evidence.lost(output, relative(norm.loss(error), norm.loss(W.float())))
        return {values.name: first, output.name: last}

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Nothing: sizes say it."""
        return {}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """How many linears have fewer directions."""
        return [
            f"{len(facts)} of {count} linears are of attention with fewer dimensions of values a"
            " head: an error is said of the linear that reads them"
        ]


def in_bases(bases: Tensor, heads: int, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(basis of all heads, its inverse, the Gram in it), from a basis (w w) of each group."""
    share = heads // len(bases)
    whole = torch.block_diag(*[bases[h // share] for h in range(heads)])
    inverse = torch.linalg.inv(whole)
    return whole, inverse, inverse @ gram @ inverse.T


def weighted_basis(G: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """(B (w w), squares (w) descending): in the basis B the values y = B^-1 c of Gram G, read by
    what has the Gram M, lose squares[i] where direction i goes: the singular values of
    M^1/2 G^1/2, squared.
    """
    root = positive_root(G)
    squares, vectors = torch.linalg.eigh(root.T @ ((M + M.T) / 2) @ root)
    return root @ vectors.flip(1), squares.flip(0).clamp_min(0)


class HeadsPart(Substitute):
    """A linear one side of which is heads of one width, of each of which `part` has only the first
    few: sizes, head by head.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sizes: list[int],
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.sizes = in_features, out_features, list(sizes)
        n, m = self.shape()
        self.part = nn.Linear(n, m, bias=bias, dtype=dtype, device=device)

    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of what is stored."""
        raise NotImplementedError

    def spread(self, weight: Tensor) -> Tensor:
        """What is stored in its place (m n), zeros elsewhere."""
        raise NotImplementedError

    def arguments(self) -> dict:
        """Sizes, and whether there is a bias."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"sizes": self.sizes, "bias": self.part.bias is not None}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n), in at least float32."""
        return self.spread(self.acting(self.part))


class HeadsOut(HeadsPart):
    """Of its outputs, heads, only the first few of each exist: zeros stand for the others."""

    def shape(self) -> tuple[int, int]:
        """Fewer outputs."""
        return self.in_features, sum(self.sizes)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(m)."""
        part = self.part.bias
        return None if part is None else self.spread(part[:, None])[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        width = self.out_features // len(self.sizes)
        heads = self.part(x).split(self.sizes, -1)
        return torch.cat([nn.functional.pad(y, (0, width - y.shape[-1])) for y in heads], -1)

    def spread(self, weight: Tensor) -> Tensor:
        """Rows (sum of sizes, n) in their places (m n)."""
        width = self.out_features // len(self.sizes)
        heads = weight.split(self.sizes)
        return torch.cat([nn.functional.pad(y, (0, 0, 0, width - len(y))) for y in heads])


class HeadsIn(HeadsPart):
    """Of its inputs, heads, it reads only the first few of each."""

    def shape(self) -> tuple[int, int]:
        """Fewer inputs."""
        return sum(self.sizes), self.out_features

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(m)."""
        return self.part.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        width = self.in_features // len(self.sizes)
        heads = [x[..., i * width : i * width + size] for i, size in enumerate(self.sizes)]
        out: Tensor = self.part(torch.cat(heads, -1))
        return out

    def spread(self, weight: Tensor) -> Tensor:
        """Columns (m, sum of sizes) in their places (m n)."""
        width = self.in_features // len(self.sizes)
        heads = weight.split(self.sizes, 1)
        return torch.cat([nn.functional.pad(y, (0, width - y.shape[1])) for y in heads], 1)
