"""plan=true: a request's plan with its time and memory on this device, what a record measured
beside it, printed.
"""

import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from specomp.data.token_ids import read_token_ids
from specomp.errors import UserError
from specomp.evaluation.divergence import ComparesDense
from specomp.experiment.config import Request
from specomp.experiment.record import COMMITTED, Record, RecordStore, point_of
from specomp.experiment.summary import FILE_WIDTH
from specomp.forms.options import DENSE
from specomp.forms.prices import numbers
from specomp.models.load import device_name, torch_device
from specomp.numerics.work import (
    EFFICIENCY,
    EFFICIENCY_HALF,
    FACTORIZED,
    STATED,
    measured_rates,
    seconds,
    stated_rates,
)
from specomp.pricing import Plan, Stage, planned

# Bytes of CPU memory that a run takes before it holds anything: what Lightning, datasets and the
# first products add to this process.
OVERHEAD = 1.0e8
LEAST_SECONDS = (
    0.1  # below it a time says nothing: a stage that only looked into a record or the cache
)
# Sizes that a GPU's 16-bit products want a multiple of; on a CPU any will do.
TENSOR_CORE = 8
# Times as slow as float32, from which a dtype is not for this device.
SLOW = 3
UNITS = {"memory": "GB/s", "product": "GFLOP/s", "factorization": "GFLOP/s"}


def plan_of(request: Request) -> Plan:
    """Reads no weights, no text and no network, and writes nothing. Raises UserError as the run
    itself would for a wrong request.
    """
    config, spec = request.source.config_for_plan(request.cache), request.calibration
    num_samples, length = sample_shape(spec)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise UserError(
            f"Samples of {length} tokens do not fit the model's context of {context}: lower"
            " calibration.length."
        )
    workloads = {label: part.workload() for label, part in request.suite.parts.items()}
    return planned(
        *(config, request.source.dtype, request.method, request.ratio, spec, num_samples, length),
        processes=request.processes,
        workloads=workloads,
        compared={
            label: workloads[label]
            for label, part in request.suite.parts.items()
            if isinstance(part, ComparesDense)
        },
        reference=request.options.reference,
        save=request.options.save,
    )


def sample_shape(spec: Any) -> tuple[int, int]:
    """Samples, and tokens of each; of a token file that says neither, its own."""
    if spec.num_samples is not None and spec.length is not None:
        return spec.num_samples, spec.length
    rows, length = read_token_ids(spec.path).shape
    return spec.num_samples or rows, spec.length or length


