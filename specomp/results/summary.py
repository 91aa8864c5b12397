"""What the terminal shows at the end of a run: dense beside compressed."""

import math
import sys
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from specomp.results.record import Record

FILE_WIDTH = 110  # columns where the output is no terminal


def show(record: Record, *, console: Console | None = None) -> None:
    """Print the comparison table of one record, its folder and its notes."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    choice = record.choices
    ledger = record.ledger
    title = f"{choice['model']}, {choice['method']}, compression {ledger['target_compression']:.0%}"
    if choice.get("quantizer", "none") != "none":
        title += f", {choice['quantizer']}"
    if (packing := ledger.get("packing", "factors")) != "factors":
        title += f", {packing} packing"
    table = Table(title=title, box=SIMPLE, title_justify="left")
    table.add_column("")
    for column in ("dense", "compressed", "compressed / dense"):
        table.add_column(column, justify="right")
    for row in rows(record):
        table.add_row(*row)
    console.print(table)
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in record.seconds.items())
    console.print(f"time: {spent}; peak memory {max(record.peak_memory_mib.values(), default=0):.0f} MiB")
    for note in record.notes:
        console.print(f"note: {note}", markup=False)
    if record.model_folder:
        console.print(f"model folder: {record.model_folder}", soft_wrap=True, markup=False)
    console.print(f"record: {record.key[:12]}", markup=False)


def rows(record: Record) -> list[tuple[str, str, str, str]]:
    """(label, dense, compressed, quotient) for the sizes and every metric."""
    ledger, lines = record.ledger, []
    dense, compressed = ledger["dense"], ledger["compressed"]
    lines.append(
        _row(
            f"parameters of the {ledger['num_linears']} compressible linears",
            dense["linear_params"],
            compressed["linear_params"],
            "{:,.0f}",
        )
    )
    lines.append(_row("parameters of the whole model", dense["model_params"], compressed["model_params"], "{:,.0f}"))
    held = compressed.get("held_bytes", compressed["model_bytes"])
    if held != compressed["model_bytes"]:
        lines.append(_row("bytes stored, integers packed", dense["model_bytes"], compressed["model_bytes"], "{:,.0f}"))
    lines.append(_row("bytes in memory", dense["model_bytes"], held, "{:,.0f}"))
    lines.append(_row("multiply-adds per token (linears and head)", dense["macs_per_token"], compressed["macs_per_token"], "{:,.0f}"))
    target, measured = ledger["target_retention"], ledger["measured_retention"]
    lines.append(("retention of the linears (target)", f"({target:.4f})", f"{measured:.4f}", f"{measured / target - 1:+.2%}"))
    for name, values in record.metrics.items():
        for metric, value in values.items():
            if shown(metric):
                reference = record.dense_metrics.get(name, {}).get(metric)
                lines.append(_row(f"{name} {label(metric, values)}", reference, value, "{:,.4f}" if "acc" in metric else "{:,.2f}"))
    return lines


def shown(metric: str) -> bool:
    """Metrics worth a line on the terminal; the record holds all."""
    return metric in {"ppl", "acc", "acc_norm", "nonfinite_windows"} or "tokens_per_s" in metric


def label(metric: str, values: dict[str, float]) -> str:
    """A metric with what it was measured on."""
    if metric == "ppl":
        collapsed = ", collapsed" if values.get("collapsed") else ""
        return f"perplexity ({values.get('tokens', 0):,.0f} tokens{collapsed})"
    return metric


def _row(name: str, dense: Any, compressed: Any, form: str) -> tuple[str, str, str, str]:
    known = isinstance(dense, (int, float)) and math.isfinite(dense) and dense != 0
    return name, "--" if dense is None else form.format(dense), form.format(compressed), f"{compressed / dense:.3f}" if known else "--"
