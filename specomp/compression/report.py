"""What a compression answers: what became of every linear, what the whole costs, how long it took,
what a reader should know.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specomp.compression.ledger import Ledger
from specomp.compression.run import Run
from specomp.models.family import Unit
from specomp.numerics.factors import Norm, Spectrum
from specomp.numerics.linalg import relative
from specomp.slots import Choice, Trained, describe

# Points of a spectrum that a report keeps.
SPECTRUM_POINTS = 13
# What a note calls linears by what the sizes of their form count.
WORDS = {
    "whole": "are in full",
    "rank": "of low rank",
    "dimensions": "of units that are cut",
    "weights": "masked",
}


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """What happened to one linear. Errors are relative Frobenius norms; loss is ||D (W' - T) S||_F
    in the method's own norm.
    """

    name: str
    m: int
    n: int
    rank: int
    stored: int  # parameters
    dense: bool
    # null where a linear's shape is another and none is measured on it alone
    weight_error: float | None = 0.0
    norm_error: float | None = 0.0
    # Achieved loss over the Eckart-Young bound at this rank: 1 certifies the solver; above 1 is
    # what compensation and dtype moved.
    loss_over_bound: float = 1.0
    # Loss on the compensation's own inputs after over before it; null without compensation. Of a
    # refinement it is the loss of the decoder layer's outputs, and the errors above are those
    # before it.
    compensation_gain: float | None = None
    damping: float = 0.0
    # Of the rounded weight to the unrounded one, in the method's norm; null without quantization.
    # Damping: the most of all Hessians.
    quantization_error: float | None = None
    quantization_damping: float = 0.0
    # Singular values in the method's norm over the largest, from the first to the last at equal
    # distances; empty for a dense linear.
    spectrum: str = ""
    seconds: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)  # what the form says of its module

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, flat."""
        return {name: value for name, value in asdict(self).items() if name != "facts"} | dict(
            self.facts
        )


@dataclass(kw_only=True)
class Report:
    """The library's answer. Prints as a table."""

    linears: list[LinearReport]
    ledger: Ledger
    training: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    notes: list[str] = field(default_factory=list)
    # row, budget and calibration set, for a folder's specomp.json and card
    made: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "ledger": self.ledger.as_dict(),
            "linears": [x.as_dict() for x in self.linears],
            "training": self.training,
            "seconds": self.seconds,
            "notes": self.notes,
        }

    def to_frame(self) -> Any:
        """A pandas.DataFrame with a row per linear."""
        import pandas

        return pandas.DataFrame([x.as_dict() for x in self.linears])

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=110, force_jupyter=False)
        table = Table(box=SIMPLE)
        table.add_column("")
        for column in ("dense", "compressed", "compressed / dense"):
            table.add_column(column, justify="right")
        for row in size_rows(self.ledger):
            table.add_row(*row)
        console.print(table)
        console.print(
            "time: "
            + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        )
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        return text.getvalue()

    __repr__ = __str__


def size_rows(found: Ledger) -> list[tuple[str, str, str, str]]:
    """(what, dense, compressed, quotient) of what a ledger counts."""
    dense, small = found.dense, found.compressed
    rows = [
        size_row(
            f"parameters of the {found.num_linears} compressible linears",
            dense.linear_params,
            small.linear_params,
        )
    ]
    rows.append(size_row("parameters of the whole model", dense.model_params, small.model_params))
    if small.held_bytes != small.model_bytes:
        rows.append(size_row("bytes stored, integers packed", dense.model_bytes, small.model_bytes))
    rows.append(size_row("bytes in memory", dense.model_bytes, small.held_bytes))
    rows.append(
        size_row(
            "multiply-adds per token (linears and head)", dense.macs_per_token, small.macs_per_token
        )
    )
    target, measured = found.target_retention, found.measured_retention
    if found.measured_kl is not None:
        asked, kl = found.target_kl or 0.0, found.measured_kl
        name = "KL to the dense model, held-out tokens (at most)"
        rows.append((name, f"({asked:.4g})", f"{kl:.4g}", f"{kl / asked - 1:+.1%}"))
    bits = f"{found.measured_bits:.4f}"
    if found.measured_kl is not None:  # nobody asked for these
        dense_bits = dense.linear_bits / dense.linear_params
        share = f"{found.measured_bits / dense_bits:.3f}"
        rows.append(("stored bits a weight of the linears", f"{dense_bits:g}", bits, share))
    elif found.target_bits is not None:
        rows.append(
            (
                "stored bits a weight of the linears (target)",
                f"({found.target_bits:.4f})",
                bits,
                f"{found.deviation:+.2%}",
            )
        )
    else:
        rows.append(
            (
                "retention of the linears (target)",
                f"({target:.4f})",
                f"{measured:.4f}",
                f"{found.deviation:+.2%}",
            )
        )
    return rows


def size_row(
    name: str, dense: float | None, compressed: float, form: str = "{:,.0f}"
) -> tuple[str, str, str, str]:
    """One line of such a table."""
    known = dense is not None and dense == dense and abs(dense) not in (0.0, float("inf"))
    quotient = f"{compressed / dense:.3f}" if known and dense else "--"
    return name, "--" if dense is None else form.format(dense), form.format(compressed), quotient


