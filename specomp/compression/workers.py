"""Work on the units of a model side by side: in threads where products fill the time, in processes
where many small steps do.
"""

import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from specomp.compression.run import Run
from specomp.models.family import LinearSpec, Unit
from specomp.profiling import profiles

# Largest min(m, n) of a decoder layer whose linears are worked on side by side.
SMALL = 1024
POLL = 0.02  # seconds between two looks for what a process has done


def workers(run: Run) -> int:
    """How many of them work on a decoder layer on a CPU: large linears fill all threads one after
    the other.
    """
    layer = [x for x in run.linears if x.decoder_layer == 0]
    return min(torch.get_num_threads(), len(layer)) if small(layer) else 1


def small(linears: Iterable[LinearSpec]) -> bool:
    """Whether linears of a decoder layer are worked on side by side."""
    return max(min(x.m, x.n) for x in linears) <= SMALL


@contextmanager
def one_thread_each(
    units: Sequence[Unit], device: torch.device
) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over the units of a decoder layer: side by side on a CPU where they are small, one
    after the other elsewhere.

    Small eigenproblems do not fill several threads (two of 576 at once on two cores: 12 % faster
    than one after the other on both, and everything around them overlaps); those of large models
    do. The longest start first: the last linear of a decoder layer is often the longest, and
    everyone would wait for it (a fifth of the time of SmolLM2). Results keep the order of the
    units.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not small(x for y in units for x in y.linears):
        yield map
        return
    try:
        with ThreadPoolExecutor(
            min(threads, len(units)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:

            def longest_first(work: Callable[[Unit], Any], units: Sequence[Unit]) -> Iterable[Any]:
                ordered = sorted(
                    units, key=lambda x: (x.params, max(y.n for y in x.linears)), reverse=True
                )
                done = dict(zip(ordered, pool.map(work, ordered), strict=True))
                return [done[x] for x in units]

            yield longest_first
    finally:
        torch.set_num_threads(threads)


def by_layer(run: Run) -> Callable[..., Iterable[Any]]:
    """A `map` over units in the order of the model: decoder layer by decoder layer, those of one
    side by side where they are in memory and small.
    """
    if run.store is not None:
        return map
    if forks(run):
        return lambda work, units: foretold(run, work, units)

    def each(work: Callable[[Unit], Any], units: Sequence[Unit]) -> Iterator[Any]:
        for index, group in groupby(units, key=lambda x: x.decoder_layer):
            here = list(group)
            with one_thread_each(here, run.device(index)) as side_by_side:
                yield from side_by_side(work, here)

    return each


def forks(run: Run) -> bool:
    """Whether what is remembered of units is made by processes: trials of grids are so many small
    steps that two threads take as long as one, each waiting for the interpreter's lock (SmolLM2's
    layer: 79 s on two cores, 80 s on one).
    """
    return (
        len(run.method.rounding.grids) > 1
        and workers(run) > 1
        and sys.platform == "linux"  # elsewhere a fork of a process with threads is not safe
        and all(run.device(x).type == "cpu" for x in range(len(run.layers)))
        and not (dist.is_available() and dist.is_initialized())
        and not multiprocessing.current_process().daemon  # which may have no children
        and profiles.folder is None
    )


def foretold(run: Run, work: Callable[[Unit], Any], units: Sequence[Unit]) -> Iterator[Any]:
    """A `map` over units whose work leaves what takes time in the cache: forked processes do it
    first, one thread each; this one then finds it there. What a process could not do, this one
    does, and fails at itself. They start at once, before anybody draws a bar from a thread.
    """
    fork, cache = multiprocessing.get_context("fork"), run.cache
    turn, done, parent = fork.Value("l", 0), fork.SimpleQueue(), os.getpid()

    def ahead() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that forked ends them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logging.disable()  # it says everything itself; a handler's lock may not be free here
        torch.set_num_threads(1)
        while True:
            with turn.get_lock():
                index, turn.value = turn.value, turn.value + 1
            if index >= len(units) or os.getppid() != parent:  # which was killed
                return
            cache.hits, cache.misses = {}, {}
            try:
                work(units[index])
            except Exception:
                done.put((index, None))
            else:
                done.put((index, (cache.hits, cache.misses)))

    count = min(workers(run), len(units))
    processes = [fork.Process(target=ahead, daemon=True) for _ in range(count)]
    with warnings.catch_warnings():  # Python 3.12 on: that this one has threads
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        for process in processes:
            process.start()

    def found() -> Iterator[Any]:
        counts: dict[int, tuple[dict[str, int], dict[str, int]] | None] = {}
        try:
            for index, unit in enumerate(units):
                while index not in counts:
                    alive = any(x.is_alive() for x in processes)  # asked before the last look
                    while not done.empty():
                        counts.update([done.get()])
                    if not alive:
                        counts.setdefault(index, None)
                    if index not in counts:
                        time.sleep(POLL)
                made = counts[index]
                if made is None:
                    yield work(unit)
                else:
                    with cache.counted_as(*made):
                        result = work(unit)
                    yield result
        finally:
            for process in processes:
                process.terminate()
                process.join()

    return found()
