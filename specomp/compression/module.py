"""Calibration and compression as a LightningModule: no optimizer, no training step. It wraps what
the library calls directly.
"""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from specomp.compression.calibrate import Observation, Statistics, calibrate
from specomp.compression.loop import compress
from specomp.compression.report import Report
from specomp.compression.run import Run
from specomp.progress import track

# The model is hidden from the loop and stays where it is, so the loop is one process on the CPU,
# whatever the trainer's.
ALONE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


class CalibrationOnlyModule(L.LightningModule):
    """Runs batches of token ids (batch, length) through the model while hooks listen, then
    compresses what it has seen.

    `calibrate()` takes one `trainer.predict` per pass; `finish()` does the rest in plain loops (not
    in a hook: Lightning skips hooks when a warm cache leaves no batch). Several processes take
    turns with the batches, and their sums are added up once.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        # In a tuple, so that Lightning neither moves nor scripts the model: it is already where it
        # belongs.
        self._run = (run,)
        self.observation: Observation | None = None
        self.statistics: Statistics | None = None

    def calibrate(self) -> Statistics:
        """All passes that the cache does not spare."""
        self.statistics = calibrate(self._run[0], drive=self._drive)
        return self.statistics

    def finish(self) -> Report:
        """Allocate, compress, train where the method trains."""
        assert self.statistics is not None, "calibrate first"
        return compress(self._run[0], self.statistics)

    def _drive(self, observation: Observation, batches: Sequence[Tensor]) -> None:
        self.observation = observation
        trainer = self._run[0].trainer
        assert trainer is not None
        with lightning_loop() as terminable:
            loop = trainer(callbacks=[terminable], **({} if observation.job.shared else ALONE))
            try:
                loop.predict(
                    self, _Tracked(batches, observation.job.label), return_predictions=False
                )
            finally:
                # Lightning calls teardown of a module only where nothing went wrong
                observation.__exit__()

    def on_predict_start(self) -> None:
        """Hooks are made here, inside each process: they cannot be sent to one."""
        run = self._run[0]
        if self.trainer.world_size > 1:
            nn.Module.to(run.model, self.device)
            if self.device.type == "cpu":
                torch.set_num_threads(max(1, torch.get_num_threads() // self.trainer.world_size))
        self._seen.__enter__()

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        """One batch."""
        if batch_idx % self.trainer.world_size == self.trainer.global_rank:
            self._seen.observe(batch)

    def on_predict_end(self) -> None:
        """Add up, store, forget."""
        total = None
        if self.trainer.world_size > 1:

            def total(value: Tensor) -> Tensor:
                return self.trainer.strategy.reduce(value, reduce_op="sum")  # type: ignore[return-value]

        self._seen.keep(total, store=self.trainer.is_global_zero)

    @property
    def _seen(self) -> Observation:
        assert self.observation is not None
        return self.observation


class _Terminable(L.Callback):
    """Lightning swallows SIGTERM or puts it off; a scheduler that sends it must be obeyed. What is
    on disk is complete either way.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_train_start = on_predict_start


@contextmanager
def lightning_loop() -> Iterator[L.Callback]:
    """Around trainer.fit or predict; yields a callback for the trainer. No chatter, and signals
    mean what they mean elsewhere.
    """
    # hardware announcements and advertising, once per loop
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    interrupt = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # The last is said of ALONE beside a GPU, which the model does use.
        warnings.filterwarnings(
            "ignore", message=".*(LeafSpec|predict returned None|GPU available but not used).*"
        )
        try:
            yield _Terminable()
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            # Lightning turns Ctrl-C off and exits with 1; a sweep and the record must see what it
            # was.
            signal.signal(signal.SIGINT, interrupt)
            raise KeyboardInterrupt from error


class _Tracked:
    """A sized iterable for Lightning that reports progress."""

    def __init__(self, items: Sequence[Any], label: str) -> None:
        self.items, self.label = items, label

    def __iter__(self) -> Iterator[Any]:
        return iter(track(self.items, self.label, len(self.items)))

    def __len__(self) -> int:
        return len(self.items)
