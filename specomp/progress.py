"""Progress of long stages: a rich bar with ETA on a terminal, a plain line every few seconds elsewhere (logs, CI, pipes)."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0
console = Console(stderr=True)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items, reporting how many of `total` are done and how long the rest will take."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=description)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= LINE_EVERY_SECONDS:
            last = now
            elapsed = now - start
            log.info("%s: %d/%d, %.0f s elapsed, about %.0f s left", description, done, total, elapsed, elapsed / done * (total - done))
