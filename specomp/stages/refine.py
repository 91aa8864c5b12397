"""Fits one packed decoder layer to the outputs of the dense one, on hidden states that both streams carry (methods/block_refine.py).

A fitted decoder layer is cached by what determines it: an interrupted run goes on behind the last one, and what is trained on top
(or not) shares them.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from specomp.cache import digest, waiting
from specomp.methods.base import Method, describe
from specomp.methods.block_refine import BlockRefine, output_loss
from specomp.phases import Cosine
from specomp.stages.setup import Setup
from specomp.stages.stream import HiddenStream

log = logging.getLogger(__name__)
BETAS = (0.9, 0.95)
# Bumped whenever the same settings would fit a decoder layer otherwise.
VERSION = 1


@dataclass(frozen=True)
class Refined:
    """Loss of a decoder layer's outputs over the calibration set, before and after."""

    before: float
    after: float

    @property
    def gain(self) -> float:
        """After over before."""
        return self.after / self.before if self.before > 0 else 1.0


def refinement_key(setup: Setup, method: Method, ranks: Mapping[str, int]) -> str:
    """What the decoder layers of a refined model depend on; what is trained afterwards is not part of it."""
    spec = setup.calibration
    return digest(
        {
            "version": VERSION,
            "model": setup.model_key,
            "calibration": [setup.samples.hash, spec.batch_size, spec.precision, spec.accumulate, spec.upstream],
            "slots": [describe(x) for x in (method.target, method.whitening, method.packing, method.compensation)],
            "ranks": dict(ranks),
            "torch": torch.__version__,
        }
    )


def refined(setup: Setup, settings: BlockRefine, key: str, index: int, stream: HiddenStream, dense: HiddenStream) -> float:
    """Refine decoder layer `index` in place, or take it from the cache. Returns what is left of its loss, as a share."""
    cache, entry = setup.cache, f"layer{index}"
    modules = {x.name: setup.model.get_submodule(x.name) for x in setup.linears if x.decoder_layer == index}
    with waiting(cache.lock("refined", digest([key, index])), f"refines decoder layer {index}"):
        stored = cache.load("refined", key, entry)
        cache.count("refined", hit=stored is not None)
        if stored is None:
            gain = refine(setup, settings, index, stream, dense).gain
            numbers = {f"{name}.{part}": value for name, module in modules.items() for part, value in module.state_dict().items()}
            cache.save("refined", key, entry, numbers | {"gain": torch.tensor(gain, dtype=torch.float64)})
            return gain
    for name, module in modules.items():
        # Pivot rows too: numbers only fit the ones they were made for.
        module.load_state_dict({part: stored[f"{name}.{part}"] for part in module.state_dict()})
    return float(stored["gain"])


def refine(setup: Setup, settings: BlockRefine, index: int, stream: HiddenStream, dense: HiddenStream) -> Refined:
    """Train every linear of decoder layer `index` in place, in float32. stream: hidden states before it; dense: outputs of the dense one.

    What does not improve the loss over all samples is put back: a fit never makes it worse.
    """
    trained = [p for x in setup.linears if x.decoder_layer == index for p in setup.model.get_submodule(x.name).parameters()]
    dtype = trained[0].dtype
    # A half-precision model's other parameters stay as they are: its products too.
    half = torch.autocast(trained[0].device.type, dtype) if dtype != torch.float32 else nullcontext()
    before = _loss(index, stream, dense)
    # Adam moves every number by about its rate, whatever the loss: one that helps most decoder layers makes a nearly right one worse.
    # Best rates of SmolLM2's layers, at losses from 4e-4 to 0.1, lie around the same multiple of the error.
    base = settings.learning_rate * math.sqrt(before)
    start = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=base, betas=BETAS)
    rate = Cosine(settings.warmup, settings.learning_rate_final)
    for step in range(settings.steps):
        position = step % len(stream.hidden)
        for group in optimizer.param_groups:
            group["lr"] = base * rate((step + 0.5) / settings.steps)  # nothing is wasted on a rate of 0
        with torch.enable_grad(), half:
            output = stream.output(index, position)
            loss = output_loss(output, dense.hidden[position].to(output.device))
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    after = _loss(index, stream, dense)
    if not after < before:  # nan included
        for parameter, value in zip(trained, start, strict=True):
            parameter.data = value
        log.warning("Decoder layer %d: refinement took the loss from %.4g to %.4g and was put back.", index, before, after)
        after = before
    return Refined(before, after)


def _loss(index: int, stream: HiddenStream, dense: HiddenStream) -> float:
    """Mean over all samples."""
    losses = [float(output_loss(stream.output(index, i), wanted.to(stream.setup.device(index)))) for i, wanted in enumerate(dense.hidden)]
    counts = [len(x) for x in dense.hidden]
    return sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
