"""plan=true: count a request, estimate its time and memory on this device, put what a record measured beside it, and print it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specomp.experiment.config import Request
from specomp.experiment.record import COMMITTED, Record, RecordStore, point_of
from specomp.models.load import torch_device
from specomp.planning.device import OVERHEAD, Speed, resident, speed_for
from specomp.planning.outlook import Outlook, Stage
from specomp.planning.stages import outlook


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One stage: seconds and peak memory so far as estimated, and as a record measured them; None where there is nothing to compare."""

    stage: Stage
    seconds: float
    peak: float
    measured_seconds: float | None = None
    measured_peak: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is printed."""

    outlook: Outlook
    speed: Speed
    estimates: list[Estimate]
    record: Record | None

    @property
    def seconds(self) -> float:
        """Of all stages that could be counted."""
        return sum(x.seconds for x in self.estimates)

    @property
    def peak(self) -> float:
        """Bytes."""
        return max(x.peak for x in self.estimates)


def plan(request: Request) -> Plan:
    """Reads no weights, no text and no network, and writes nothing. Raises UserError as the run itself would for a wrong request."""
    base = resident()  # before the device's speed is measured
    seen = outlook(request)
    device = torch_device(request.source.device, request.source.device_map)
    speed = speed_for([stage.work for stage in seen.stages], device)
    record = record_of(request)
    return Plan(outlook=seen, speed=speed, estimates=estimates(seen, speed, device, base, record), record=record)


def estimates(seen: Outlook, speed: Speed, device: torch.device, base: float, record: Record | None) -> list[Estimate]:
    """Every stage in order."""
    peak, found = 0.0, []
    start = base + OVERHEAD if device.type == "cpu" else 0.0
    for stage in seen.stages:
        peak = max(peak, start + seen.shape.size.held_bytes + stage.held)
        seconds, memory = measured(stage, record, seen.request)
        found.append(Estimate(stage=stage, seconds=speed.seconds(stage.work), peak=peak, measured_seconds=seconds, measured_peak=memory))
    return found


def record_of(request: Request) -> Record | None:
    """The record of this configuration, where runs write theirs or among the committed ones; the most recent if there are several."""
    point = point_of(request.config)
    folders = [RecordStore(x) for x in (request.records.folder, COMMITTED) if x.is_dir()]
    for store in folders:
        found = [record for record in store.all() if point in record.points and record.ledger]
        if found:
            return found[-1]
    return None


def measured(stage: Stage, record: Record | None, request: Request) -> tuple[float | None, float | None]:
    """Seconds and peak bytes of a stage; no seconds where the record's stage was another one: read from the cache, or other benchmarks."""
    if record is None or stage.name not in record.seconds:
        return None, None
    peak = record.peak_memory_mib.get(stage.name)
    seconds: float | None = record.seconds[stage.name]
    if from_cache(stage.name, record) or (stage.name.startswith("evaluate") and not _same_benchmarks(record, request)):
        seconds = None
    return seconds, None if peak is None else peak * 2**20


def from_cache(stage: str, record: Record) -> bool:
    """Whether a record's stage found its expensive part done."""
    misses = record.cache.get("misses", {})
    kinds = {"calibrate": "statistics/", "allocate": "spectra", "train": "trained"}
    if stage == "compress":
        hits = record.cache.get("hits", {})
        # After an allocation or a training that looked at them, reading spectra from the cache is what the stage does.
        return hits.get("spectra", 0) > 0 and not misses.get("spectra") and "train" not in record.seconds
    return stage in kinds and not any(name.startswith(kinds[stage]) for name in misses)


def _same_benchmarks(record: Record, request: Request) -> bool:
    wanted: Sequence[str] = [benchmark.protocol for benchmark in request.suite.benchmarks]
    return len(record.metrics) == len(wanted) and all(any(name.startswith(x) for name in record.metrics) for x in wanted)
