"""Calibration: statistics of the dense model over the calibration set, once, cached by content, shared by every job.

The forward pass stops at the last hidden state (no logits), except for gradient statistics, which need the loss. A streamed model is
calibrated decoder layer by decoder layer, each in memory once: the hidden states of all samples wait for the next one.
"""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from specomp.cache import digest, waiting
from specomp.errors import UserError, not_finite
from specomp.models.family import LinearSpec
from specomp.progress import track
from specomp.stages.observe import LayerObserver, stats_of
from specomp.stages.setup import Setup
from specomp.stages.stream import HiddenStream
from specomp.statistics import GRADIENT_SCOPES, VERSION, Statistic, Stats

log = logging.getLogger(__name__)


class CalibrationModule(L.LightningModule):
    """Predict-only: runs batches of token ids (batch, length) through the model while observers listen to a window of decoder layers, then
    stores what they saw. Changes no parameter. Several processes take turns with the batches, and their sums are added up once."""

    def __init__(self, setup: Setup, statistics: Sequence[Statistic], window: range, *, gradients: bool) -> None:
        super().__init__()
        # In a tuple, so that Lightning neither moves nor scripts it: the model is already where it belongs, perhaps on several devices.
        self._setup, self.statistics, self.window, self.gradients = (setup,), list(statistics), window, gradients
        self._observers: dict[int, LayerObserver] = {}
        self._hooks = ExitStack()

    def on_predict_start(self) -> None:
        """Hooks are made here, inside each process: they cannot be sent to one."""
        setup = self._setup[0]
        if self.trainer.world_size > 1:
            nn.Module.to(setup.model, self.device)
            if self.device.type == "cpu":
                torch.set_num_threads(max(1, torch.get_num_threads() // self.trainer.world_size))
        for parameter in setup.model.parameters():
            parameter.requires_grad_(False)
        self._observers = {
            i: self._hooks.enter_context(
                LayerObserver(setup.layers[i], setup.family, self.statistics, setup.precision, setup.samples.num_samples)
            )
            for i in self.window
        }

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        """One batch through the decoder, or one backward pass per sequence for gradient statistics."""
        if batch_idx % self.trainer.world_size != self.trainer.global_rank:
            return
        setup = self._setup[0]
        batch = batch.to(setup.model.device)
        with setup.forward_precision():
            if not self.gradients:
                setup.family.decoder(setup.model)(input_ids=batch, use_cache=False)
                return
            for sequence in batch.split(1):
                with torch.enable_grad():
                    # transformers shifts the labels itself.
                    setup.model(input_ids=sequence, labels=sequence, use_cache=False).loss.backward()

    def on_predict_end(self) -> None:
        """Add up, store, forget; one decoder layer at a time."""
        self._hooks.close()
        for i in list(self._observers):
            observer = self._observers.pop(i)
            if self.trainer.world_size > 1:
                observer.merge(lambda value: self.trainer.strategy.reduce(value, reduce_op="sum"))
            if self.trainer.is_global_zero:
                _keep(self._setup[0], self.statistics, i, observer.values())

    def teardown(self, stage: str) -> None:
        """Also after an error."""
        self._hooks.close()


class DenseStatistics:
    """Statistics of the dense model, read back one decoder layer at a time."""

    def __init__(self, setup: Setup, statistics: Iterable[Statistic]) -> None:
        self.setup, self.statistics = setup, sorted(set(statistics), key=lambda x: x.name)
        self._layer = -1
        self._values: dict[str, Tensor] = {}
        self._by_name = {linear.name: linear for linear in setup.linears}

    def __call__(self, name: str) -> Stats:
        """All statistics of one linear."""
        linear = self._by_name[name]
        return stats_of(linear, self.layer(linear.decoder_layer), self.statistics)

    def layer(self, index: int) -> dict[str, Tensor]:
        """All values of one decoder layer, on the device its linears will be worked on; recomputed when the cache lost them.

        Raises UserError when they are lost after the first linear was replaced: what the model sees now is not what the dense one saw.
        """
        if index != self._layer:
            self._values = {}
            for statistic in self.statistics:
                part = self._load(statistic, index)
                if part is None:
                    if not self.setup.is_dense:
                        raise UserError(
                            f"The cache in {self.setup.cache.root} lost the statistics of decoder layer {index} while the model was being "
                            "compressed: run the same command again, which computes them anew."
                        )
                    collect(self.setup, self.statistics)
                    part = self._load(statistic, index)
                    assert part is not None, "just computed"
                self._values |= part
            self._layer = index
        return self._values

    def forget(self) -> None:
        """Free what was read; it can be read again."""
        self._layer, self._values = -1, {}

    def _load(self, statistic: Statistic, index: int) -> dict[str, Tensor] | None:
        part = self.setup.cache.load("statistics", statistic_key(self.setup, statistic), part_name(index))
        device = self.setup.device(index)
        return None if part is None else {name: value.to(device) for name, value in part.items()}


def part_name(decoder_layer: int) -> str:
    """File of one decoder layer in an entry."""
    return f"decoder_layer_{decoder_layer:03d}"


def statistic_key(setup: Setup, statistic: Statistic) -> str:
    """What a statistic's numbers depend on."""
    spec = setup.calibration
    return digest(
        {
            "version": VERSION,
            "statistic": statistic.name,
            "model": setup.model_key,
            "calibration": setup.samples.hash,
            "precision": spec.precision,
            "accumulate": spec.accumulate,
            "torch": torch.__version__,
        }
    )


def dense_statistics(setup: Setup, statistics: Iterable[Statistic]) -> DenseStatistics:
    """Make sure that all these statistics of the dense model are in the cache, in one pass for those that are not."""
    wanted = DenseStatistics(setup, statistics)
    missing = [x for x in wanted.statistics if not _complete(setup, x)]
    if missing:
        # One lock per model and calibration set: a second job waits and then finds everything. Who misses nothing does not wait.
        lock = setup.cache.lock("statistics", digest([setup.model_key, setup.samples.hash]))
        with waiting(lock, "calibrates this model"):
            missing = [x for x in missing if not _complete(setup, x)]
            if missing:
                collect(setup, missing)
    for statistic in wanted.statistics:
        setup.cache.count(f"statistics/{statistic.name}", hit=statistic not in missing)
    return wanted


def _complete(setup: Setup, statistic: Statistic) -> bool:
    key = statistic_key(setup, statistic)
    return all(setup.cache.has("statistics", key, part_name(i)) for i in range(len(setup.layers)))


def collect(setup: Setup, statistics: Iterable[Statistic]) -> None:
    """Compute and store statistics, window of decoder layers by window; gradient statistics in passes of their own."""
    statistics = list(statistics)
    if setup.store is not None:
        _collect_streamed(setup, statistics)
        return
    # Several processes share the batches of what is a sum over tokens; the rest is taken by one process.
    groups: dict[tuple[bool, bool], list[Statistic]] = {}
    for statistic in statistics:
        shared = setup.processes > 1 and not statistic.sequential
        groups.setdefault((statistic.scope in GRADIENT_SCOPES, shared), []).append(statistic)
    for gradients, shared in sorted(groups):
        for window in setup.family.windows(setup.model, setup.calibration.window):
            _collect_window(setup, groups[gradients, shared], window, gradients=gradients, shared=shared)


def _collect_window(setup: Setup, statistics: list[Statistic], window: range, *, gradients: bool, shared: bool) -> None:
    samples, loader = setup.samples, setup.samples.predict_dataloader()
    label = f"calibrate {', '.join(x.name for x in statistics)}, decoder layers {window.start}-{window.stop - 1}"
    shared = shared and len(loader) >= setup.processes
    by = f" by {setup.processes} processes" if shared else " by one of them" if setup.processes > 1 else ""
    log.info("%s: %d samples of %d tokens%s", label, samples.num_samples, samples.length, by)
    module = CalibrationModule(setup, statistics, window, gradients=gradients)
    predict(setup.trainer, module, loader, label, len(loader), shared=shared)


def _collect_streamed(setup: Setup, statistics: list[Statistic]) -> None:
    if any(x.scope in GRADIENT_SCOPES for x in statistics):
        raise UserError("Statistics of gradients need the whole model in memory: set model.stream=false.")
    samples, count = setup.samples, len(setup.layers)
    label = f"calibrate {', '.join(x.name for x in statistics)}, streamed"
    log.info("%s: %d samples of %d tokens", label, samples.num_samples, samples.length)
    stream = HiddenStream(setup)
    for i in track(range(count), label, count):
        with setup.resident(i):
            _keep(setup, statistics, i, stream.advance(i, statistics))


def _keep(setup: Setup, statistics: Iterable[Statistic], decoder_layer: int, values: Mapping[str, Tensor]) -> None:
    for statistic in statistics:
        part = {name: value for name, value in values.items() if name.endswith(f":{statistic.name}")}
        wrong = [name for name, value in part.items() if not bool(value.isfinite().all())]
        if wrong:
            raise not_finite(f"Decoder layer {decoder_layer}: {wrong[0]} is not finite on the calibration set")
        setup.cache.save("statistics", statistic_key(setup, statistic), part_name(decoder_layer), part)


class _Terminable(L.Callback):
    """Lightning swallows SIGTERM or puts it off; a scheduler that sends it must be obeyed. What is on disk is complete either way."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_train_start = on_predict_start


@contextmanager
def lightning_loop() -> Iterator[L.Callback]:
    """Around trainer.fit or predict; yields a callback for the trainer. No chatter, and signals mean what they mean elsewhere."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hardware announcements and advertising, once per loop
    interrupt = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # The last is said of ALONE beside a GPU, which the model does use.
        warnings.filterwarnings("ignore", message=".*(LeafSpec|predict returned None|GPU available but not used).*")
        try:
            yield _Terminable()
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            # Lightning turns Ctrl-C off and exits with 1; a sweep and the record must see what it was.
            signal.signal(signal.SIGINT, interrupt)
            raise KeyboardInterrupt from error


# The model is hidden from the loop and stays where it is, so the loop is one process on the CPU, whatever the trainer's.
ALONE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


def predict(
    trainer: Callable[..., L.Trainer], module: L.LightningModule, items: Iterable[Any], label: str, total: int, *, shared: bool = False
) -> None:
    """Drive a predict-only module over items, with progress and without keeping outputs; shared: in every process of the trainer."""
    with lightning_loop() as terminable:
        loop = trainer(callbacks=[terminable], **({} if shared else ALONE))
        loop.predict(module, _Tracked(items, label, total), return_predictions=False)


class _Tracked:
    """A sized iterable for Lightning that reports progress."""

    def __init__(self, items: Iterable[Any], label: str, total: int) -> None:
        self.items, self.label, self.total = items, label, total

    def __iter__(self) -> Any:
        return iter(track(self.items, self.label, self.total))

    def __len__(self) -> int:
        return self.total


def linear_module(model: nn.Module, linear: LinearSpec) -> nn.Linear:
    """The dense module behind a spec."""
    module = model.get_submodule(linear.name)
    assert isinstance(module, nn.Linear), f"{linear.name} is a {type(module).__name__}"
    return module