def show_plan(request: Request, *, console: Console | None = None) -> None:
    """Print it."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    base = peak_resident()  # before the device's speed is measured
    found, choice = plan_of(request), request.choices
    works, elsewhere = [x.work for x in found.stages], request.options.elsewhere
    if elsewhere:
        device, rates = torch.device("cuda"), stated_rates(works, elsewhere)
    else:
        device = torch_device(request.source.device, request.source.device_map)
        rates = measured_rates(works, device)
    title = (
        f"plan: {choice['model']}, {choice['method']},"
        f" {'nothing is compressed' if found.method.is_dense else request.ratio}"
    )
    if found.method.rounding.grids:
        title += f", {choice.get('quantizer')}"
    console.print(
        table(
            ["linears", "number", "m x n", "rank", "parameters, dense", "stored"],
            linear_rows(found),
            title=title,
        )
    )
    console.print(table(["", "bytes"], size_rows(found)))
    record = record_of(request)
    held = found.size.held_bytes + (base + OVERHEAD if device.type == "cpu" else 0.0)
    console.print(
        table(["stage", "what", "TFLOP", "~time", "~peak memory"], stage_rows(found, rates, held))
    )
    if record is not None:
        header = [
            "stage",
            "~time",
            "measured",
            "~ / measured",
            "~peak memory",
            "measured",
            "~ / measured",
        ]
        console.print(
            table(header, compared(found, rates, held, record, request), title="beside the record")
        )
    samples = found.run.samples
    console.print(
        f"calibration set: {samples.num_samples} samples of {samples.length} tokens", markup=False
    )
    more = " or more" if any(x.unknown for x in found.stages) else ""
    peak = held + max(x.held for x in found.stages)
    total = sum(seconds(x.work, rates) for x in found.stages)
    where = (
        f"one {elsewhere.upper()}"
        if elsewhere
        else f"{device_name(device)}, {torch.get_num_threads()} threads"
    )
    console.print(
        f"altogether ~{duration(total)}{more}, peak memory ~{size(peak)}, on {where}",
        markup=False,
    )
    if elsewhere and peak > (room := STATED[elsewhere].room):
        console.print(f"That does not fit its {size(room)}: model.stream=true takes less, as do")
        console.print("calibration.layers_at_once and smaller batches.")
    speeds = (
        f"{kind} {rate / 1e9:,.0f} {UNITS[kind]} {dtype}".strip()
        for (kind, dtype), rate in rates.items()
        if kind in UNITS
    )
    told = "stated by its maker" if elsewhere else "measured now"
    console.print(f"speed {told}: {', '.join(speeds)}", markup=False)
    for note in notes(found, request, rates, device):
        console.print(f"note: {note}", markup=False)
    if record is not None:
        made = record.provenance
        where = f"{made.get('device')}, {made.get('threads')} threads, {str(made.get('time'))[:10]}"
        told = "-- is no comparison: not run, read from the cache, or other benchmarks"
        console.print(f"measured: record {record.key[:12]} ({where}); {told}", markup=False)


def table(header: list[str], rows: Iterator[list[str]], title: str | None = None) -> Table:
    """First column to the left, numbers to the right."""
    made = Table(title=title, box=SIMPLE, title_justify="left")
    for index, column in enumerate(header):
        made.add_column(column, justify="left" if index == 0 or column == "what" else "right")
    for row in rows:
        made.add_row(*row)
    return made


def linear_rows(found: Plan) -> Iterator[list[str]]:
    """One row a kind, and the sums."""
    kinds: dict[str, list[Any]] = {}
    for unit, choice in found.choices.items():
        kinds.setdefault(unit.linears[0].kind, []).append((unit, choice))
    for kind, members in kinds.items():
        ranks = sorted({choice.size for _, choice in members if choice.form != DENSE})
        shown = (
            "dense"
            if not ranks
            else f"{ranks[0]}"
            if len(ranks) == 1
            else f"{ranks[0]} to {ranks[-1]}"
        )
        if ranks and (dense := sum(choice.form == DENSE for _, choice in members)):
            shown += f", {dense} dense"
        stored = sum(numbers(choice.form.parts(unit, choice.size)) for unit, choice in members)
        first = members[0][0].linears[0]
        shown = f"~{shown}" if found.asked and ranks else shown
        whole = sum(unit.params for unit, _ in members)
        yield [
            kind,
            f"{len(members)}",
            f"{first.m:,} x {first.n:,}",
            shown,
            f"{whole:,}",
            f"{stored:,}",
        ]
    dense_size, small = found.size, found.compressed
    yield [
        "all",
        f"{len(found.run.linears)}",
        "",
        "",
        f"{dense_size.linear_params:,}",
        f"{small.linear_params:,}",
    ]
    yield ["whole model", "", "", "", f"{dense_size.model_params:,}", f"{small.model_params:,}"]


def size_rows(found: Plan) -> Iterator[list[str]]:
    """Bytes; what is not there is left out."""
    at_once = min(found.run.calibration.layers_at_once or found.num_layers, found.num_layers)
    rows = {
        "dense model": found.size.model_bytes,
        "compressed model, as stored": found.compressed.model_bytes,
        "statistics in memory at once": found.statistics_cached // found.num_layers * at_once,
        "statistics in the cache": found.statistics_cached,
        "spectra in the cache": found.spectra_cached,
        "hidden states carried from decoder layer to decoder layer": found.hidden_carried,
        "refined decoder layers in the cache": found.refined_cached,
        "the teacher's states in the cache": found.teacher_cached,
        "the dense model's states in the cache, to compare with": found.compared_cached,
    }
    return ([name, f"{amount:,}"] for name, amount in rows.items() if amount)


def stage_rows(found: Plan, rates: Any, held: float) -> Iterator[list[str]]:
    """Work, time and memory of every stage; peaks never fall."""
    peak = 0.0
    for x in found.stages:
        peak, more = max(peak, held + x.held), " or more" if x.unknown else ""
        tera = f"{'' if x.sure else '~'}{x.work.flops / 1e12:,.2f}{more}"
        yield [
            x.name,
            x.detail,
            tera,
            f"~{duration(seconds(x.work, rates))}{more}",
            f"~{size(peak)}",
        ]


def notes(
    found: Plan, request: Request, rates: Mapping[Any, float], device: torch.device
) -> Iterator[str]:
    """What a reader of the numbers should know."""
    low = [choice.size for choice in found.low.values()]
    uneven = sum(x % TENSOR_CORE > 0 for x in low)
    if device.type == "cuda" and found.dtype != torch.float32 and uneven and not found.asked:
        yield (
            f"{uneven} of {len(low)} ranks are no multiples of {TENSOR_CORE}, which tensor cores"
            " are slow with: method.allocation.round_to (of allocations that choose by loss)"
        )
    dtype = str(found.dtype).removeprefix("torch.")
    own, other = rates.get(("product", dtype)), rates.get(("product", "float32"))
    if own is not None and other is not None and other > SLOW * own:
        yield (
            f"products in {dtype} take {other / own:.0f} times as long as in float32 here:"
            " model.dtype=float32 is faster, at twice the memory"
        )
    if found.asked:
        cut = ", and nothing is cut in them" if found.ordered else ""
        yield (
            f"what is chosen depends on {found.asked}: the ranks shown are uniform ones, at the"
            f" same budget{cut}"
        )
    if (download := request.source.download) is not None:
        yield (
            f"downloading the weights of {download} ({found.size.model_bytes / 1e9:.1f} GB, once)"
            " is not counted"
        )
    if not found.method.is_dense:
        yield (
            "nothing is taken from the cache here; jobs that share model and calibration share"
            " statistics, spectra and dense metrics"
        )
        yield (
            "work on single linears is counted on small random ones: solve=auto and exchanges of"
            " pivot rows may take more"
        )
    if request.options.elsewhere:
        yield (
            f"nothing was measured there: products at {EFFICIENCY['product']:g} of the stated peak,"
            f" {EFFICIENCY_HALF:g} in 16 bits, factorizations at {FACTORIZED:g} of the float32 peak"
            " (an assumption), the disk as here"
        )
    if found.method.training.active and request.processes > 1:
        yield f"the training is counted for one process, not for {request.processes}"


def record_of(request: Request) -> Record | None:
    """The record of this configuration, where runs write theirs or among the committed ones; the
    most recent if there are several.
    """
    point = point_of(request.config)
    for store in [RecordStore(x) for x in (request.records.folder, COMMITTED) if x.is_dir()]:
        found = [record for record in store.all() if point in record.points and record.ledger]
        if found:
            return found[-1]
    return None


def compared(
    found: Plan, rates: Any, held: float, record: Record, request: Request
) -> Iterator[list[str]]:
    """What the record measured, and the estimate over it."""
    peak = 0.0
    for x in found.stages:
        peak, time = max(peak, held + x.held), seconds(x.work, rates)
        spent, used = measured(x, record, request)
        told = spent is not None and min(spent, time) >= LEAST_SECONDS
        row = [duration(spent), f"{time / spent:.2f}"] if told and spent else ["--", "--"]
        more = ["--", "--"] if not used else [size(used), f"{peak / used:.2f}"]
        yield [x.name, f"~{duration(time)}", *row, f"~{size(peak)}", *more]


def measured(stage: Stage, record: Record, request: Request) -> tuple[float | None, float | None]:
    """Seconds and peak bytes of a stage; no seconds where the record's stage was another one: read
    from the cache, or other benchmarks.
    """
    if stage.name not in record.seconds:
        return None, None
    wanted = [benchmark.protocol for benchmark in request.suite.benchmarks]
    same = len(record.metrics) == len(wanted) and all(
        any(name.startswith(x) for name in record.metrics) for x in wanted
    )
    other = stage.name.startswith("evaluate") and not same
    peak = record.peak_memory_mib.get(stage.name)
    return None if other or from_cache(stage.name, record) else record.seconds[stage.name], (
        None if peak is None else peak * 2**20
    )


def from_cache(stage: str, record: Record) -> bool:
    """Whether a record's stage found its expensive part done."""
    hits, misses = record.cache.get("hits", {}), record.cache.get("misses", {})
    if stage == "compress":
        # After an allocation or a training that looked at them, reading spectra from the cache is
        # what the stage does.
        return (
            hits.get("spectra", 0) > 0
            and not misses.get("spectra")
            and "train" not in record.seconds
        )
    kinds = {"calibrate": "statistics/", "allocate": "spectra", "train": "trained"}
    return stage in kinds and not any(name.startswith(kinds[stage]) for name in misses)


def peak_resident() -> float:
    """Bytes of CPU memory that this process has taken at most, libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def duration(spent: float | None) -> str:
    """1.2 s, 3.4 min, 5.6 h, 2.1 days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if spent is not None and spent < limit:
            return f"{spent / unit:.1f} {name}"
    return "--" if spent is None else f"{spent / 86400:.1f} days"


def size(amount: float) -> str:
    """MiB, or GiB from 10 of them on."""
    return f"{amount / 2**20:,.0f} MiB" if amount < 10 * 2**30 else f"{amount / 2**30:,.1f} GiB"