def explained(
    run: Run, report: Report, chosen: Mapping[Unit, Choice], trained: Trained | None
) -> Report:
    """The report with the means of its linears in the ledger and with notes on how they came out,
    which are logged.
    """
    low = [x for x in report.linears if not x.dense]
    errors = [x.norm_error for x in low if x.norm_error is not None]
    gains = [x.compensation_gain for x in low if x.compensation_gain is not None]
    balance = replace(
        report.ledger,
        num_linears=len(report.linears),
        num_dense=len(report.linears) - len(low),
        packing=type(run.method.packing).__name__.lower(),
        norm_error=fmean(errors) if errors else None,
        compensation_gain=fmean(gains) if gains else None,
    )
    sizes = {"rank": "whole ranks", "weights": "the sizes that masks come in"}
    steps = sizes.get(run.method.packing.size_of, "the sizes that there are")
    if run.method.chooses_grids:
        steps = "steps between grids and ranks"
    by = (
        trained.by
        if trained is not None
        else f"{steps}, as {typed(run.method.allocation)} gives them"
    )
    for note in [
        *linear_notes(run, report.linears, chosen, trained),
        *rounding_notes(run, low, len(report.linears)),
    ]:
        run.progress.note(note)
    if abs(balance.deviation) > 1e-3:
        run.progress.note(f"{balance.spent} ({balance.deviation:+.2%}): {by}")
    return replace(report, ledger=balance)


def typed(slot: Any) -> str:
    """A choice of a slot as one would write it."""
    said = describe(slot)
    settings = ", ".join(f"{key}={value}" for key, value in said.items() if key != "class")
    return f"{said['class']}({settings})"


def linear_notes(
    run: Run,
    linears: Sequence[LinearReport],
    chosen: Mapping[Unit, Choice],
    trained: Trained | None,
) -> list[str]:
    """Damping, what refinement and training make of errors, what forms say, a solver that was not
    exact.
    """
    method, notes = run.method, []
    damped = [x for x in linears if x.damping > 0]
    if damped:
        notes.append(
            f"{len(damped)} of {len(linears)} linears have a damped Gram matrix, "
            f"at most {max(x.damping for x in damped):.1e} of their mean diagonal"
        )
    if method.refinement.active and trained is None:
        notes.append(
            "errors of single linears are those before the block refinement; compensation_gain is"
            " of a decoder layer's outputs"
        )
    if method.training.active and trained is None:
        notes.append(
            "errors of single linears, and growth of pivots, are those before the recovery"
        )
    if method.chooses_grids:
        kinds = Counter({method.packing.size_of: 0})  # that nothing took the row's own form is news
        for unit, choice in chosen.items():
            kinds[choice.form.size_of] += len(unit.linears)
        said = ", ".join(f"{count} {WORDS[kind]}" for kind, count in sorted(kinds.items()))
        notes.append(f"of {len(linears)} linears {said}")
    for form in dict.fromkeys(x.form for x in chosen.values()):
        own = {
            x.name for unit, choice in chosen.items() if choice.form == form for x in unit.linears
        }
        notes += form.notes({x.name: x.facts for x in linears if x.name in own}, len(linears))
    worst = max(linears, key=lambda x: x.loss_over_bound)
    exact = trained is None and not method.compensation.needs and not method.rounding.grids
    if exact and run.model.dtype == torch.float32 and worst.loss_over_bound > 1.01:
        notes.append(
            f"{worst.name} loses {worst.loss_over_bound:.3f} times its Eckart-Young bound: try"
            " method.whitening.solve=float64"
        )
    return notes


def rounding_notes(run: Run, low: Sequence[LinearReport], count: int) -> list[str]:
    """Which weights are integers, and where Hessians were damped by more than was asked."""
    rounded = [x for x in low if x.quantization_error is not None]
    rounding = run.method.rounding
    held_in = str(run.model.dtype)
    if not rounded or not (run.method.chooses_grids or rounding.grid is not None):
        return []
    components = run.method.packing.size_of == "rank"
    what = "the factors" if components else "the weights"
    if rounding.grid is None:
        shares = Counter(int(x.facts["bits"]) for x in rounded)
        said = ", ".join(f"{count} of {bits}" for bits, count in sorted(shares.items()))
        what = f"{len(rounded)} linears are on grids ({said} bits)"
    else:
        what += f" of {len(rounded)} linears have {rounding.grid.bits} bits"
    simulated = any(x.simulated for x in rounding.grids)
    notes = [
        f"{what}: metrics are of the rounded numbers held in"
        f" {held_in.removeprefix('torch.')} (simulated), model_bytes is what a folder of factors"
        " stores"
        if simulated
        else f"{what}, held as they are stored"
    ]
    if len(rounded) < count:
        kept = "are not rounded" if rounding.grid is None else "stay dense and are not quantized"
        notes.append(f"{count - len(rounded)} linears {kept}")
    return notes + list(rounding.notes([x.quantization_damping for x in rounded]))


def errors_of(
    packed: Tensor, target: Tensor, norm: Norm, spectrum: Spectrum | None, rank: int
) -> dict[str, Any]:
    """Relative errors of what is actually stored, in its dtype; of what is made of components also
    the certificate against the Eckart-Young bound, and their spectrum and its damping.
    """
    error = packed - target
    loss = norm.loss(error)
    if spectrum is None:
        return {
            "weight_error": relative(float(error.norm()), float(target.norm())),
            "norm_error": relative(loss, norm.loss(target)),
        }
    whole = float(spectrum.s.double().square().sum().sqrt())
    bound = spectrum.tail(rank)
    return {
        "weight_error": relative(float(error.norm()), float(target.norm())),
        "norm_error": relative(loss, whole),
        # A bound that is rounding noise itself certifies nothing.
        "loss_over_bound": loss / bound if bound > 1e-6 * whole else 1.0,
        "spectrum": sampled(spectrum.s),
        "damping": spectrum.damping,
    }


def sampled(s: Tensor) -> str:
    """SPECTRUM_POINTS of singular values (k,), descending, over the largest."""
    index = torch.linspace(0, len(s) - 1, SPECTRUM_POINTS).round().long()
    return " ".join(f"{relative(float(x), float(s[0])):.3g}" for x in s[index.to(s.device)])
