"""A whole MLP of fewer inner dimensions: the kept ones stand in for the others.

Cut   z = act(gate x) * up x keeps the dimensions J, down takes what predicts the rest     Sec. 3
(MoDeGPT, arXiv:2408.09632; A3, arXiv:2505.12942.) gate' = gate[J], up' = up[J],
down' = W C[:, J] C[J, J]^-1 with the Gram C of z, which is down's input: three plain smaller
linears, no second product, any grid. Differs from the papers: the order is one greedy elimination
weighted by down's own norm (numerics/elimination.py), so that its losses compare with those of low
rank; nothing is left out of C, however large a massive activation is (CHOICE).
"""

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from specomp.errors import UserError
from specomp.forms.prices import Part
from specomp.models.family import LinearSpec, Unit
from specomp.models.modules import PartLinear, weight_of
from specomp.numerics.elimination import (
    Elimination,
    eliminate,
    leverage,
    losses_in_order,
    losses_unrepaired,
    stand_in,
)
from specomp.numerics.factors import Norm
from specomp.numerics.grid import GridSpec
from specomp.numerics.linalg import relative
from specomp.settings import configurable
from specomp.slots import Chain, Evidence, SizeOf, check_protocol


@configurable
class Cut:
    """An MLP at every number of inner dimensions."""

    size_of: ClassVar[SizeOf] = "dimensions"
    # Added to the diagonal of z's Gram at unit energy: how far a nearly dependent dimension is
    # trusted (methods.md 11: 1e-4).
    ridge: Annotated[float, Field(gt=0, lt=1)]
    # Likewise a share of the energy that weights alone make one expect of a dimension (CHOICE).
    prior: Annotated[float, Field(ge=0)]
    # How dimensions are put in order: weighted by what down's norm makes of them; by their own
    # energy alone (unweighted Nystrom); by ridge leverage scores (MoDeGPT); by chance.
    order: Literal["weighted", "unweighted", "leverage", "random"]
    # Whether the kept ones stand in for the others; false is for the ablation.
    repair: bool
    # What a predicted loss of a cut counts for beside those of low rank: below 1 more is cut.
    loss_scale: Annotated[float, Field(gt=0)]
    # Inner dimensions are multiples of this, for kernels that want it.
    round_to: Annotated[int, Field(ge=1)]

    def sizes(self, unit: Unit) -> range:
        """Inner dimensions kept."""
        # all of them, too: on a grid that is cheaper than dense
        return range(self.round_to, unit.linears[-1].n + 1, self.round_to)

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """A share of every matrix: that of its inner dimensions."""
        *inner, down = unit.linears
        rows = {f"{x.kind}.weight": Part((size * (x.m // down.n), x.n), grid) for x in inner}
        return rows | {f"{down.kind}.weight": Part((down.m, size), grid)}

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """tr(D W R W^T D^T), R what the kept dimensions leave of C, (sizes) in float64; without
        repair, tr(D W_d C_d W_d^T D^T) of those that are dropped. Times loss_scale.
        """
        return self.loss_scale * self._order(unit, evidence)["losses"][sizes]

    def kept(self, unit: Unit) -> int:
        """The order, losses of every size, and noise, all in 8 bytes."""
        return 8 * (3 * unit.linears[-1].n + 1)

    def _order(self, unit: Unit, evidence: Evidence) -> Mapping[str, Tensor]:
        """Of its inner dimensions, and what every number of them loses."""
        down = unit.linears[-1]

        def make() -> dict[str, Tensor]:
            norm = evidence.norm(down)
            gram = gram_of(norm, down.name)
            noise = self._noise(unit, gram, evidence)
            weighted = norm.weigh(evidence.weight(down))
            found = self._eliminated(unit, gram, weighted, noise)
            return {
                "order": found.order.cpu(),
                "losses": found.losses.cpu(),
                "noise": noise.cpu(),
            }

        return evidence.remembered(unit, self, make)

    def _eliminated(self, unit: Unit, gram: Tensor, F: Tensor, noise: Tensor) -> Elimination:
        """In the order that is asked for."""
        match self.order:
            case "weighted":
                found = eliminate(gram, F, noise)
                if self.repair:
                    return found
                order = found.order
            case "unweighted":
                order = eliminate(gram, torch.eye(len(gram), device=gram.device), noise).order
            case "leverage":
                order = leverage(gram).argsort(descending=True, stable=True)
            case "random":
                dice = torch.Generator().manual_seed(unit.decoder_layer)
                order = torch.randperm(len(gram), generator=dice).to(gram.device)
        if self.repair:
            losses = losses_in_order(gram + noise.to(gram.dtype).diag(), F, order)
        else:
            losses = losses_unrepaired(gram, F, order, noise)
        return Elimination(order, losses)

    def _noise(self, unit: Unit, gram: Tensor, evidence: Evidence) -> Tensor:
        """(d): energy that a dimension is taken to have beside what calibration saw of it.

        A share of what it saw; and a share of what weights alone make one expect: the product of
        the energies of the rows that make it, for inputs of their Gram. So a dimension that this
        text rarely needs is not cut as if no text did.
        """
        *inner, down = unit.linears
        expected = gram.new_ones(down.n, dtype=torch.float64)
        for x in inner:
            rows, inputs = evidence.weight(x).double(), gram_of(evidence.norm(x), x.name).double()
            energy = ((rows @ inputs) * rows).sum(1)
            expected = expected * energy.reshape(-1, down.n).prod(0).to(expected.device)
        seen = gram.diagonal().double()
        moving = (seen > 0) & (expected > 0)
        scale = (seen[moving] / expected[moving]).median() if bool(moving.any()) else 0.0
        return self.ridge * seen + self.prior * scale * expected

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """Plain linears."""
        *inner, down = unit.linears
        found = self._order(unit, evidence)
        weight = evidence.weight(down)
        kept = found["order"][:size].sort().values.to(weight.device)
        modules: dict[str, nn.Module] = {}
        for linear in inner:
            blocks = [kept + i * down.n for i in range(linear.m // down.n)]
            modules[linear.name] = _rows(linear, torch.cat(blocks), evidence)
        norm = evidence.norm(down)
        noise = found["noise"].to(weight.device)
        repaired = weight[:, kept]
        if self.repair:
            repaired = stand_in(gram_of(norm, down.name), weight, kept, noise).to(weight.dtype)
        modules[down.name] = made = _columns(down, repaired, kept, evidence)
        error = weight.float().clone()
        error[:, kept] -= weight_of(made)
        evidence.lost(down, relative(norm.loss(error), norm.loss(weight.float())))
        return modules

    def facts(self, module: nn.Module) -> dict[str, float]:
        """That it is of a cut MLP; its size is its rank."""
        return {"cut": 1.0}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """How many linears are smaller."""
        return [
            f"{len(facts)} of {count} linears are of MLPs cut to fewer inner dimensions: an error"
            " is said of the linear that reads these; method.compensation does not touch them"
        ]


def gram_of(norm: Norm, name: str) -> Tensor:
    """(d, d) of what a linear reads, in its norm. Raises UserError where that has none."""
    check_protocol(norm, Norm, "the norm of method.whitening")
    gram = norm.gram
    if gram is None or gram.ndim != 2:
        raise UserError(
            f"{name}: a functional unit is cut by the Gram matrix of what its last linear reads,"
            " which this norm has not: use method/whitening=gram or kronecker, or"
            " method/units=none."
        )
    return gram


def _rows(linear: LinearSpec, kept: Tensor, evidence: Evidence) -> nn.Module:
    """The linear with some of its outputs."""

    def assembled(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(linear.m, linear.n)
        whole[kept] = rows
        return whole

    weight = evidence.weight(linear)[kept]
    bias = evidence.bias(linear)
    bias = None if bias is None else bias[kept]
    return _stored(linear, weight, bias, evidence, assembled, outputs=kept)


def _columns(linear: LinearSpec, weight: Tensor, kept: Tensor, evidence: Evidence) -> nn.Linear:
    """The linear on some of its inputs."""

    def assembled(columns: Tensor) -> Tensor:
        whole = columns.new_zeros(linear.m, linear.n)
        whole[:, kept] = columns
        return whole

    return _stored(linear, weight, evidence.bias(linear), evidence, assembled, inputs=kept)


def _stored(
    linear: LinearSpec,
    weight: Tensor,
    bias: Tensor | None,
    evidence: Evidence,
    assembled: Callable[..., Tensor],
    *,
    outputs: Tensor | None = None,
    inputs: Tensor | None = None,
) -> nn.Linear:
    made = stored_linear(
        linear, weight, bias, evidence, assembled, inputs, left=outputs, kind=PartLinear
    )
    if isinstance(made, PartLinear):
        made.outputs, made.inputs = outputs, inputs
    return made


def stored_linear(
    linear: LinearSpec,
    weight: Tensor,
    bias: Tensor | None,
    evidence: Evidence,
    assembled: Callable[..., Tensor],
    inputs: Tensor | None,
    *,
    left: Tensor | None,
    kind: type[nn.Linear] = nn.Linear,
) -> nn.Linear:
    """A linear of this weight and bias where `linear` is, rounded as the method rounds; assembled
    inputs and left, the only one of its lefts: see Chain.
    """
    chain = Chain((weight,), assembled, inputs=inputs, lefts=lambda _: (left,))
    (found,) = evidence.rounded(linear, chain)
    m, n = weight.shape
    made = kind(n, m, bias=bias is not None, device="meta")
    place = evidence.place(linear)
    made.weight = nn.Parameter(found.values.detach().to(**place, copy=True).contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(**place, copy=True))
    held: nn.Linear = found.stored(made)
    return held
