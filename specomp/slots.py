"""A method is a row: one choice for each slot. What every slot is, and what it is handed.

Slots are frozen settings with a `__call__` or a few methods. Whatever the rest of the program wants
to know about one it asks the slot: what it reads, whether it changes anything, what it stores.
Shapes: W (m, n), r rank.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import SkipValidation
from torch import Tensor, nn

from specomp.cache import digest
from specomp.errors import UserError
from specomp.models.family import LinearSpec, ModelFamily, Unit
from specomp.models.modules import GridLinear
from specomp.numerics.factors import LowRankFactors, Norm, Spectrum
from specomp.numerics.grid import Grid, GridSpec
from specomp.numerics.statistics import Statistic, Stats
from specomp.settings import configurable

SizeOf = Literal["rank", "dimensions", "weights", "whole"]
"""What the sizes of a form count: components of a linear's spectrum; dimensions of a unit; weights
of a row that are not zero; or nothing, as every linear is stored in full.
"""

Upstream = Literal["dense", "compressed"]
"""What inputs passed through before they were looked at: dense or compressed decoder layers."""


@dataclass(frozen=True)
class Choice:
    """How a unit is stored: a form, at one of the sizes it comes in (a rank)."""

    form: "Form"
    size: int


@dataclass(frozen=True, eq=False)
class Chain:
    """Matrices that are applied one after the other to a linear's inputs, before they are
    rounded.
    """

    matrices: Sequence[Tensor]
    assemble: Callable[..., Tensor]  # makes the weight (m n) of them
    # any invertible map may be put between two of them: they are Vt and U
    free_basis: bool = False
    # what the first reads where that is not the linear's inputs: indices of those that it does, or
    # a matrix (k n) that makes them
    inputs: Tensor | None = None
    # (m n): where in the weight the numbers of the only matrix stand, row by row; all others are 0
    mask: Tensor | None = None
    # What turns the outputs of each of such matrices into the linear's: indices of those among
    # these, a matrix (m rows), or None where they are the linear's; without it nobody knows.
    lefts: Callable[[Sequence[Tensor]], Sequence[Tensor | None]] | None = None


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix as it will be stored, and the grid its numbers lie on (None: not rounded); damping:
    what a Hessian needed.
    """

    values: Tensor
    grid: Grid | None = None
    damping: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether its numbers are what they were."""
        return self.grid is None

    def stored(self, linear: nn.Linear) -> Any:
        """What holds it: an nn.Linear or a Substitute, of a linear with these values for its
        weight.
        """
        return linear if self.grid is None else GridLinear.of(linear, self.grid)


class Evidence(Protocol):
    """What a form is made of, and what predicts its loss."""

    def stats(self, linear: LinearSpec) -> Stats:
        """The statistics that the method's norm is made of."""

    def weight(self, linear: LinearSpec) -> Tensor:
        """T (m n), which the form approximates."""

    def spectrum(self, linear: LinearSpec) -> Spectrum:
        """The components of T in the method's norm."""

    def singular_values(self, linear: LinearSpec) -> Tensor:
        """(k) of all components, descending, without their vectors."""

    def factors(self, linear: LinearSpec, rank: int) -> LowRankFactors:
        """The best factors of this rank, compensated; or those that a training chose."""

    def rounded(self, linear: LinearSpec, chain: Chain) -> tuple[Rounded, ...]:
        """The matrices, as the method rounds them."""

    def norm(self, linear: LinearSpec) -> Norm:
        """In which errors of the weight count; where it predicts the model's loss, those of all
        linears compare.
        """

    def remembered(
        self,
        unit: Unit,
        made_by: Any,
        make: Callable[[], Mapping[str, Tensor]],
        reads: frozenset[Statistic] = frozenset(),
    ) -> Mapping[str, Tensor]:
        """What `make` makes of a unit's statistics and weights, free of any ratio: from the cache,
        or into it; made_by: the slot or form that asks, whose settings it depends on; reads: what
        it looks at beside the statistics of the norm.
        """

    def on(self, rounding: "Rounding") -> "Evidence":
        """The same, of a unit that this rounds, whatever the method does."""

    def lost(self, linear: LinearSpec, share: float) -> None:
        """For the report: the share of a linear's norm that is lost where its shape changes."""

    def bias(self, linear: LinearSpec) -> Tensor | None:
        """(m) of what is stored."""

    def dense(self, linear: LinearSpec) -> nn.Module:
        """The linear where it stays in full: itself, or what a training made of it."""

    def place(self, linear: LinearSpec) -> dict[str, Any]:
        """dtype and device of what is stored."""


