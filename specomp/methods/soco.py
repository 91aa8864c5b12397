"""SoCo: a learnable singular spectrum, trained in three stages (arXiv:2502.15092).

Every linear becomes U (Sigma * S) V^T with frozen bases; S and an output bias d (the paper's
"deviation term") are trained end to end against the dense model; components whose S ends below a
threshold are pruned, the others keep their amplified S.

CoarseCompression        stage 1: the retention follows a line from its start to what is wanted
AlternatingOptimization  stage 2: compress while above the budget, recover while below it
Sparsification           stage 3: polarize the scores around the threshold, fade out the losers

Published are the parametrization, the three stages, the kind of the loss terms and that stages end
at fixed steps. How each term is written, every weight and every number of steps is not
(specomp/methods/README.md lists what is whose): they are ours, and settings.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from specomp.settings import configurable
from specomp.training.phases import LossTerms, Phase

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@configurable
class CoarseCompression(Phase):
    """Stage 1, "rapid compression": performance + price * excess over a budget that tightens
    linearly.
    """

    price: Weight  # lambda_c

    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """Performance loss plus the priced hinge on the soft retention, until pruning now would
        meet the budget.

        The soft count lags behind the hard one: it still counts losers that are not yet 0, and
        alone would overshoot.
        """
        if terms.hard_retention <= terms.target:
            return terms.performance
        wanted = terms.initial + (terms.target - terms.initial) * progress
        return terms.performance + self.price * excess(terms, wanted).clamp_min(0)


@configurable
class AlternatingOptimization(Phase):
    """Stage 2, "oscillation": a compressing step whenever pruning now would miss the budget, a
    recovering one otherwise.
    """

    price: Weight  # lambda_c

    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """Performance loss, plus the price of the soft retention while over budget."""
        if terms.hard_retention > terms.target:
            return terms.performance + self.price * excess(terms, terms.target)
        return terms.performance


@configurable
class Sparsification(Phase):
    """Stage 3, "decisive sparsification": empty the band around the threshold, so that the hard cut
    changes nothing any more.
    """

    price: Weight  # lambda_c
    polarization: Weight  # lambda_s at the end of the stage; rises linearly from 0
    margin: Weight  # delta: kept gates are pushed above threshold + margin
    # share of the stage over which the losers' gates are faded out in the forward pass; 0: only the
    # penalty empties the band
    fade: Share

    def loss(self, terms: LossTerms, progress: float) -> Tensor:
        """Performance loss, priced hinge and ramped polarization."""
        held = terms.performance + self.price * excess(terms, terms.target).clamp_min(0)
        return held + self.polarization * progress * polarization(
            terms.gates, terms.threshold, self.margin
        )

    def cut(self, progress: float) -> float:
        """Linear up to 1 over the share `fade`; what is left of the stage trains the model as it
        will be stored.
        """
        return min(1.0, progress / self.fade) if self.fade > 0 else 0.0


@configurable
class Recovery(Phase):
    """Performance loss alone: with the losers cut, a polish; on a truncated spectrum, the
    equal-budget control of SoCo.
    """

    cut_losers: bool

    def cut(self, progress: float) -> float:
        """All or nothing."""
        return float(self.cut_losers)


def excess(terms: LossTerms, wanted: float) -> Tensor:
    """How far the soft retention is above a wanted one, as a share of what the target removes."""
    return (terms.soft_retention - wanted) / max(1 - terms.target, 1e-6)


def polarization(gates: Tensor, threshold: float, margin: float) -> Tensor:
    """mean_i of S_i where S_i < threshold, and of max(0, threshold + margin - S_i) elsewhere:
    losers to 0, winners out of the band.
    """
    losers = gates < threshold
    return torch.where(losers, gates, (threshold + margin - gates).clamp_min(0)).mean()
