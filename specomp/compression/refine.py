"""Refined decoder layers: what a refinement slot is given, and the cache around it.

A fitted decoder layer is cached by what determines it: an interrupted run goes on behind the last
one, and what is trained on top (or not) shares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specomp.cache import digest, waiting
from specomp.compression.run import Run
from specomp.compression.stream import HiddenStream
from specomp.models.family import Unit
from specomp.slots import Choice, describe

# Bumped whenever the same settings would fit a decoder layer otherwise.
VERSION = 1


@dataclass(frozen=True)
class Batches:
    """The calibration set as decoder layer `index` sees it, in the compressed model and in the
    dense one.
    """

    index: int
    own: HiddenStream
    dense: HiddenStream

    def __len__(self) -> int:
        return len(self.own.hidden)

    def output(self, index: int) -> Tensor:
        """(batch, length, hidden) of the compressed decoder layer, with a gradient where that is
        switched on.
        """
        return self.own.output(self.index, index)

    def wanted(self, index: int) -> Tensor:
        """(batch, length, hidden) of the dense one."""
        return self.dense.hidden[index].to(self.own.source.device(self.index))


def refinement_key(run: Run, choices: Mapping[Unit, Choice]) -> str:
    """What the decoder layers of a refined model depend on; what is trained afterwards is not part
    of it.
    """
    spec, method = run.calibration, run.method
    slots = (method.target, method.whitening, method.packing, method.refinement)
    more = {"compensation": describe(method.compensation)} if method.compensation.active else {}
    more |= {"units": describe(method.units)} if method.units.active else {}
    return digest(
        {
            "version": VERSION,
            "model": run.model_key,
            "calibration": [
                run.samples.hash,
                spec.batch_size,
                spec.precision,
                spec.accumulate,
                spec.upstream,
            ],
            "slots": [describe(x) for x in slots],
            "ranks": {unit.name: choice.size for unit, choice in choices.items()},
            "torch": torch.__version__,
        }
        | more
    )


def refined(run: Run, key: str, index: int, own: HiddenStream, dense: HiddenStream) -> float:
    """Refine decoder layer `index` in place, or take it from the cache. Returns what is left of its
    loss, as a share.
    """
    cache, entry = run.cache, f"layer{index}"
    modules = {
        x.name: run.model.get_submodule(x.name) for x in run.linears if x.decoder_layer == index
    }
    with waiting(cache.lock("refined", digest([key, index])), f"refines decoder layer {index}"):
        stored = cache.load("refined", key, entry)
        cache.count("refined", hit=stored is not None)
        if stored is None:
            parameters = [p for module in modules.values() for p in module.parameters()]
            gain = run.method.refinement(index, parameters, Batches(index, own, dense))
            numbers = {
                f"{name}.{part}": value
                for name, module in modules.items()
                for part, value in module.state_dict().items()
            }
            cache.save(
                "refined", key, entry, numbers | {"gain": torch.tensor(gain, dtype=torch.float64)}
            )
            return gain
    for name, module in modules.items():
        # Pivot rows too: numbers only fit the ones they were made for.
        module.load_state_dict({part: stored[f"{name}.{part}"] for part in module.state_dict()})
    return float(stored["gain"])
