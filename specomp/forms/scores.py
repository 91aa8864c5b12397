"""The scores of attention from fewer dimensions a head.

QueryKey   heads that share keys keep the same few dimensions of queries and keys      MoDeGPT, A3
(MoDeGPT, arXiv:2408.09632, Sec. 3; A3, arXiv:2505.12942.) A score is a sum over the dimensions of a
head, each of which is the product of a query's and a key's number. Under rotary embeddings they
come in pairs that no basis may mix, so whole pairs are kept; where positions do not rotate, in the
basis where dimensions matter in order. Differs from the papers: a pair's weight is what dropping it
from the queries alone loses in their own norm, times the same of the keys, under the root: without
gradients that is MoDeGPT's ||C_q^1/2 e|| ||C_k^1/2 e||. Biases cost no weights and stay whole; with
them a pair's weight is the sum of both. One order over all groups of a decoder layer says which
keeps how many (CHOICE).

transformers' attention reshapes q and k by one head_dim: each output that is kept stands where it
stood, or at its place in the new basis, the bias or zero where there is none.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from specomp.forms.cut import gram_of, stored_linear
from specomp.forms.heads import FLOOR, weighted_basis
from specomp.forms.pivoted import INDEX_BITS
from specomp.forms.prices import Part
from specomp.models.family import LinearSpec, Unit
from specomp.models.modules import Substitute, weight_of
from specomp.numerics.elimination import tails
from specomp.numerics.grid import GridSpec
from specomp.numerics.linalg import SOLVE_DTYPE, relative
from specomp.settings import configurable
from specomp.slots import Evidence, SizeOf


@configurable
class QueryKey:
    """Queries and keys of a decoder layer's attention, at every number of rotary pairs (without
    them: of directions) that all groups of heads keep together.
    """

    size_of: ClassVar[SizeOf] = "dimensions"

    def sizes(self, unit: Unit) -> range:
        """Pairs kept, one of every group at least."""
        return range(unit.heads[1], unit.linears[1].m // _pair(unit))

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """A share of both matrices, and the place of every output, which only bits count."""
        queries, keys = unit.linears
        rows = size * _pair(unit)
        found = {}
        for x, kept in ((queries, rows * (unit.heads[0] // unit.heads[1])), (keys, rows)):
            found[f"{x.kind}.part.weight"] = Part((kept, x.n), grid)
            found[f"{x.kind}.order"] = Part((x.m,), index_bits=INDEX_BITS)
        return found

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """Of the pairs that are dropped, each as if it alone were, (sizes) in float64."""
        return self._order(unit, evidence)["losses"][sizes]

    def kept(self, unit: Unit) -> int:
        """The order, losses of every size, and bases, all in 8 bytes."""
        keys, groups = unit.linears[1].m, unit.heads[1]
        return 8 * (2 * (keys // _pair(unit)) + 1 + keys * keys // groups)

    def _order(self, unit: Unit, evidence: Evidence) -> Mapping[str, Tensor]:
        """Pairs, the most needed first, what every number of them loses, and the groups' bases."""
        queries, keys = unit.linears
        heads, groups = unit.heads

        def make() -> dict[str, Tensor]:
            Cq, Hq = _moments(queries, heads, evidence)
            Ck, Hk = _moments(keys, groups, evidence)
            eye = torch.eye(Ck.shape[-1], dtype=SOLVE_DTYPE, device=Ck.device)
            B = eye.expand_as(Ck)
            share = heads // groups
            # without gradients a key counts for what the queries make of it
            plain = torch.equal(Hk, eye.expand_as(Hk))
            M = Cq.reshape(groups, share, *Cq.shape[1:]).sum(1) if plain else Hk
            if not unit.rotary:
                own = FLOOR * _positive(Ck.diagonal(dim1=1, dim2=2))
                found = [
                    weighted_basis(C + f.diag(), H)[0] for C, H, f in zip(Ck, M, own, strict=True)
                ]
                B = torch.stack(found)
                B = B * _balance(B, Cq, Ck)[:, None]
            inverse = torch.linalg.inv(B)
            A, A_inverse = B.repeat_interleave(share, 0), inverse.repeat_interleave(share, 0)
            Hq, Hk = (eye, eye) if plain else (A_inverse @ Hq @ A_inverse.mT, B.mT @ Hk @ B)
            of_queries = _of_pairs(Hq * (A.mT @ Cq @ A), _pair(unit)).reshape(groups, share, -1)
            of_keys = _of_pairs(Hk * (inverse @ Ck @ inverse.mT), _pair(unit))
            lost = _weights(of_queries.sum(1), of_keys, biased=_biased(unit, evidence))
            matter = lost.clone()
            matter[range(groups), matter.argmax(1)] = torch.inf  # one of every group at least
            order = matter.flatten().argsort(descending=True, stable=True)
            losses = tails(lost.flatten()[order])
            return {"order": order.cpu(), "losses": losses.cpu(), "bases": B.contiguous().cpu()}

        return evidence.remembered(unit, self, make)

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """Both linears with fewer outputs."""
        queries, keys = unit.linears
        heads, groups = unit.heads
        found, width, pair = self._order(unit, evidence), keys.m // groups, _pair(unit)
        bases = found["bases"].to(evidence.weight(keys).device)
        per_group = width // pair
        kept = torch.zeros(groups, per_group, dtype=torch.bool, device=bases.device)
        kept.view(-1)[found["order"][:size].to(bases.device)] = True
        kept = kept.repeat(1, pair)  # (groups, width): the halves of a pair are half a head apart
        share = heads // groups
        turns = {
            queries.name: bases.mT.repeat_interleave(share, 0),
            keys.name: torch.linalg.inv(bases),
        }
        outputs = {queries.name: kept.repeat_interleave(share, 0), keys.name: kept}
        return {
            x.name: _with_outputs(x, turns[x.name], outputs[x.name].flatten(), evidence)
            for x in unit.linears
        }

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Nothing: sizes say it."""
        return {}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """How many linears have fewer outputs."""
        return [
            f"{len(facts)} of {count} linears make queries or keys of fewer dimensions a head: an"
            " error is said of their own outputs"
        ]


def _pair(unit: Unit) -> int:
    """Dimensions that are kept or dropped together."""
    return 2 if unit.rotary else 1


def _biased(unit: Unit, evidence: Evidence) -> bool:
    return any(evidence.bias(x) is not None for x in unit.linears)


def _moments(linear: LinearSpec, heads: int, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(Gram of the outputs without bias, D^T D), of every head (heads, width, width), in
    float64.
    """
    W, norm = evidence.weight(linear).to(SOLVE_DTYPE), evidence.norm(linear)
    rows = W.reshape(heads, -1, linear.n)
    C = rows @ gram_of(norm, linear.name).to(SOLVE_DTYPE) @ rows.mT
    D = norm.weigh(torch.eye(linear.m, device=W.device))
    columns = D.T.reshape(heads, -1, len(D))
    return (C + C.mT) / 2, columns @ columns.mT