class Form(Protocol):
    """How a unit is stored, at every size it comes in; its modules are nn.Linear or
    specomp.models.modules.Substitute.
    """

    @property
    def size_of(self) -> SizeOf:
        """What its sizes count."""

    def sizes(self, unit: Unit) -> Sequence[int]:
        """Those it comes in, for ranks 1, 2, ..."""

    def parts(self, unit: Unit, size: Any, grid: GridSpec | None = None) -> Mapping[str, Any]:
        """Every tensor that is stored (specomp.forms.prices.Part), by name; arithmetic alone, for
        tensors of sizes too.
        """

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """What the sizes (k) are predicted to lose, (k) in float64."""

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> Mapping[str, nn.Module]:
        """What takes the place of the unit's linears, by their full names."""

    def kept(self, unit: Unit) -> int:
        """Bytes of what it has `remembered` of the unit; 0 where it asks for nothing."""

    def facts(self, module: nn.Module) -> Mapping[str, float]:
        """What a report says of one of its modules, by name."""

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> Iterable[str]:
        """What a reader should know of all of them; facts: by linear; count: linears in all."""


class Units(Protocol):
    """Which units wider than a linear may be stored as one. active: whether there are any."""

    active: bool

    def forms(self, units: Sequence[Unit]) -> Mapping[Unit, Sequence[Form]]:
        """How units may be stored as one, each of several linears: of the given ones, which are
        the MLPs of a model, the queries and keys and the values and outputs of its attention, or
        made of them. Linears of others are stored by themselves.
        """

    def check(self, method: "Method") -> None:
        """Whether the other slots fit. Raises UserError."""

    def check_family(self, family: ModelFamily, config: Any) -> None:
        """Whether models of the family, of this config of transformers, have such units. Raises
        UserError.
        """

    def check_export(self, form: str, training: "Training") -> None:
        """Whether a model cut so, and trained, can be written in this form of export
        (specomp.models.identity.Form). Raises UserError.
        """


@configurable
class NoUnits:
    """Every linear is stored by itself."""

    active: ClassVar[bool] = False

    def forms(self, units: Sequence[Unit]) -> Mapping[Unit, Sequence[Form]]:
        """None."""
        return {}

    def check(self, method: "Method") -> None:
        """Fits everything."""

    def check_family(self, family: ModelFamily, config: Any) -> None:
        """Fits everything."""

    def check_export(self, form: str, training: "Training") -> None:
        """Either."""


class Target(Protocol):
    """What W' approximates."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it is made of."""

    def __call__(self, W: Tensor, stats: Stats) -> Tensor:
        """T (m, n). Raises ValueError where that is numerically impossible."""


class Whitening(Protocol):
    """In which norm."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics the norm is made of."""

    def __call__(self, stats: Stats) -> Norm:
        """The norm of one linear."""


class Reads(Protocol):
    """What an allocation may look at besides its options."""

    def stats(self, linear: LinearSpec) -> Stats:
        """What the dense model's calibration kept of a linear: at least what the allocation
        needs.
        """

    def probe(self, unit: Unit | None, choice: Choice | None) -> float:
        """Mean token loss on the calibration set when one unit alone is stored so; of the dense
        model without one.
        """


class Allocation(Protocol):
    """Which option for which unit. compresses: whether it ever chooses another than dense;
    needs_spectra: whether it looks at predicted losses, or at what a probe measures.
    """

    compresses: bool
    needs_spectra: bool

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it reads, of the dense model."""

    def __call__(self, menu: Any, share: float, reads: Reads) -> dict[Unit, Choice]:
        """menu: specomp.forms.options.Options by unit; share: what may be spent of what the dense
        units cost.
        """


class Compensation(Protocol):
    """Repair of the factors after truncation, without a gradient step. active: whether it changes
    anything.
    """

    active: bool
    upstream: Upstream

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it reads, of inputs that passed through `upstream` decoder layers."""

    @property
    def num_samples(self) -> int | None:
        """How many of the calibration samples it reads; None is all."""

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """Better factors of the same rank."""

    def loss(self, error: Tensor, stats: Stats) -> float:
        """Its own objective, of an error (m n): what its gain is measured in."""


