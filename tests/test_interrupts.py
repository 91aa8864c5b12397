"""Ctrl-C ends a command: exit code 130, one line, no traceback, nothing left running."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from command import start

from specomp.interrupts import CODE, SAID, heeded, until_interrupted


@pytest.fixture(autouse=True)
def heard():
    """A shell's background jobs start with Ctrl-C ignored, and so does pytest in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def swallowed() -> int:
    with contextlib.suppress(BaseException):
        press()
    return 0


def turned_into(error: BaseException):
    def work() -> int:
        try:
            press()
        except KeyboardInterrupt:
            raise error from None
        return 0

    return work


def in_a_finalizer() -> int:
    class Noisy:
        def __del__(self) -> None:
            press()

    Noisy()
    time.sleep(1)  # at its end at the latest
    return 0


WAYS = {
    "as it is": lambda: press() or 0,
    "swallowed": swallowed,
    "Lightning's exit code": turned_into(SystemExit(1)),
    "an import that fails": turned_into(ImportError("half imported")),
    "a job of a sweep": lambda: sum(swallowed() for _ in range(3)),
    "lost in a finalizer": in_a_finalizer,
}


@pytest.mark.parametrize("work", WAYS.values(), ids=WAYS)
def test_it_is_heeded_whatever_became_of_it(caplog, work):
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    began = time.monotonic()
    assert until_interrupted(work) == CODE and time.monotonic() - began < 10
    assert [x.message for x in caplog.records] == [SAID]
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_a_job_that_swallowed_it_is_the_last():
    jobs = []

    def work() -> int:
        for number in range(3):
            with heeded():
                jobs.append(number)
                swallowed()
        return 0

    assert until_interrupted(work) == CODE and jobs == [0]


def test_what_is_not_interrupted_is_left_alone():
    assert until_interrupted(lambda: 7) == 7
    with pytest.raises(ValueError, match="other"):
        until_interrupted(turned_into_nothing)
    assert until_interrupted(lambda: 0) == 0, "of an earlier one nothing is left"


def turned_into_nothing() -> int:
    raise ValueError("other")


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert until_interrupted(lambda: press() or 3) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_of_its_own_are_ended():
    children = []

    def work() -> int:
        children.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)))
        children[0].start()
        press()
        return 0

    began = time.monotonic()
    assert until_interrupted(work) == CODE
    assert not children[0].is_alive() and time.monotonic() - began < 10


TRAINING = ["method=soco", "method.training.steps_factor=50", "save=false"]
TWO = ["trainer=ddp_cpu", "method.training.batch_size=2", "method.training.micro_batch_size=1"]
MOMENTS = {
    "imports": (["method=svd"], "", 2.0),
    "training": (TRAINING, "Train ", 1.0),
    "training of two processes": ([*TRAINING, *TWO], "Train ", 4.0),
    "between jobs": (["-m", "method=svd,asvd", "ratio=cr20,cr40,cr60"], "#1", 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "until", "more"), MOMENTS.values(), ids=MOMENTS)
def test_in_a_process_of_its_own(tmp_path, words, until, more):
    process = start(tmp_path, *words, f"+x={tmp_path.name}")
    said = ""
    while until not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    time.sleep(more)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    told = said + out + err
    assert process.returncode == CODE, told
    assert "Traceback" not in told and told.count(SAID) == 1
    there = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"+x={tmp_path.name}" not in there, "its processes have its command line"
