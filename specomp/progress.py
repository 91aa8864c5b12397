"""Progress of long stages: a rich bar with ETA on a terminal, a plain line every few seconds
elsewhere (logs, CI, pipes).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from specomp.profiling import profiles

log = logging.getLogger(__name__)
T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0
console = Console(stderr=True)


def track(
    items: Iterable[T],
    description: str,
    total: int,
    status: Callable[[], str] = lambda: "",
    *,
    traced: bool = True,
) -> Iterator[T]:
    """Yield the items, reporting how many of `total` are done, how long the rest will take, and
    what `status` says.

    traced: with profile=true, by torch's profiler, which slows them down.
    """
    # of several processes one reports
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        yield from items
        return
    items = profiles.steps(items, description, total) if traced else items
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total, status="")
            for item in items:
                yield item
                bar.update(task, advance=1, status=status())
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= LINE_EVERY_SECONDS:
            last = now
            elapsed = now - start
            left = elapsed / done * (total - done)
            said = status()
            log.info(
                "%s: %d/%d, %.0f s elapsed, about %.0f s left%s",
                description,
                done,
                total,
                elapsed,
                left,
                said and f"; {said}",
            )