class LayerBatches(Protocol):
    """The calibration set as one decoder layer sees it."""

    def __len__(self) -> int:
        """Batches."""

    def output(self, index: int) -> Tensor:
        """Hidden states (batch, length, hidden) of the compressed decoder layer, with a gradient
        where that is switched on.
        """

    def wanted(self, index: int) -> Tensor:
        """Those of the dense model."""


class Refinement(Protocol):
    """Fits a decoder layer as a whole after its units are stored.

    active: whether it changes anything; steps: of its optimizer, for a plan; moves_stored: whether
    numbers leave their grid.
    """

    active: bool
    steps: int
    moves_stored: bool

    def __call__(
        self, index: int, parameters: Sequence[nn.Parameter], batches: LayerBatches
    ) -> float:
        """Changes the parameters of decoder layer `index` in place; returns its loss after over
        before.
        """


class Trained(Protocol):
    """What a training that chooses hands to the loop that stores."""

    choices: dict[Unit, Choice]
    by: str  # who chose, for a note on the retention
    account: Mapping[str, Any]  # how it went, JSON-able
    # by linear: what compensation or refinement left of the loss, before
    gains: Mapping[str, float | None]
    left: frozenset[str]  # linears that it did not touch, by name

    def factors(self, linear: LinearSpec, rank: int) -> LowRankFactors:
        """Of the components it kept."""

    def bias(self, linear: LinearSpec, old: Tensor | None) -> Tensor | None:
        """(m), its own included."""


class Training(Protocol):
    """Gradient steps end to end.

    active: whether it takes any; chooses: whether it chooses components itself, from complete
    spectra; moves_stored: whether it changes numbers that are already stored; adds_bias: whether
    every linear has an output bias afterwards.
    """

    active: bool
    chooses: bool
    moves_stored: bool
    adds_bias: bool

    def samples_of(self, calibration: int) -> int:
        """How many samples it reads, where the calibration set has so many; 0: none."""

    def check(
        self, method: "Method", budget: Any, num_samples: int, processes: int, dtype: str
    ) -> None:
        """Whether the other slots, the budget, the samples it reads, the processes and the model's
        dtype fit. Raises UserError.
        """

    def before(self, run: Any) -> Any:
        """While the model is dense; what it returns is handed to the other two."""

    def forms(
        self, run: Any, prepared: Any, choices: dict[Unit, Choice], statistics: Any, spectra: Any
    ) -> Trained | None:
        """Instead of the allocation's choices, or None."""

    def after(self, run: Any, prepared: Any) -> Mapping[str, Any]:
        """On what is stored; returns how it went, JSON-able."""

    @property
    def work(self) -> Any:
        """What a plan counts: settings with a schedule (specomp.training.phases.Distillation), or
        None.
        """


class Rounding(Protocol):
    """Puts stored numbers on a grid, or on one of several that an allocation chooses."""

    @property
    def grid(self) -> GridSpec | None:
        """What it rounds to where a form says nothing else; None: the model's dtype."""

    @property
    def grids(self) -> Sequence[GridSpec]:
        """All that stored numbers may lie on; none where it leaves them in the model's dtype."""

    def single(self, packing: "Form") -> Sequence["Form"]:
        """What a linear may be stored in where a method stores it in `packing`."""

    def wide(self, forms: Sequence["Form"]) -> Sequence["Form"]:
        """What a unit of several linears may be stored in where a method gives it these."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics it reads, of the inputs that the method itself last looked at."""

    def __call__(self, chain: Chain, stats: Stats, dtype: torch.dtype) -> tuple[Rounded, ...]:
        """The matrices; stats: of what the first of them reads; dtype: the model's. Raises
        ValueError where that is numerically impossible.
        """

    def notes(self, damping: Sequence[float]) -> Iterable[str]:
        """What a reader should know; damping: what the Hessians of every rounded linear needed."""