def _balance(B: Tensor, Cq: Tensor, Ck: Tensor) -> Tensor:
    """(groups, width): lengths of a basis at which queries and keys have the same energy."""
    share = len(Cq) // len(Ck)
    A, inverse = B.repeat_interleave(share, 0), torch.linalg.inv(B)
    of_queries = (A.mT @ Cq @ A).diagonal(dim1=1, dim2=2).reshape(len(B), share, -1).mean(1)
    of_keys = (inverse @ Ck @ inverse.mT).diagonal(dim1=1, dim2=2)
    lengths = (of_keys / of_queries).pow(0.25)
    return torch.where((of_queries > 0) & (of_keys > 0), lengths, 1.0)


def _of_pairs(E: Tensor, pair: int) -> Tensor:
    """(heads, width / pair) from terms (heads, width, width) of a quadratic form: the sum of those
    of each pair.
    """
    blocks = E.reshape(len(E), pair, -1, pair, E.shape[1] // pair)
    return blocks.diagonal(dim1=2, dim2=4).sum((1, 2)).clamp_min(0)


def _weights(of_queries: Tensor, of_keys: Tensor, *, biased: bool) -> Tensor:
    """What each pair loses, (groups, pairs).

    Without biases a dropped product is gone from either side, and both sides say what that loses:
    their geometric mean. With biases each side loses what it adds to the bias of the other.
    """
    return of_queries + of_keys if biased else (of_queries * of_keys).sqrt()


def _positive(energy: Tensor) -> Tensor:
    """(groups, width): in place of none the mean of the group, of a dead group 1."""
    mean = energy.mean(1, keepdim=True)
    return torch.where(energy > 0, energy, torch.where(mean > 0, mean, 1.0))


def _with_outputs(
    linear: LinearSpec, turn: Tensor, kept: Tensor, evidence: Evidence
) -> "SomeOutputs":
    """The linear, each head in the basis of `turn` (heads, width, width), with the outputs
    kept (m) alone.
    """
    W, bias = evidence.weight(linear), evidence.bias(linear)
    turned = turn @ W.to(SOLVE_DTYPE).reshape(len(turn), -1, linear.n)
    back = torch.linalg.inv(turn)

    def assembled(rows: Tensor) -> Tensor:
        whole = turned.new_zeros(linear.m, linear.n)
        whole[kept] = rows.to(SOLVE_DTYPE)
        return (back @ whole.reshape_as(turned)).reshape(linear.m, linear.n).float()

    made = SomeOutputs(linear.n, linear.m, int(kept.sum()), bias=bias is not None, device="meta")
    rows = turned.reshape(linear.m, linear.n)[kept].float()
    left = torch.block_diag(*back)[:, kept]
    made.part = stored_linear(linear, rows, None, evidence, assembled, None, left=left)
    place = evidence.place(linear)
    if bias is not None:
        own = (turn @ bias.to(SOLVE_DTYPE).reshape(len(turn), -1, 1)).flatten()
        made.bias = nn.Parameter(own.to(**place))
    order = torch.where(kept, kept.cumsum(0) - 1, kept.sum())
    made.order = order.to(device=place["device"], dtype=torch.int32)
    norm = evidence.norm(linear)
    error = W.float() - assembled(weight_of(made.part))
    evidence.lost(linear, relative(norm.loss(error), norm.loss(W.float())))
    return made


class SomeOutputs(Substitute):
    """A linear that makes only some of its outputs: the others are their bias, or zero.

    `order` (m), int32, says which of those that are made each output is; past the last: none.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kept = in_features, out_features, kept
        self.part = nn.Linear(in_features, kept, bias=False, dtype=dtype, device=device)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        self.register_buffer("order", torch.zeros(out_features, dtype=torch.int32))  # see pivoted

    def arguments(self) -> dict:
        """Sizes, and whether there is a bias."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"kept": self.kept, "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        made = nn.functional.pad(self.part(x), (0, 1))
        out = made.gather(-1, self.order.long().expand(*made.shape[:-1], -1))
        return out if self.bias is None else out + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n), in at least float32: rows of zeros where nothing is made."""
        return nn.functional.pad(self.acting(self.part), (0, 0, 0, 1))[self.order.long()]
