"""How much the calibration loss suffers when one linear alone is cut: what ASVD's search asks."""

import torch

from specomp.errors import UserError
from specomp.factors import truncate
from specomp.methods.base import Packing, Probe
from specomp.modules import replace_linear
from specomp.stages.calibrate import linear_module
from specomp.stages.decompose import DenseSpectra
from specomp.stages.setup import Setup


def make_probe(setup: Setup, spectra: DenseSpectra, packing: Packing) -> Probe:
    """A function (linear name, rank) -> mean token loss on the calibration set with only that linear cut."""
    by_name = {linear.name: linear for linear in setup.linears}

    if setup.store is not None:
        return _refuse

    @torch.no_grad()
    def loss() -> float:
        total, count = 0.0, 0
        for batch in setup.samples.predict_dataloader():
            for sequence in batch.to(setup.model.device).split(1):
                total += float(setup.model(input_ids=sequence, labels=sequence, use_cache=False).loss)
                count += 1
        return total / count

    def probe(name: str, rank: int) -> float:
        if not name:
            return loss()
        dense = linear_module(setup.model, by_name[name])
        replace_linear(setup.model, name, packing(dense, truncate(spectra(name), rank)))
        try:
            return loss()
        finally:
            replace_linear(setup.model, name, dense)

    return probe


def _refuse(name: str, rank: int) -> float:
    raise UserError("This allocation tries cuts on the whole model: set model.stream=false, or choose another method/allocation.")