@configurable
class Method:
    """A compression method: what to approximate, in which norm, how much where, how to repair,
    refine and train, how to store.
    """

    name: str  # a label: nothing depends on it
    # Checked by check_slots, which says what is lacking and evaluates nothing.
    target: SkipValidation[Target]
    whitening: SkipValidation[Whitening]
    allocation: SkipValidation[Allocation]
    compensation: SkipValidation[Compensation]
    refinement: SkipValidation[Refinement]
    training: SkipValidation[Training]
    packing: SkipValidation[Form]
    rounding: SkipValidation[Rounding]
    units: SkipValidation[Units] = NoUnits()  # type: ignore[assignment]

    @property
    def spends(self) -> bool:
        """Whether a budget changes anything."""
        return self.allocation.compresses or self.training.chooses

    @property
    def is_dense(self) -> bool:
        """Whether nothing is compressed: the reference row. A row that keeps every linear in full
        compresses where it puts them on a grid.
        """
        rounded = self.packing.size_of == "whole" and self.rounding.grid is not None
        return not (self.spends or rounded or self.training.active)

    @property
    def chooses_grids(self) -> bool:
        """Whether which linear gets which grid is for the allocation to choose."""
        return self.rounding.grid is None and bool(self.rounding.grids)

    @property
    def comparable(self) -> bool:
        """Whether predicted losses are of the model's: gradients of outputs say how much those of
        different linears matter.
        """
        return any(x.scope == "output" for x in self.whitening.needs)

    @property
    def repairs(self) -> bool:
        """Whether what truncation left is changed before anything is trained."""
        return self.compensation.active or self.refinement.active


SLOTS: dict[str, type] = {
    "target": Target,
    "whitening": Whitening,
    "allocation": Allocation,
    "compensation": Compensation,
    "refinement": Refinement,
    "training": Training,
    "packing": Form,
    "rounding": Rounding,
    "units": Units,
}


def check_slots(method: Method) -> None:
    """Whether every slot has what its protocol says, by name; no value is looked at. Raises
    UserError.
    """
    for name, protocol in SLOTS.items():
        check_protocol(getattr(method, name), protocol, f"method.{name}")


def check_protocol(made: Any, protocol: type, where: str) -> None:
    """Whether an object has what a protocol says, by name; no property is evaluated. Raises
    UserError.
    """
    wanted = {x for x in vars(protocol) if not x.startswith("_") or x == "__call__"} | set(
        inspect.get_annotations(protocol)
    )
    lacking = sorted(
        x
        for x in wanted
        if inspect.getattr_static(made, x, _fields) is _fields and x not in _fields(made)
    )
    if lacking:
        raise UserError(
            f"{where} is a {type(made).__name__}, which is no {protocol.__name__}: it lacks"
            f" {', '.join(lacking)}."
        )


def _fields(made: Any) -> set[str]:
    return {x.name for x in fields(made)} if is_dataclass(made) else set()


# Files whose formulas are pinned by tests; one beside them is somebody's own.
OURS = {
    "methods": (
        "adasvd anchored asvd block_refine functional fwsvd global_loss kronecker lora scales soco"
        " spectrum svd svd_llm"
    ),
    "forms": "cut dense factors gridded heads masked pivoted ranked scores whole",
    "quantization": "factors gptq grids nf4 none rtn scaled",
}


def describe(slot: Any) -> dict[str, Any]:
    """A slot's class and settings, JSON-able: what a cache key or a record says of it; of a class
    that is not specomp's also its source.
    """
    settings = {x.name: getattr(slot, x.name) for x in fields(slot)}
    return (
        {"class": type(slot).__name__}
        | _origin(type(slot))
        | {k: _plain(v) for k, v in settings.items()}
    )


def _origin(kind: type) -> dict[str, str]:
    """Module and source of somebody's own class: a name that specomp has too, or an edited formula,
    must not find what another one left.
    """
    package, *rest = kind.__module__.split(".")
    if package == "specomp" and (rest[0] not in OURS or rest[-1] in OURS[rest[0]].split()):
        return {}
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):  # typed into an interpreter
        source = ""
    return {"module": kind.__module__, "source": digest(source)[:16]}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return describe(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
