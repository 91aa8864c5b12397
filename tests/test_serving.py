"""vLLM gets what transformers gets: the script that `make serving` runs, on a few of its folders.

SPECOMP_VLLM names the Python of an environment with vLLM.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

VLLM = os.environ.get("SPECOMP_VLLM")
SCRIPT = Path(__file__).parent.parent / "experiments" / "serving" / "compare.py"


def compare(*typed):
    return subprocess.run(
        [sys.executable, SCRIPT, *typed], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="SPECOMP_VLLM names no Python with vLLM (make serving)")
@pytest.mark.parametrize("name", ["pivoted", "cut", "gated", "opt_cut"])
def test_vllm_generates_what_transformers_does(name):
    done = compare(VLLM, name)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    same, ties, differ = done.stdout.splitlines()[2].split("|")[2:5]
    assert int(same) + int(ties) == 20 and int(differ) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "said"),
    [(("/nowhere/python",), "make serving"), ((sys.executable, "x"), "there is no folder 'x'")],
)
def test_what_is_missing_is_one_line(typed, said):
    done = compare(*typed)
    assert done.returncode != 0 and said in done.stderr.splitlines()[-1]
