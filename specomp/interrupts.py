"""Ctrl-C ends a command, whoever catches it on the way: libraries turn it into errors of their own,
into exit codes, or lose it.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

CODE = 130  # what shells expect of a program that Ctrl-C ended
SAID = "Interrupted. Finished work is kept; the same command goes on from there."
GRACE = 3.0  # seconds that processes of a training have to end by themselves
AGAIN = 0.1  # seconds
_asked: set[int] = set()  # the process that was told to end; a fork starts without


def until_interrupted(work: Callable[[], int]) -> int:
    """What `work` returns, or 130 after one line where Ctrl-C ended it. Inside another one it is
    left to that.
    """
    if signal.getsignal(signal.SIGINT) is _hear:
        return work()
    with _listening():
        try:
            with heeded():
                return work()
        except KeyboardInterrupt:
            with _deaf():
                _end_children()
                logging.getLogger("specomp").warning(SAID)
            return CODE


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Ends in KeyboardInterrupt if Ctrl-C was pressed, whatever became of it inside."""
    try:
        yield
    finally:
        if os.getpid() in _asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Remembers Ctrl-C. Where it is ignored, as in a shell's background job, it stays ignored."""
    before, lost = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before is not signal.default_int_handler:
        yield
        return

    def not_lost(told: Any) -> None:
        """In a finalizer it would be printed and forgotten."""
        if issubclass(told.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN, _again).start()  # later: here it would be lost once more
        else:
            lost(told)

    signal.signal(signal.SIGINT, _hear)
    sys.unraisablehook = not_lost
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = lost
        _asked.clear()


def _again() -> None:
    if os.getpid() in _asked:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _hear(*_: Any) -> None:
    _asked.add(os.getpid())
    raise KeyboardInterrupt


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Impatience does not interrupt the end itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_children() -> None:
    """Processes of a training hear a terminal's Ctrl-C, but no `kill -INT` of this one alone."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(GRACE)
        if child.is_alive():
            child.kill()
            child.join(GRACE)
