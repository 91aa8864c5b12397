"""Calibration: statistics of the dense model over the calibration set, once, cached by content,
shared by every job.

The forward pass stops at the last hidden state (no logits), except for gradient statistics, which
need the loss. A streamed model is calibrated decoder layer by decoder layer, each in memory once:
the hidden states of all samples wait for the next one.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from specomp.cache import digest, waiting
from specomp.compression.observe import LayerObserver, stats_of
from specomp.compression.run import Run
from specomp.compression.stream import HiddenStream
from specomp.errors import UserError, not_finite
from specomp.models.family import LinearSpec
from specomp.models.modules import PartLinear
from specomp.numerics.statistics import GRADIENT_SCOPES, VERSION, Statistic, Stats
from specomp.progress import track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One pass over the calibration set: what is accumulated, in which decoder layers, and whether
    it takes a backward pass.
    """

    statistics: Sequence[Statistic]
    layers: range
    gradients: bool
    shared: bool  # whether several processes may take turns with the batches

    @property
    def label(self) -> str:
        """For logs and progress."""
        names = ", ".join(x.name for x in self.statistics)
        return f"calibrate {names}, decoder layers {self.layers.start}-{self.layers.stop - 1}"


class Observation:
    """A pass under way: a context with hooks on the decoder layers; changes no parameter."""

    def __init__(self, run: Run, job: Pass) -> None:
        self.run, self.job = run, job
        self._observers: dict[int, LayerObserver] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "Observation":
        run = self.run
        run.model.requires_grad_(False)
        for index in self.job.layers:
            observer = LayerObserver(
                run.layers[index],
                run.family,
                self.job.statistics,
                run.precision,
                run.samples.num_samples,
            )
            self._observers[index] = self._hooks.enter_context(observer)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def observe(self, batch: Tensor) -> None:
        """Token ids (batch, length) through the decoder, or one backward pass per sequence for
        gradient statistics.
        """
        run, batch = self.run, batch.to(self.run.model.device)
        with run.forward_precision():
            if not self.job.gradients:
                with torch.no_grad():
                    run.family.decoder(run.model)(input_ids=batch, use_cache=False)
                return
            for sequence in batch.split(1):
                with torch.enable_grad():
                    # transformers shifts the labels itself.
                    run.model(input_ids=sequence, labels=sequence, use_cache=False).loss.backward()

    def keep(self, total: Callable[[Tensor], Tensor] | None = None, *, store: bool = True) -> None:
        """Store what was seen and forget it, one decoder layer at a time; total: adds up over
        processes first.
        """
        self._hooks.close()
        for index in list(self._observers):
            observer = self._observers.pop(index)
            if total is not None:
                observer.merge(total)
            if store:
                keep(self.run, self.job.statistics, index, observer.values())


Drive = Callable[[Observation, Sequence[Tensor]], None]
"""Takes a pass over batches, and has it keep what it saw."""


def in_this_process(observation: Observation, batches: Sequence[Tensor]) -> None:
    """A plain loop."""
    with observation:
        for batch in track(batches, observation.job.label, len(batches)):
            observation.observe(batch)
    observation.keep()


class Statistics:
    """Statistics of the dense model, read back one decoder layer at a time."""

    def __init__(self, run: Run, statistics: Iterable[Statistic]) -> None:
        self.run, self.statistics = run, sorted(set(statistics), key=lambda x: x.name)
        self._layer = -1
        self._values: dict[str, Tensor] = {}
        self._reading = threading.Lock()  # linears of a decoder layer are worked on side by side

    def __call__(self, linear: LinearSpec) -> Stats:
        """All statistics of one linear."""
        return stats_of(linear, self.layer(linear.decoder_layer), self.statistics)

    def layer(self, index: int) -> dict[str, Tensor]:
        """All values of one decoder layer, on the device its linears will be worked on; recomputed
        when the cache lost them.

        Raises UserError when they are lost after the first linear was replaced: what the model sees
        now is not what the dense one saw.
        """
        with self._reading:
            if index != self._layer:
                self._read(index)
            return self._values

    def _read(self, index: int) -> None:
        self._values = {}
        for statistic in self.statistics:
            part = self._load(statistic, index)
            if part is None:
                if not self.run.is_dense:
                    raise UserError(
                        f"The cache in {self.run.cache.root} lost the statistics of decoder layer"
                        f" {index} while the model was being compressed: run the same command"
                        " again, which computes them anew."
                    )
                collect(self.run, self.statistics, in_this_process)
                part = self._load(statistic, index)
                assert part is not None, "just computed"
            self._values |= part
        self._layer = index

    def forget(self) -> None:
        """Free what was read; it can be read again."""
        self._layer, self._values = -1, {}

    def _load(self, statistic: Statistic, index: int) -> dict[str, Tensor] | None:
        part = self.run.cache.load(
            "statistics", statistic_key(self.run, statistic), part_name(index)
        )
        device = self.run.device(index)
        return None if part is None else {name: value.to(device) for name, value in part.items()}


