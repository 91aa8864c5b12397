"""The kit for 7B: its plans from published shapes, and a rehearsal of its commands."""

import importlib.util
import os
import subprocess
import sys

import pytest
from running import ROOT

SCRIPT = ROOT / "experiments" / "reproduce_7b" / "reproduce.py"


@pytest.fixture(scope="module")
def kit():
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reproduce"]


def rows(text):
    """Of a plan, by table."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    return {name: more for name, *more in cells[2:]}


def test_a_plan_counts_shared_work_once(kit, tmp_path, monkeypatch):
    """Of the same six jobs twice the second table costs nothing."""
    monkeypatch.setenv("SPECOMP_CACHE", str(tmp_path))
    monkeypatch.setenv("SPECOMP_DATA", str(tmp_path))
    small = ["model=tiny_llama", "calibration=tiny", "benchmark=none", "ratio=cr40"]
    done = kit.Done()
    costs = [kit.cost_of(kit.requests("adasvd_table3a", small, "a100"), "a100", done) for _ in "ab"]
    assert [x.jobs for x in costs] == [2, 2]
    assert costs[0].seconds > 0 and costs[1].seconds == 0
    assert costs[0].cached > 0 and costs[1].cached == 0


def test_a_plan_of_the_papers_model(kit, tmp_path, monkeypatch):
    """Published shapes; neither weights nor texts are read."""
    monkeypatch.setenv("SPECOMP_CACHE", str(tmp_path))
    told = kit.planned([["adasvd_table3a", "ratio=cr60", "benchmark=wikitext2", *kit.HALF]], "h100")
    jobs, hours, memory, folders, cache = rows(told)["adasvd_table3a"]
    assert jobs == "2" and 0.1 < float(hours) < 5
    assert memory.endswith("GiB") and 13 < float(memory.split()[0]) < 80
    assert folders == "0 MiB" and cache.endswith("GiB")
    assert "one H100" in told


def test_what_does_not_exist_is_refused(kit, capsys):
    with pytest.raises(SystemExit):
        kit.main(["adasvd", "--tables", "adasvd_table9"])
    assert "adasvd_table9: there are adasvd_table1" in capsys.readouterr().err
    for wrong in ("nonsense=1", "method=foo"):
        assert kit.main(["adasvd", "--tables", "adasvd_table3a", "--plan", "h100", wrong]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("reproduce.py: ") and wrong.split("=")[0] in line


def rehearsed(tmp_path, *arguments):
    places = {"SPECOMP_OUTPUTS": str(tmp_path / "out"), "SPECOMP_CACHE": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=ROOT,
        env={**os.environ, **places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_table_is_rehearsed_and_then_found(tmp_path):
    """Two jobs on a tiny model, their table and report; again, nothing is left to do."""
    arguments = ["adasvd", "--rehearse", "--tables", "adasvd_table3a", "ratio=cr40"]
    done = rehearsed(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "out" / "reproduce_7b" / "adasvd_table3a"
    assert "Missing" not in (folder / "table.md").read_text()
    assert (folder / "report.html").is_file()
    again = rehearsed(tmp_path, *arguments)
    assert again.returncode == 0 and "is complete" in again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["adasvd", "soco"])
def test_every_command_is_rehearsed(kit, tmp_path, paper):
    done = rehearsed(tmp_path, paper, "--rehearse")
    assert done.returncode == 0, done.stderr[-2000:]
    for name, *_ in kit.PAPERS[paper]:
        table = tmp_path / "out" / "reproduce_7b" / name / "table.md"
        assert "Missing" not in table.read_text()
