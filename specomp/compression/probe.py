"""What an allocation may look at besides its options: statistics, and the calibration loss with one
unit alone stored otherwise.
"""

import torch

from specomp.compression.calibrate import Statistics
from specomp.compression.evidence import DenseEvidence
from specomp.compression.run import Run
from specomp.errors import UserError
from specomp.models.family import LinearSpec, Unit
from specomp.models.modules import replace_linear
from specomp.numerics.statistics import Stats
from specomp.slots import Choice


class Probe:
    """Of the dense model."""

    def __init__(self, run: Run, statistics: Statistics, evidence: DenseEvidence) -> None:
        self.run, self.statistics, self.evidence = run, statistics, evidence

    def stats(self, linear: LinearSpec) -> Stats:
        """What calibration kept of it."""
        return self.statistics(linear)

    def probe(self, unit: Unit | None, choice: Choice | None) -> float:
        """Mean token loss on the calibration set with only that unit stored so; the dense model's
        without one.
        """
        model = self.run.model
        if self.run.store is not None:
            raise UserError(
                "This allocation tries cuts on the whole model: set model.stream=false, or choose"
                " another method/allocation."
            )
        if unit is None or choice is None:
            return self._loss()
        dense = {x.name: model.get_submodule(x.name) for x in unit.linears}
        for name, module in choice.form.fit(unit, choice.size, self.evidence).items():
            replace_linear(model, name, module)
        try:
            return self._loss()
        finally:
            for name, module in dense.items():
                replace_linear(model, name, module)

    @torch.no_grad()
    def _loss(self) -> float:
        total, count = 0.0, 0
        for batch in self.run.samples.batches():
            for sequence in batch.to(self.run.model.device).split(1):
                total += float(
                    self.run.model(input_ids=sequence, labels=sequence, use_cache=False).loss
                )
                count += 1
        return total / count
