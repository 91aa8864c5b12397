"""`python run.py ...` in a process of its own, with cache and outputs in a folder of the test's
own.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from running import ROOT


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
