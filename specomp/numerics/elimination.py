"""Which dimensions of a vector can stand in for the others: a Cholesky elimination whose pivots
are weighted by how much the others matter.

z (d) has the Gram matrix C, and what counts is F z. Keep the dimensions J, and let them predict the
rest: z is replaced by C[:, J] C[J, J]^-1 z_J (Nystrom). What that loses is tr(F R F^T), with R what
elimination of J leaves of C. MoDeGPT (arXiv:2408.09632) and A3 (arXiv:2505.12942) cut MLPs so; the
weights F, the repair of both sides by one elimination and the greedy order are theirs in part.

Numerics: every dimension is first scaled to unit energy, so the order does not depend on units of
measurement. `noise` (d) is energy that is added to the diagonal: what no other dimension explains.
Losses are sums of what each later step of the whole elimination takes away, none of which is
negative: so they fall monotonically and end in zero, however large a massive activation is. A
difference of two large traces would not.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specomp.errors import UserError
from specomp.numerics.linalg import SOLVE_DTYPE, cholesky_damped
from specomp.numerics.work import Work, work

# Dimensions that are eliminated at once, and among how many each is chosen (CHOICE): those of
# largest gain when the block begins. One by one over all gives the same to 0.1 %, at ten times the
# time.
BLOCK, CANDIDATES = 64, 512
# Bumped whenever the same Gram would give another order.
VERSION = 1
# Energy of a dimension, of its own, that counts as none: all that is left of it is rounding, and
# of a Gram of half-precision products it may be negative.
EXPLAINED = 1e-9


@dataclass(frozen=True)
class Elimination:
    """order: dimensions, the most needed first; losses[k]: what keeping the first k loses,
    k = 0 .. d, falling to 0.
    """

    order: Int[Tensor, " d"]
    losses: Float[Tensor, " d+1"]


def eliminate(
    C: Float[Tensor, "d d"],
    F: Float[Tensor, "h d"],
    noise: Float[Tensor, " d"],
    *,
    exact: bool = False,
) -> Elimination:
    """Greedy: next comes the dimension that takes away the most of the loss. exact: each is chosen
    among all, not among the candidates of its block.
    """
    R, unit = scaled(C, noise)
    G = (F.to(SOLVE_DTYPE) * unit) @ R  # F R, kept up to date as R is
    alive = torch.arange(len(R), device=R.device)
    order, gains = [], []
    while len(alive):
        wanted = 1 if exact else min(BLOCK, len(alive))
        steps, gained = _block(R, G, wanted, CANDIDATES)
        if not len(steps):  # the others explain all that is left
            order.append(alive)
            gains.append(G.new_zeros(len(alive)))
            break
        order.append(alive[steps])
        gains.append(gained)
        root = positive_root(R[steps][:, steps])
        rows = torch.linalg.solve_triangular(root, R[steps], upper=False)
        left = torch.linalg.solve_triangular(root, G[:, steps].T, upper=False).T
        stay = torch.ones(len(alive), dtype=torch.bool, device=R.device)
        stay[steps] = False
        rows = rows[:, stay]
        R = R[stay][:, stay].addmm_(rows.T, rows, alpha=-1)
        G = G[:, stay].addmm_(left, rows, alpha=-1)
        alive = alive[stay]
    return Elimination(torch.cat(order), tails(torch.cat(gains)))


def _block(
    R: Float[Tensor, "a a"], G: Float[Tensor, "h a"], steps: int, candidates: int
) -> tuple[Int[Tensor, " s"], Float[Tensor, " s"]]:
    """The next dimensions, one after the other, and what each takes away; fewer, or none, where no
    other has energy of its own.
    """
    few = _gain(R, G, 0).topk(max(steps, min(candidates, R.shape[1]))).indices
    R, G = R[few][:, few], G[:, few].T.contiguous()
    chosen: list[int] = []
    gained: list[Tensor] = []
    for _ in range(steps):
        gain = _gain(R, G, 1)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        if float(gain[best]) < 0:
            break
        gained.append(gain[best].clone())
        row, column, pivot = R[best].clone(), G[best].clone(), float(R[best, best])
        row[chosen] = 0.0  # eliminated before: nothing is left of them but rounding
        chosen.append(best)
        R.addr_(row, row, alpha=-1 / pivot)
        G.addr_(row, column, alpha=-1 / pivot)
    return few[chosen], torch.stack(gained) if gained else G.new_zeros(0)


def _gain(R: Tensor, G: Tensor, dim: int) -> Float[Tensor, " a"]:
    """What each would take away; -1 of one that others explain."""
    energy = R.diagonal()
    there = energy > EXPLAINED
    taken = torch.linalg.vector_norm(G, dim=dim).square() / energy.where(there, 1.0)
    return taken.where(there, -1.0)


def losses_in_order(
    C: Float[Tensor, "d d"],
    F: Float[Tensor, "h d"],
    order: Int[Tensor, " d"],
) -> Float[Tensor, " d+1"]:
    """What keeping the first k of a given order loses, k = 0 .. d: of one Cholesky factor, column
    by column. C: positive definite.
    """
    R, unit = scaled(C, C.new_zeros(len(C)))
    root = positive_root(R[order][:, order])
    taken = ((F.to(SOLVE_DTYPE) * unit)[:, order] @ root).square().sum(0)
    return tails(taken)


def tails(steps: Float[Tensor, " d"]) -> Float[Tensor, " d+1"]:
    """What is left after the first k steps, k = 0 .. d: the sum of those that come later."""
    return torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])


def leverage(C: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """diag(C (C + I)^-1) in float64: ridge leverage scores, by which MoDeGPT chooses the dimensions
    of an MLP (Algorithm 1). Depends on units of measurement.
    """
    C = C.to(SOLVE_DTYPE)
    C = (C + C.T) / 2
    damped = C + torch.eye(len(C), dtype=C.dtype, device=C.device)
    root = positive_root(damped)
    return 1 - torch.cholesky_inverse(root).diagonal()


def losses_unrepaired(
    C: Float[Tensor, "d d"],
    F: Float[Tensor, "h d"],
    order: Int[Tensor, " d"],
    noise: Float[Tensor, " d"],
) -> Float[Tensor, " d+1"]:
    """What keeping the first k of an order loses, k = 0 .. d, where nothing stands in for the
    others: tr(F C F^T) over these, in float64. It may rise: others cancel.
    """
    C, F = C.to(SOLVE_DTYPE)[order][:, order], F.to(SOLVE_DTYPE)[:, order]
    terms = (F.T @ F) * (C + noise.to(SOLVE_DTYPE)[order].diag())
    return tails(terms.diagonal() + 2 * terms.triu(1).sum(1))


def eliminating(h: int, d: int) -> Work:
    """What it takes: the products of whole blocks, and what passes through memory inside them."""
    few = min(CANDIDATES, d)
    products = 2 * h * d * d + h * d * d + 2 * d**3 / 3
    return work("product", products, SOLVE_DTYPE) + work("memory", 3 * 8 * d * few * (h + few))


def stand_in(
    C: Float[Tensor, "d d"],
    T: Float[Tensor, "m d"],
    kept: Int[Tensor, " k"],
    noise: Float[Tensor, " d"],
) -> Float[Tensor, "m k"]:
    """T C[:, J] C[J, J]^-1 in float64: what T z becomes of z_J alone. All of them: T itself."""
    R, unit = scaled(C, noise)
    root = positive_root(R[kept][:, kept])
    whole = (T.to(SOLVE_DTYPE) * unit) @ R[:, kept]
    still = unit[kept] == 0
    found = torch.cholesky_solve(whole.T, root).T / unit[kept].masked_fill(still, 1.0)
    return torch.where(still, T[:, kept].to(SOLVE_DTYPE), found)


def positive_root(R: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """Its Cholesky factor, with as little damping as that takes. Raises UserError where the matrix
    is not finite.
    """
    try:
        return cholesky_damped(R, EXPLAINED, 1.0)[0]
    except ValueError as error:
        raise UserError(
            "The Gram matrix of a functional unit is not finite: see whether the dense model's"
            " perplexity is, or use calibration.precision=float32, or method/units=none."
        ) from error


def scaled(
    C: Float[Tensor, "d d"], noise: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """(C with its noise, at a diagonal of 1, in float64; the length of each dimension, 0 of one
    that never moves).
    """
    C = C.to(SOLVE_DTYPE)
    energy = C.diagonal().clamp_min(0) + noise.to(SOLVE_DTYPE)
    unit = energy.sqrt()
    length = unit.masked_fill(unit == 0, 1.0)
    R = C / length / length[:, None]
    R = (R + R.T) / 2
    R.diagonal().fill_(1.0)
    return R, unit
