"""Block refinement: after a decoder layer is packed, its linears are fitted to the outputs of the
dense one (AA-SVD, arXiv:2604.02119).

BlockRefine   some steps of Adam on   mean_t ||f'(h'_t) - f(h_t)||^2 / ||f(h_t)||^2

f is the dense decoder layer on the dense model's hidden states h, f' the packed one on those of the
compressed model before it. Each token counts relative to its own length, as the norm of the next
decoder layer sees it; otherwise the few tokens with massive activations would be all that is fitted
(CHOICE, as is every number in conf/method/refinement/block_refine.yaml). Linears that stay dense
are fitted too. Local: no gradient leaves the decoder layer.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from specomp.settings import configurable
from specomp.slots import LayerBatches
from specomp.training.phases import Cosine

log = logging.getLogger(__name__)
BETAS = (0.9, 0.95)


@configurable
class BlockRefine:
    """Settings of the fit, and the fit."""

    steps: PositiveInt
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, lt=1)]
    learning_rate_final: Annotated[float, Field(ge=0, le=1)]
    active: ClassVar[bool] = True
    moves_stored: ClassVar[bool] = True

    def __call__(
        self, index: int, parameters: Sequence[nn.Parameter], batches: LayerBatches
    ) -> float:
        """Train in place, in float32. What does not improve the loss over all samples is put back:
        a fit never makes it worse.
        """
        dtype = parameters[0].dtype
        # A half-precision model's other parameters stay as they are: its products too.
        half = (
            torch.autocast(parameters[0].device.type, dtype)
            if dtype != torch.float32
            else nullcontext()
        )
        before = mean_loss(batches)
        # Adam moves every number by about its rate, whatever the loss: one that helps most decoder
        # layers makes a nearly right one worse. Best rates of SmolLM2's layers, at losses from 4e-4
        # to 0.1, lie around the same multiple of the error.
        base = self.learning_rate * math.sqrt(before)
        start = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=base, betas=BETAS)
        rate = Cosine(self.warmup, self.learning_rate_final)
        for step in range(self.steps):
            for group in optimizer.param_groups:
                # nothing is wasted on a rate of 0
                group["lr"] = base * rate((step + 0.5) / self.steps)
            with torch.enable_grad(), half:
                output_loss(
                    batches.output(step % len(batches)), batches.wanted(step % len(batches))
                ).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
        after = mean_loss(batches)
        if not after < before:  # nan included
            for parameter, value in zip(parameters, start, strict=True):
                parameter.data = value
            log.warning(
                "Decoder layer %d: refinement took the loss from %.4g to %.4g and was put back.",
                index,
                before,
                after,
            )
            after = before
        return after / before if before > 0 else 1.0


def output_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """(): mean over tokens of ||output_t - wanted_t||^2 / ||wanted_t||^2 for hidden states (...,
    hidden), in float32.
    """
    output, wanted = output.float(), wanted.float()
    return ((output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def mean_loss(batches: LayerBatches) -> float:
    """Mean over all samples."""
    wanted = [batches.wanted(i) for i in range(len(batches))]
    losses = [float(output_loss(batches.output(i), x)) for i, x in enumerate(wanted)]
    return sum(a * len(x) for a, x in zip(losses, wanted, strict=True)) / sum(map(len, wanted))
