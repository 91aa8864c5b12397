"""Training of singular spectra as a slot: gates on components, and what is kept of them (the phases
of SoCo are in soco.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from specomp.compression.calibrate import PartStatistics, Statistics
from specomp.compression.loop import compress_layers
from specomp.compression.run import Run
from specomp.compression.spectra import Spectra, StoredSpectra
from specomp.errors import UserError
from specomp.forms.options import DENSE, ROUNDING
from specomp.forms.prices import Budget, Numbers, numbers, parts_of
from specomp.models.family import Unit
from specomp.models.modules import Substitute
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
        stored, target = run, run.budget.retention
        components, starts, gains = spectra, choices, {}
        if run.method.repairs or any(len(unit.linears) > 1 for unit in choices):
            for linear in track(run.linears, "decompose", len(run.linears)):
                spectra(linear)  # while the model is dense
            with run.progress.stage("compress"):  # what is trained is rounded afterwards
                bare = replace(run, method=replace(run.method, rounding=NoQuantizer()))
                gains = {
                    x.name: x.compensation_gain
                    for x in compress_layers(bare, choices, statistics, spectra)
                }
            # where units are cut linears are of other sizes: a run over what there is now
            left = frozenset(
                x.name
                for unit in choices
                for x in unit.linears
                if len(unit.linears) > 1 and isinstance(run.model.get_submodule(x.name), Substitute)
            )
            stored = replace(run, left=left)
            components = StoredSpectra(stored, PartStatistics(stored, statistics.statistics))
            starts = single(stored, choices)
            spent = sum(numbers(parts_of(run.model.get_submodule(x))) for x in left)
            budget = target * sum(x.params for x in run.linears) - spent
            # what was met exactly is not missed by rounding
            target = (1 + ROUNDING) * budget / sum(x.params for x in stored.linears)
            if cut := sum(len(unit.linears) > 1 for unit in choices):
                run.progress.note(
                    f"{cut} functional units were cut before the training, which moves their"
                    f" linears at their new sizes but for {len(left)} of attention"
                )
            target *= sum(x.params for x in run.linears) / sum(x.params for x in stored.linears)
        by = f"whole components, chosen with {describe(self)['pruning']}"
        found = train(
            stored,
            self,
            starts,
            components,
            prepared,
            target=min(1.0, target),
            gains=gains,
            by=by,
        )
        old = {unit.name: unit for unit in run.units}
        new = {old[x.name]: c for x, c in found.choices.items()}
        new |= {old[x]: Choice(DENSE, 1) for x in stored.left}
        return replace(found, choices=new, left=stored.left)

    def after(self, run: Run, prepared: TeacherStates) -> dict[str, Any]:
        """Nothing: it was said with the choice."""
        return {}


def single(stored: Run, choices: Mapping[Unit, Choice]) -> dict[Unit, Choice]:
    """Choices for the linears that there are by now: those of a unit that was stored as one are
    dense ones of their size.
    """
    units = {unit.name: unit for unit in stored.units}
    found = {}
    for unit, choice in choices.items():
        for x in unit.linears:
            if x.name in stored.left:
                continue
            new = units[x.name]
            dense = Choice(DENSE, DENSE.sizes(new)[0])
            found[new] = choice if len(unit.linears) == 1 else dense
    return {unit: found[unit] for unit in stored.units}
