"""FWSVD: Language model compression with weighted low-rank factorization (arXiv:2207.00112).

FisherWhitening  norm weighted by the root of the summed Fisher information (Sec. 3.2, Eq. 4-6)

The paper's W is (in, out), so its "rows" are input features: side "in" here is a weight per
column of nn.Linear.weight. Differs from the paper: eps regularizes features whose gradient vanishes
(CHOICE). Reference code: none published.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from specomp.numerics.factors import GramNorm, Norm
from specomp.numerics.linalg import SolveDtype
from specomp.numerics.statistics import Fisher, Statistic, Stats
from specomp.settings import configurable


@configurable
class FisherWhitening:
    """||(W' - W) diag(I)^{1/2}||_F for side in, ||diag(I)^{1/2} (W' - W)||_F for side out, I = row
    or column sums of grad^2.
    """

    side: Literal["in", "out"]
    eps: Annotated[float, Field(gt=0)]
    solve: SolveDtype

    @property
    def needs(self) -> frozenset[Statistic]:
        """Fisher information of one side."""
        return frozenset({Fisher(self.side)})

    def __call__(self, stats: Stats) -> Norm:
        """Diagonal norm."""
        importance = stats[Fisher(self.side)]
        importance = importance + self.eps * importance.mean()
        if self.side == "in":
            return GramNorm(importance, solve=self.solve)
        # Where no loss depends on these outputs they are all alike. Without a branch on values:
        # plans count with tensors that have none.
        importance = torch.where(importance.any(), importance, torch.ones_like(importance))
        return GramNorm(None, left=importance.sqrt(), solve=self.solve)
