"""What plan=true prints: sizes, stages, and what they stand on. Figures with ~ are estimates; all others are counted or measured."""

import sys
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from specomp.planning.plan import Estimate, Plan
from specomp.planning.sizes import ModelShape
from specomp.ratio import is_low_rank
from specomp.results.summary import FILE_WIDTH

# Above it, a plan says that the processor is shared; below it, a time says nothing (a stage that only looked into a record or the cache).
BUSY, LEAST_SECONDS = 1.2, 0.1


def show(plan: Plan, *, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    seen = plan.outlook
    request = seen.request
    choice = request.choices
    ratio = 0.0 if request.method.is_dense else request.ratio.compression
    title = f"plan: {choice['model']}, {choice['method']}, compression {ratio:.0%}"
    if choice.get("quantizer", "none") != "none":
        title += f", {choice['quantizer']}"
    linears = Table(title=title, box=SIMPLE, title_justify="left")
    linears.add_column("linears")
    for column in ("number", "m x n", "rank", "parameters, dense", "stored"):
        linears.add_column(column, justify="right")
    for row in linear_rows(plan):
        linears.add_row(*row)
    sizes = Table(box=SIMPLE)
    sizes.add_column("")
    sizes.add_column("bytes", justify="right")
    for name, amount in size_rows(plan):
        sizes.add_row(name, amount)
    console.print(linears)
    console.print(sizes)
    console.print(stage_table(plan))
    if plan.record is not None:
        console.print(comparison(plan))
    console.print(f"calibration set: {seen.samples} samples of {seen.length} tokens", markup=False)
    for line in lines(plan):
        console.print(line, markup=False)


def kinds_of(shape: ModelShape) -> dict[str, list[str]]:
    """Names of the linears of each kind and shape."""
    kinds: dict[str, list[str]] = {}
    for x in shape.linears:
        kinds.setdefault(x.kind, []).append(x.name)
    return kinds


def linear_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    """One row a kind, and the sum."""
    seen = plan.outlook
    cost, ranks = seen.request.method.packing.stored, seen.ranks.by_name
    by_name = {x.name: x for x in seen.shape.linears}
    for kind, names in kinds_of(seen.shape).items():
        members = [by_name[name] for name in names]
        low = [x for x in members if is_low_rank(x.m, x.n, ranks[x.name], cost)]
        values = sorted({ranks[x.name] for x in low})
        shown = "dense" if not low else f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
        if low and len(low) < len(members):
            shown += f", {len(members) - len(low)} dense"
        if seen.ranks.asked and low:
            shown = f"~{shown}"
        stored = sum(cost(x.m, x.n, ranks[x.name]) if x in low else x.params for x in members)
        shape = f"{members[0].m:,} x {members[0].n:,}"
        yield kind, f"{len(members)}", shape, shown, f"{sum(x.params for x in members):,}", f"{stored:,}"
    dense, small = seen.shape.size, seen.compressed
    yield "all", f"{len(by_name)}", "", "", f"{dense.linear_params:,}", f"{small.linear_params:,}"
    yield "whole model", "", "", "", f"{dense.model_params:,}", f"{small.model_params:,}"


def size_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Bytes; what is not there is left out."""
    seen = plan.outlook
    rows = {
        "dense model": seen.shape.size.model_bytes,
        "compressed model, as stored": seen.compressed.model_bytes,
        "statistics in memory at once": seen.statistics_held,
        "statistics in the cache": seen.statistics_cached,
        "spectra in the cache": seen.spectra_cached,
        "hidden states carried from decoder layer to decoder layer": seen.hidden_carried,
        "refined decoder layers in the cache": seen.refined_cached,
        "the teacher's states in the cache": seen.teacher_cached,
    }
    for name, amount in rows.items():
        if amount:
            yield name, f"{amount:,}"


def stage_table(plan: Plan) -> Table:
    """Work, time and memory of every stage."""
    table = Table(box=SIMPLE)
    table.add_column("stage")
    table.add_column("what")
    for column in ("TFLOP", "~time", "~peak memory"):
        table.add_column(column, justify="right")
    for estimate in plan.estimates:
        table.add_row(*stage_row(estimate))
    return table


def stage_row(estimate: Estimate) -> list[str]:
    """One stage as text."""
    stage = estimate.stage
    more = " or more" if stage.unknown else ""
    tera = f"{stage.work.flops / 1e12:,.2f}{more}"
    return [stage.name, stage.detail, tera if stage.sure else f"~{tera}", f"~{duration(estimate.seconds)}{more}", f"~{size(estimate.peak)}"]


def comparison(plan: Plan) -> Table:
    """What the record measured, and the estimate over it."""
    table = Table(title="beside the record", box=SIMPLE, title_justify="left")
    table.add_column("stage")
    for column in ("~time", "measured", "~ / measured", "~peak memory", "measured", "~ / measured"):
        table.add_column(column, justify="right")
    for x in plan.estimates:
        seconds, peak = x.measured_seconds, x.measured_peak
        told = seconds is not None and min(seconds, x.seconds) >= LEAST_SECONDS
        row = [duration(seconds), f"{x.seconds / seconds:.2f}"] if told and seconds else ["--", "--"]
        more = ["--", "--"] if not peak else [size(peak), f"{x.peak / peak:.2f}"]
        table.add_row(x.stage.name, f"~{duration(x.seconds)}", *row, f"~{size(x.peak)}", *more)
    return table


def lines(plan: Plan) -> Iterator[str]:
    """What follows the tables."""
    units = {"memory": "GB/s", "product": "GFLOP/s", "factorization": "GFLOP/s"}
    rates = [f"{kind} {rate / 1e9:,.0f} {units[kind]} {dtype}".strip() for (kind, dtype), rate in plan.speed.rates.items() if kind in units]
    more = " or more" if any(x.stage.unknown for x in plan.estimates) else ""
    where = f"{plan.speed.device}, {plan.speed.threads} {'thread' if plan.speed.threads == 1 else 'threads'}"
    yield f"altogether ~{duration(plan.seconds)}{more}, peak memory ~{size(plan.peak)}, on {where}"
    yield f"speed measured now: {', '.join(rates)}"
    if plan.speed.busy > BUSY:
        yield f"note: other programs slow this process {plan.speed.busy:.1f} times at the moment; times are for a device of its own"
    for note in plan.outlook.notes:
        yield f"note: {note}"
    if plan.record is not None:
        made = plan.record.provenance
        where = f"{made.get('device')}, {made.get('threads')} threads, {str(made.get('time'))[:10]}"
        yield f"measured: record {plan.record.key[:12]} ({where}); -- is no comparison: not run, read from the cache, or other benchmarks"


def duration(seconds: float) -> str:
    """1.2 s, 3.4 min, 5.6 h, 2.1 days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86400:.1f} days"


def size(amount: float) -> str:
    """MiB, or GiB from 10 of them on."""
    return f"{amount / 2**20:,.0f} MiB" if amount < 10 * 2**30 else f"{amount / 2**30:,.1f} GiB"
