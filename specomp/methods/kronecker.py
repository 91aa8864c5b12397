"""Two-sided norm: Kronecker-factored curvature of the language-model loss (K-FAC, arXiv:1503.05671;
GFWSVD, arXiv:2505.17974).

KroneckerWhitening  ||D (W' - W) S||_F with A = S S^T of the inputs x_t and B = D^T D of the
                    gradients g_t = dLoss/dy_t

Up to one factor that all linears share, sum_t (x_t x_t^T) kron (g_t
g_t^T) is the curvature of the loss by the weight, and A kron B approximates it: with x and g
independent of each other as in K-FAC, or as the nearest such product as in GFWSVD. So the squared
norm predicts the loss increase. With B = I and independent factors it is SVD-LLM, with A = I and a
diagonal B FWSVD on outputs. Differs from the papers: labels are the text's, not drawn from the
model (the empirical Fisher matrix); B is damped relative to its mean diagonal, A so if asked
(CHOICE); the nearest product is taken over tokens, not sequences, and after one step of its
iteration.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from specomp.numerics.factors import Norm, TwoSidedNorm
from specomp.numerics.linalg import SolveDtype
from specomp.numerics.statistics import Gram, OutputGradGram, Statistic, Stats, TokenWeightedGram
from specomp.settings import configurable


@configurable
class KroneckerWhitening:
    """The inputs' Gram on one side, the output gradients' on the other; the damping of the latter
    is recorded.
    """

    # independent: sum x x^T and sum g g^T (K-FAC); nearest: each token weighted by the other side's
    # length (GFWSVD).
    fit: Literal["independent", "nearest"]
    damping: Annotated[float, Field(gt=0)]
    solve: SolveDtype
    # Likewise added to the inputs' Gram, relative to its mean diagonal: inputs that this text
    # rarely has count a little, as in texts that it is not.
    input_damping: Annotated[float, Field(ge=0)] = 0.0

    @property
    def needs(self) -> frozenset[Statistic]:
        """One Gram of each side."""
        return frozenset(self.sides)

    @property
    def sides(self) -> tuple[Statistic, Statistic]:
        """The statistics of the inputs and of the gradients."""
        return (
            (Gram(), OutputGradGram())
            if self.fit == "independent"
            else (TokenWeightedGram("in"), TokenWeightedGram("out"))
        )

    def __call__(self, stats: Stats) -> Norm:
        """Two-sided norm."""
        inputs, gradients = (stats[side] for side in self.sides)
        if self.fit == "nearest":
            # The product of the traces is the square of what it stands for: one of them goes.
            inputs = inputs / inputs.diagonal().sum().clamp_min(1e-30)
        if self.input_damping:
            mean = inputs.diagonal().mean()
            inputs = inputs + torch.diag(self.input_damping * mean.expand(len(inputs)))
        return TwoSidedNorm(inputs, gradients, self.damping, solve=self.solve)
