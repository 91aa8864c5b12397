"""What the terminal shows at the end of a run: dense beside compressed."""

import sys

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specomp.compression.ledger import Ledger
from specomp.compression.report import size_row, size_rows
from specomp.evaluation.metric import digits, is_detail
from specomp.evaluation.quality import kept_accuracy
from specomp.experiment.label import method_name, text_name
from specomp.experiment.record import Record

FILE_WIDTH = 110  # columns where the output is no terminal


def show(record: Record, *, console: Console | None = None) -> None:
    """Print the comparison table of one record, its folder and its notes."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    method = " ".join([method_name(record.choices, record.config), *record.changes])
    text = text_name(record.choices, record.config)
    title = f"{record.label('model')}, {method}, {asked_for(record.counted)}"
    title += f", calibrated on {text}" if text and method != "dense" else ""
    table = Table(title=Text(title), box=SIMPLE, title_justify="left")
    table.add_column("")
    for column in ("dense", "compressed", "compressed / dense"):
        table.add_column(column, justify="right")
    for row in rows(record):
        table.add_row(*row)
    console.print(table)
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in record.seconds.items())
    console.print(
        f"time: {spent}; peak memory {max(record.peak_memory_mib.values(), default=0):.0f} MiB"
    )
    if (kept := kept_accuracy(record.metrics, record.dense_metrics)) is not None:
        console.print(str(kept), markup=False)
    for note in record.notes:
        console.print(f"note: {note}", markup=False)
    if (same := in_domain(record)) is not None:
        console.print(f"note: {same}", markup=False)
    if record.model_folder:
        console.print(f"model folder: {record.model_folder}", soft_wrap=True, markup=False)
    console.print(f"record: {record.key[:12]}", markup=False)


def rows(record: Record) -> list[tuple[str, str, str, str]]:
    """(label, dense, compressed, quotient) for the sizes and every metric."""
    lines = size_rows(record.counted)
    for name, values in record.metrics.items():
        for metric, value in values.items():
            if not is_detail(metric):
                reference = record.dense_metrics.get(name, {}).get(metric)
                lines.append(
                    size_row(
                        f"{name} {label(metric, values)}",
                        reference,
                        value,
                        f"{{:,.{digits(metric)}f}}",
                    )
                )
    return lines


def in_domain(record: Record) -> str | None:
    """What to say of texts that are measured on and, in another part, calibrated on."""
    read = record.calibration.get("source") or {}
    parts = read.get("parts", {"": {"source": read}}).values()
    sources = [part["source"] for part in parts if part.get("source")]
    texts = {str(x["name"]) for x in sources}
    same = sorted(texts & {name.partition("@")[0] for name in record.metrics})
    if not same:
        return None
    other = "domains" if "wikitext2" in same else "wikitext2"
    asked = (record.config.get("benchmark") or {}).get("parts") or {}
    own = ((record.config.get("calibration") or {}).get("corpus") or {}).get("path")
    corpora = [(x or {}).get("corpus") or {} for x in asked.values()]
    measured = [(x.get("name"), x.get("split")) for x in corpora if x.get("path") == own]
    seen = [(x["name"], split) for x in sources for split in (x.get("split"), "all")]
    very = sorted({str(x) for x, split in measured if (x, split) in seen} & {*same})
    told = (
        f"{', '.join(very)} is the very text that this model was calibrated on: no measure of its"
        " quality"
        if very
        else f"{', '.join(same)} is of the kind of text that this model was calibrated on"
    )
    return f"{told}; how it does on another says the same command with benchmark={other}"


def label(metric: str, values: dict[str, float]) -> str:
    """A metric with what it was measured on."""
    if metric == "ppl":
        collapsed = ", collapsed" if values.get("collapsed") else ""
        return f"perplexity ({values.get('tokens', 0):,.0f} tokens{collapsed})"
    return metric


def asked_for(ledger: Ledger) -> str:
    """What was to be stored."""
    if ledger.target_kl:
        return f"KL {ledger.target_kl:g}: {ledger.measured_bits:.2f} bits a weight"
    if ledger.in_bits and not ledger.target_bits:
        return f"{ledger.measured_bits:.2f} bits a weight"
    return (
        f"{ledger.target_bits:g} bits a weight"
        if ledger.target_bits
        else f"compression {100 * (ledger.target_compression or 0):.6g}%"
    )
