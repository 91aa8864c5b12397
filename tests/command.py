"""`python run.py ...` in a process of its own, with cache and outputs in a folder of the test's
own.
"""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

from hydra.core.global_hydra import GlobalHydra
from running import ROOT

from specomp.cli import run
from specomp.experiment import logs


def start(folder: Path, *typed: str) -> subprocess.Popen[str]:
    """Start it, one thread, offline."""
    environment = os.environ | {
        "SPECOMP_OUTPUTS": str(folder / "outputs"),
        "SPECOMP_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    line = [sys.executable, str(ROOT / "run.py"), "debug=tiny", *typed]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=folder, env=environment, preexec_fn=hear_ctrl_c, **pipes)


def hear_ctrl_c() -> None:
    """A shell's background jobs start with it ignored, and so does all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for it; one that takes too long does not go on behind the test's back."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def command(folder: Path, *typed: str) -> subprocess.CompletedProcess[str]:
    """`python run.py debug=tiny ...` from start to end."""
    return finish(start(folder, *typed))


def typed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What `python run.py ...` does and prints, in this process: seconds less. The process is left
    as it was: working folder, environment, logging.
    """
    line = ["run.py", *words]
    places = {"SPECOMP_OUTPUTS": str(folder / "outputs"), "SPECOMP_CACHE": str(folder / "cache")}
    root, out, err, code = logging.getLogger(), io.StringIO(), io.StringIO(), 0
    before = root.level, root.handlers[:]
    root.handlers[:] = []
    with (
        mock.patch.dict(os.environ, places),
        mock.patch.object(sys, "argv", line),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            code = run(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            err.write("" if isinstance(ended.code, int) else f"{ended.code}\n")
        finally:
            root.setLevel(before[0])
            root.handlers[:] = before[1]
            logs.sweeps.clear()
            GlobalHydra.instance().clear()
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())
