"""Training of singular spectra as a slot: gates on components, and what is kept of them (the phases
of SoCo are in soco.py).
"""

from dataclasses import replace
from typing import Any, ClassVar

from specomp.compression.calibrate import Statistics
from specomp.compression.loop import compress_layers
from specomp.compression.run import Run
from specomp.compression.spectra import Spectra, StoredSpectra
from specomp.errors import UserError
from specomp.forms.prices import Budget, Numbers
from specomp.models.family import Unit
from specomp.progress import track
from specomp.quantization.none import NoQuantizer
from specomp.settings import configurable
from specomp.slots import Choice, Method, describe
from specomp.training.phases import Pruning as Pruning
from specomp.training.phases import SpectrumSettings
from specomp.training.spectrum import GatedChoice, train
from specomp.training.teacher import TeacherStates


@configurable
class SpectrumTraining(SpectrumSettings):
    """Chooses components by trained gates: of the dense model, or of what a method has stored and
    repaired.
    """

    chooses: ClassVar[bool] = True
    moves_stored: ClassVar[bool] = False

    @property
    def adds_bias(self) -> bool:
        """Whether d is trained."""
        return self.deviation

    def check(
        self, method: Method, budget: Budget, num_samples: int, processes: int, dtype: str
    ) -> None:
        """Whether it can start from what the other slots leave. Raises UserError."""
        if not isinstance(budget, Numbers):
            raise UserError(
                f"{type(self).__name__} spends parameters: give a ratio of them, such as"
                f" ratio=cr40, not {budget}."
            )
        if method.repairs and not method.allocation.compresses:
            slot = "compensation" if method.compensation.active else "refinement"
            raise UserError(
                "Every component is kept until the training drops some, so"
                f" {type(getattr(method, slot)).__name__} has nothing to repair: use"
                f" method/{slot}=none, or an allocation that truncates, such as"
                " method/allocation=global_loss."
            )
        super().check(method, budget, num_samples, processes, dtype)

    def forms(
        self,
        run: Run,
        prepared: TeacherStates,
        choices: dict[Unit, Choice],
        statistics: Statistics,
        spectra: Spectra,
    ) -> GatedChoice:
        """What the trained gates keep."""
        assert isinstance(run.budget, Numbers), "checked"
        components, gains = spectra, {}
        if run.method.repairs:
            for linear in track(run.linears, "decompose", len(run.linears)):
                spectra(linear)  # while the model is dense
            with run.progress.stage("compress"):  # what is trained is rounded afterwards
                bare = replace(run, method=replace(run.method, rounding=NoQuantizer()))
                gains = {
                    x.name: x.compensation_gain
                    for x in compress_layers(bare, choices, statistics, spectra)
                }
            components = StoredSpectra(run, statistics)
        by = f"whole components, chosen with {describe(self)['pruning']}"
        return train(
            run,
            self,
            choices,
            components,
            prepared,
            target=run.budget.retention,
            gains=gains,
            by=by,
        )

    def after(self, run: Run, prepared: TeacherStates) -> dict[str, Any]:
        """Nothing: it was said with the choice."""
        return {}
