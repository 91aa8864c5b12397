"""LoRA recovery of a compressed model (Hu et al., arXiv:2106.09685): the stage that SVD-LLM (arXiv:2403.07378) adds to whitening.

LoRA   W <- W + (alpha / rank) B A   for every matrix that is stored: both factors, pivot rows and coefficients, linears left dense

A and B are trained against the dense model's distribution (SVD-LLM: on the labels of an instruction set, U and V one after the other;
here both at once, so that a trained row of another kind has the same teacher, text and steps beside it), and then added to W: nothing more
is stored than without. The text may go on beyond the calibration set (`num_samples`), as SVD-LLM's does. Comes after packing and
compensation, so every row can have it. The numbers of conf/method/training/lora.yaml are CHOICES.
"""

from collections.abc import Mapping
from typing import ClassVar

from specomp.phases import Count, Distillation, Phase, Positive, Trains
from specomp.settings import configurable


@configurable
class LoRA(Distillation):
    """Settings of the adapters and of their training."""

    trains: ClassVar[Trains] = "stored"

    steps: Count
    rank: Count
    alpha: Positive

    @property
    def schedule(self) -> Mapping[str, Phase]:
        """One phase."""
        return {"recover": Phase(steps=self.steps, until=None, prune_margin=None)}
