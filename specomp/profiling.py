"""debug=profile: what a few steps of every long stage spend their time on, by torch's profiler.

Whatever reports progress (specomp.progress.track) is traced, but for what measures time itself: the
first step warms up, the next three are recorded. For each there are
    NN_NAME.json.gz  a trace for Perfetto or chrome://tracing, with stacks and shapes
    NN_NAME.stacks   one line per stack with its microseconds: for flamegraph.pl, speedscope
    NN_NAME.txt      operators by their own time
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger(__name__)
T = TypeVar("T")
RECORDED = 3
ROWS = 40


class Profiles:
    """Where traces go; nowhere unless `into` is open."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._count = 0  # of stages, in the order they ran
        self._busy = False  # torch traces one thing at a time

    @contextmanager
    def into(self, folder: Path | None) -> Iterator[None]:
        """While it is open, stages are traced into `folder`; None: they are not."""
        before, self.folder, self._count = self.folder, folder, 0
        try:
            yield
        finally:
            self.folder = before

    def steps(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        """The items, what happens between them traced."""
        if self.folder is None or self._busy:
            yield from items
            return
        self._busy, self._count = True, self._count + 1
        path = (
            self.folder
            / f"{self._count:02d}_{re.sub(r'[^0-9A-Za-z]+', '_', description).strip('_')}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        # without it stacks come out empty
        verbose = torch._C._profiler._ExperimentalConfig(verbose=True)
        try:
            with profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=min(1, total - 1), active=RECORDED, repeat=1),
                on_trace_ready=lambda trace: _write(trace, path),
                record_shapes=True,
                with_stack=True,
                experimental_config=verbose,
            ) as running:
                for item in items:
                    yield item
                    running.step()
        finally:
            self._busy = False


profiles = Profiles()


def _write(trace: profile, path: Path) -> None:
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    trace.export_chrome_trace(f"{path}.json.gz")
    trace.export_stacks(f"{path}.stacks", sort)
    _collapse(Path(f"{path}.stacks"))
    Path(f"{path}.txt").write_text(trace.key_averages().table(sort_by=sort, row_limit=ROWS))
    log.info("Profile of %d steps: %s.{json.gz,stacks,txt}", RECORDED, path)


def _collapse(path: Path) -> None:
    """Every stack once: torch writes one line per event, a hundred times as much."""
    microseconds: Counter[str] = Counter()
    with path.open() as file:
        for line in file:
            stack, _, spent = line.rpartition(" ")
            microseconds[stack] += int(spent)
    path.write_text("".join(f"{stack} {spent}\n" for stack, spent in microseconds.items()))
