"""The notebooks run from start to end, and the two forms of each are the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(script: Path) -> list[tuple[str, str]]:
    """(kind, source) of a percent script."""
    text = script.read_text()
    parts = re.split(r"^# %%( \[markdown\])?\n", text[text.index("# %%") :], flags=re.M)[1:]
    found = []
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        lines = body.rstrip("\n").split("\n")
        found.append(
            ("markdown", "\n".join(x[2:] if x != "#" else "" for x in lines))
            if marker
            else ("code", "\n".join(lines))
        )
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_script_and_notebook_are_the_same(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    assert [(x["cell_type"], "".join(x["source"])) for x in notebook["cells"]] == cells(script)
    assert not any(x.get("outputs") for x in notebook["cells"]), "outputs are not committed"


@pytest.mark.real
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_runs(script, tmp_path):
    environment = os.environ | {
        "SPECOMP_CACHE": str(tmp_path / "cache"),
        "SPECOMP_OUTPUTS": str(tmp_path / "outputs"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