class PartStatistics(Statistics):
    """Of linears of which only some outputs and inputs are left."""

    def __call__(self, linear: LinearSpec) -> Stats:
        """All statistics of what is left of one linear."""
        module = self.run.model.get_submodule(linear.name)
        found = super().__call__(linear)
        return (
            found.part(module.outputs, module.inputs) if isinstance(module, PartLinear) else found
        )


def part_name(decoder_layer: int) -> str:
    """File of one decoder layer in an entry."""
    return f"decoder_layer_{decoder_layer:03d}"


def statistic_key(run: Run, statistic: Statistic) -> str:
    """What a statistic's numbers depend on."""
    return digest(
        {
            "version": VERSION,
            "statistic": statistic.name,
            "model": run.model_key,
            "calibration": run.samples.hash,
            "precision": run.calibration.precision,
            "accumulate": run.calibration.accumulate,
            "torch": torch.__version__,
        }
    )


def calibrate(
    run: Run, statistics: Iterable[Statistic] | None = None, drive: Drive = in_this_process
) -> Statistics:
    """Make sure that the statistics (those of the route) of the dense model are in the cache, in
    one pass for those that are not.
    """
    wanted = Statistics(run, run.route.dense if statistics is None else statistics)
    missing = [x for x in wanted.statistics if not _complete(run, x)]
    if missing:
        # One lock per model and calibration set: a second job waits and then finds everything. Who
        # misses nothing does not wait.
        lock = run.cache.lock("statistics", digest([run.model_key, run.samples.hash]))
        with waiting(lock, "calibrates this model"):
            missing = [x for x in missing if not _complete(run, x)]
            if missing:
                collect(run, missing, drive)
    for statistic in wanted.statistics:
        run.cache.count(f"statistics/{statistic.name}", hit=statistic not in missing)
    return wanted


def _complete(run: Run, statistic: Statistic) -> bool:
    key = statistic_key(run, statistic)
    return all(run.cache.has("statistics", key, part_name(i)) for i in range(len(run.layers)))


def passes(run: Run, statistics: Iterable[Statistic]) -> Iterator[Pass]:
    """Those that these statistics take, range of decoder layers by range; gradient statistics in
    passes of their own.

    Several processes share the batches of what is a sum over tokens; the rest is taken by one of
    them.
    """
    groups: dict[tuple[bool, bool], list[Statistic]] = {}
    for statistic in statistics:
        shared = run.processes > 1 and not statistic.sequential
        groups.setdefault((statistic.scope in GRADIENT_SCOPES, shared), []).append(statistic)
    for gradients, shared in sorted(groups):
        for layers in run.family.layer_ranges(run.model, run.calibration.layers_at_once):
            yield Pass(
                groups[gradients, shared],
                layers,
                gradients,
                shared and len(run.samples.batches()) >= run.processes,
            )


def collect(run: Run, statistics: Iterable[Statistic], drive: Drive) -> None:
    """Compute and store statistics."""
    statistics, samples = list(statistics), run.samples
    if run.store is not None:
        _collect_streamed(run, statistics)
        return
    for job in passes(run, statistics):
        by = (
            ""
            if run.processes == 1
            else f" by {run.processes} processes"
            if job.shared
            else " by one of them"
        )
        log.info(
            "%s: %d samples of %d tokens%s", job.label, samples.num_samples, samples.length, by
        )
        drive(Observation(run, job), samples.batches())


def _collect_streamed(run: Run, statistics: list[Statistic]) -> None:
    if any(x.scope in GRADIENT_SCOPES for x in statistics):
        raise UserError(
            "Statistics of gradients need the whole model in memory: set model.stream=false."
        )
    samples, count = run.samples, len(run.layers)
    label = f"calibrate {', '.join(x.name for x in statistics)}, streamed"
    log.info("%s: %d samples of %d tokens", label, samples.num_samples, samples.length)
    stream = HiddenStream(run, samples)
    for i in track(range(count), label, count):
        with run.resident(i):
            keep(run, statistics, i, stream.advance(i, statistics))


def keep(
    run: Run, statistics: Iterable[Statistic], decoder_layer: int, values: Mapping[str, Tensor]
) -> None:
    """Store what one decoder layer accumulated. Raises UserError where it is not finite."""
    for statistic in statistics:
        part = {
            name: value for name, value in values.items() if name.endswith(f":{statistic.name}")
        }
        wrong = [name for name, value in part.items() if not bool(value.isfinite().all())]
        if wrong:
            raise not_finite(
                f"Decoder layer {decoder_layer}: {wrong[0]} is not finite on the calibration set"
            )
        run.cache.save("statistics", statistic_key(run, statistic), part_name(decoder_layer), part)
