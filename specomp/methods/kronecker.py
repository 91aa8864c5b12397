"""Two-sided norm: Kronecker-factored curvature of the language-model loss (K-FAC, arXiv:1503.05671; GFWSVD, arXiv:2505.17974).

KroneckerWhitening   ||D (W' - W) S||_F with S S^T = sum_t x_t x_t^T and D^T D = sum_t g_t g_t^T, g = dLoss/dy
To second order, with inputs and output gradients taken as independent, its square is the loss increase, up to one factor that all linears
share. Identity D is SVD-LLM, a diagonal D with identity S is FWSVD on outputs.
Differs from the papers: K-FAC draws labels from the model, here they are the text's (the empirical Fisher matrix); D is damped relative
to its own mean diagonal and S not at all (CHOICE); GFWSVD fits the Kronecker factors to the Fisher matrix of the whole weight.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from specomp.factors import Norm, TwoSidedNorm
from specomp.linalg import SolveDtype
from specomp.settings import configurable
from specomp.statistics import Gram, OutputGradGram, Statistic, Stats


@configurable
class KroneckerWhitening:
    """The inputs' Gram on one side, the output gradients' on the other; its damping is recorded."""

    damping: Annotated[float, Field(gt=0)]
    solve: SolveDtype
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram(), OutputGradGram()})

    def __call__(self, stats: Stats) -> Norm:
        """Two-sided norm."""
        return TwoSidedNorm(stats[Gram()], stats[OutputGradGram()], self.damping, solve=self.solve)
