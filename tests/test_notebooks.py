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
MOST_BYTES = 150_000
MACHINE = re.compile(r"/(?:work|tmp|root|home|Users|private|usr|opt)/|site-packages")


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


def test_every_notebook_has_a_script():
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    assert sorted(x.with_suffix(".py") for x in notebooks) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_outputs_are_committed_and_small(script):
    """Of one run from start to end, figures included; nothing in them is of the machine."""
    path = script.with_suffix(".ipynb")
    content = json.loads(path.read_text())["cells"]
    ran = [x for x in content if x["cell_type"] == "code"]
    assert [x["execution_count"] for x in ran] == list(range(1, len(ran) + 1))
    outputs = [output for x in ran for output in x["outputs"]]
    kinds = {x["output_type"] for x in outputs}
    assert "error" not in kinds
    assert not [x for x in outputs if x.get("name") == "stderr"]
    assert any("image/png" in x.get("data", {}) for x in outputs), "no figure"
    assert path.stat().st_size < MOST_BYTES
    texts = [{k: v for k, v in x.get("data", x).items() if k != "image/png"} for x in outputs]
    assert not MACHINE.findall(json.dumps(texts))


@pytest.mark.real
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_runs(script, tmp_path):
    environment = os.environ | {
        "SPECOMP_CACHE": str(tmp_path / "cache"),
        "SPECOMP_OUTPUTS": str(tmp_path / "outputs"),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
