"""Functional units: parts of a decoder layer that are stored as one (MoDeGPT, arXiv:2408.09632; A3,
arXiv:2505.12942).

FunctionalUnits   an MLP may be cut to fewer inner dimensions (forms/cut.py), values and outputs of
                  attention to fewer directions a head (forms/heads.py), queries and keys to
                  fewer dimensions of it (forms/scores.py)                       MoDeGPT Sec. 3
Whether they are, an allocation decides by predicted loss and price, beside their linears by
themselves (forms/menu.py::Wide).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import SkipValidation

from specomp.errors import UserError
from specomp.forms.cut import gram_of
from specomp.forms.menu import Alike
from specomp.models.family import ModelFamily, Unit
from specomp.numerics.statistics import Stats, example
from specomp.settings import configurable
from specomp.slots import Form, Method, Training


@configurable
class FunctionalUnits:
    """Which kinds of unit, each with the form it may have; null: none of that kind."""

    mlp: SkipValidation[Form] | None
    value_output: SkipValidation[Form] | None
    query_key: SkipValidation[Form] | None
    # All MLPs of a model at one size, or none cut: then export=dense is a plain smaller model.
    equal: bool
    active: ClassVar[bool] = True

    def forms(self, units: Sequence[Unit]) -> Mapping[Unit, Sequence[Form]]:
        """Each for itself, or all MLPs as one unit. Raises UserError for one that has no size."""
        of_kind = {"mlp": self.mlp, "value_output": self.value_output, "query_key": self.query_key}
        found: dict[Unit, Sequence[Form]] = {
            x: (form,) for x in units if (form := of_kind.get(x.kind)) is not None
        }
        for x, (form,) in found.items():
            if not len(form.sizes(x)):
                lower = "lower its round_to, or " if x.kind == "mlp" else ""
                raise UserError(
                    f"{x.name} has no size that method.units.{x.kind} allows: {lower}set it to"
                    " null."
                )
        mlps = [x for x in found if x.kind == "mlp"]
        if not self.equal or self.mlp is None or not mlps:
            return found
        if len({x.linears[-1].n for x in mlps}) > 1:
            raise UserError(
                "The MLPs of this model have several sizes already, so they are not cut alike: use"
                " method.units.equal=false."
            )
        every = Unit("mlps", "mlp", tuple(x for unit in mlps for x in unit.linears))
        others = {x: form for x, form in found.items() if x.kind != "mlp"}
        return others | {every: (Alike(self.mlp, mlps),)}

    def check(self, method: Method) -> None:
        """The norm needs a Gram matrix, and a training has to start from what is cut."""
        kinds = self.mlp, self.value_output, self.query_key
        if not method.spends or kinds == (None, None, None):
            return
        if method.training.chooses and not method.allocation.compresses:
            raise UserError(
                f"{type(method.training).__name__} chooses among all components of every linear, so"
                " no MLP would be cut: use method/units=none, or an allocation that truncates, such"
                " as method/allocation=global_loss."
            )
        if method.training.chooses and method.rounding.grids:
            raise UserError(
                f"{type(method.training).__name__} leaves the linears of a cut MLP in full"
                " precision: use method/units=none, or quantizer=none."
            )
        size = 4
        stats = {x: example(x, size, size) for x in method.whitening.needs}
        gram_of(method.whitening(Stats(stats)), "method/units")

    def check_family(self, family: ModelFamily, config: Any) -> None:
        """It has to say what its MLPs and its attention are made of, and no norm stands between
        queries and scores.
        """
        if self.mlp is not None and family.mlp is None:
            raise UserError(
                f"Family '{family.name}' does not say what its MLPs are made of: add mlp=Mlp(...)"
                " to its row in specomp/models/families.py, or use method/units=none."
            )
        for name, form in (("value_output", self.value_output), ("query_key", self.query_key)):
            if form is not None and family.attention is None:
                raise UserError(
                    f"Family '{family.name}' does not say which linears its attention is made of:"
                    " add attention=Attention(...) to its row in specomp/models/families.py, or set"
                    f" method.units.{name}=null."
                )
        if self.query_key is not None and family.norms_queries(config):
            raise UserError(
                f"Models of type '{config.model_type}' put a norm between queries and scores, which"
                " counts every dimension: set method.units.query_key=null."
            )

    def check_export(self, form: str, training: Training) -> None:
        """A plain architecture has one size for all MLPs, and biases everywhere or nowhere."""
        if form == "factors":
            return
        if self.mlp is not None and not self.equal:
            raise UserError(
                f"export={form} writes a plain architecture, which has one size for all MLPs: set"
                " method.units.equal=true, or use method/units=none or export=factors."
            )
        kinds = {"value_output": self.value_output, "query_key": self.query_key}
        if training.adds_bias and (held := [x for x, form in kinds.items() if form is not None]):
            raise UserError(
                f"export={form} writes a plain architecture, which has output biases everywhere or"
                f" nowhere, and {type(training).__name__} gives attention that is cut none: set"
                f" {' '.join(f'method.units.{x}=null' for x in held)}, or use export=factors."
            )
