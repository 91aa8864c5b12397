"""The route of a method: what is read where, which hidden states travel, which spectra are needed,
in which order. Decided here alone.

The core executes it, specomp.pricing prices it, checks ask it.
"""

from dataclasses import dataclass
from typing import Literal

from specomp.errors import UserError
from specomp.numerics.statistics import GRADIENT_SCOPES, Statistic
from specomp.slots import Method, Upstream

NOTHING: frozenset[Statistic] = frozenset()
Stage = Literal["calibrate", "allocate", "train", "compress"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one slot reads: which statistics, of inputs that passed through what, on how many
    samples (None: all).
    """

    statistics: frozenset[Statistic] = NOTHING
    upstream: Upstream = "dense"
    num_samples: int | None = None

    @property
    def streamed(self) -> frozenset[Statistic]:
        """What of it is taken on the way, of a decoder layer whose inputs come from compressed
        ones.
        """
        return self.statistics if self.upstream == "compressed" else NOTHING


@dataclass(frozen=True, kw_only=True)
class Route:
    """One method on one calibration set."""

    # one pass over the dense model before anything is changed, those of gradients one of their own
    dense: frozenset[Statistic]
    whitening: Reading  # of the norm and its target; gradients are always the dense model's
    compensation: Reading
    # whose inputs the rounding sees; its statistics are in that reading
    rounds: Literal["whitening", "compensation"]
    refines: bool
    compares: bool  # the dense model's hidden states travel beside those of the compressed one
    stream_samples: int  # whose hidden states travel; 0: none do
    complete: bool  # a training chooses among all components
    stages: tuple[Stage, ...]

    @property
    def streams(self) -> int:
        """Models whose hidden states travel."""
        return 0 if not self.stream_samples else 2 if self.compares else 1

    @property
    def caches_spectra(self) -> bool:
        """Whether the norm is known before anything is compressed, so that its spectra serve every
        ratio.
        """
        return not self.whitening.streamed

    @property
    def gradients(self) -> frozenset[Statistic]:
        """Statistics that take a backward pass."""
        return frozenset(x for x in self.dense if x.scope in GRADIENT_SCOPES)

    @staticmethod
    def of(method: Method, upstream: Upstream, num_samples: int) -> "Route":
        """Raises UserError where a slot asks for what cannot be."""
        if method.is_dense:
            reading = Reading()
            shared = {
                "dense": NOTHING,
                "whitening": reading,
                "compensation": reading,
                "rounds": "whitening",
                "complete": False,
            }
            return Route(**shared, refines=False, compares=False, stream_samples=0, stages=())  # type: ignore[arg-type]
        repair = method.compensation
        refinement = method.refinement
        training = method.training
        rounding = method.rounding
        seen = method.target.needs | method.whitening.needs
        gradients = frozenset(x for x in seen if x.scope in GRADIENT_SCOPES)
        _check(upstream, seen, gradients, method)
        # What GPTQ's scripts look at: inputs from compressed decoder layers where the method has
        # such. A training that chooses rounds after it, where there is no stream.
        slopes = frozenset(x for x in rounding.needs if x.scope in GRADIENT_SCOPES)
        rounded = NOTHING if training.chooses else rounding.needs - slopes
        repaired = repair.upstream == "compressed" and bool(repair.needs)
        by_repair = upstream == "dense" and repaired and not training.chooses
        normed = seen - gradients if upstream == "compressed" else NOTHING
        if upstream == "compressed" and not by_repair:
            normed |= rounded
        whitening = Reading(statistics=normed or seen, upstream="compressed" if normed else "dense")
        compensation = Reading(
            statistics=repair.needs | (rounded if by_repair else NOTHING),
            upstream="compressed" if repaired else "dense",
            num_samples=repair.num_samples,
        )
        dense = (
            method.allocation.needs
            | (gradients if normed else seen)
            | (NOTHING if repaired else repair.needs)
        )
        dense |= slopes
        if training.chooses or (upstream == "dense" and not by_repair):
            dense |= rounding.needs
        # of the dense model, whatever is seen later: trials of several grids, predicted losses
        if method.chooses_grids:
            dense |= rounding.needs | method.whitening.needs
        if method.allocation.needs_spectra or method.units.active:
            dense |= method.whitening.needs
        carried = whitening.streamed | compensation.streamed
        stream_samples = 0
        if carried or refinement.active:
            limit = None if whitening.streamed or refinement.active else compensation.num_samples
            stream_samples = num_samples if limit is None else min(limit, num_samples)
        return Route(
            dense=dense,
            whitening=whitening,
            compensation=compensation,
            rounds="compensation" if by_repair else "whitening",
            refines=refinement.active,
            compares=refinement.active or any(x.scope == "pair" for x in whitening.streamed),
            stream_samples=stream_samples,
            complete=training.chooses,
            stages=_stages(method),
        )


def _stages(method: Method) -> tuple[Stage, ...]:
    training = method.training
    if not training.active:
        return ("calibrate", "allocate", "compress")
    if not training.chooses:  # the teacher's states first, while the model is dense
        return ("calibrate", "allocate", "train", "compress", "train")
    return (
        "calibrate",
        "allocate",
        "train",
        *(("compress", "train") if method.repairs else ()),
        "compress",
    )  # type: ignore[return-value]


def _check(
    upstream: Upstream, seen: frozenset[Statistic], gradients: frozenset[Statistic], method: Method
) -> None:
    repair = method.compensation
    if method.training.chooses and upstream == "compressed":
        raise UserError(
            "A training of the spectrum starts from components of the dense model, before anything"
            " is compressed: use calibration.upstream=dense."
        )
    if upstream == "dense" and any(x.scope == "pair" for x in seen):
        raise UserError(
            "The target compares inputs of the dense and of the compressed model: set"
            " calibration.upstream=compressed."
        )
    if upstream == "compressed" and gradients and gradients == seen:
        raise UserError(
            "The whitening reads gradients of the dense model's loss alone: set"
            " calibration.upstream=dense."
        )
    if repair.upstream == "dense" and repair.needs and repair.num_samples is not None:
        raise UserError(
            "A compensation on dense inputs reads every sample, this one"
            f" num_samples={repair.num_samples} of them: set"
            " method.compensation.upstream=compressed, or num_samples=null (for AdaComp"
            " stack_of_batch=gram, which reads all)."
        )
