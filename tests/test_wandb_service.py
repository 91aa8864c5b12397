"""The real W&B package in a process of its own, as a sweep uses it: without a key, without a
server, with one that goes away.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_server import Server, stored

pytest.importorskip("wandb")
SETTINGS = {
    "project": "specomp",
    "entity": None,
    "group": None,
    "mode": "online",
    "init_timeout": 2.0,
    "finish_timeout": 2.0,
}
# Works through its arguments: `train KEY` begins the run of a record, `publish KEY` shows the
# record, `pause` waits for a line.
CHILD = """
import json, logging, sys, time
from ledgers import made_ledger
from specomp.experiment.record import Record
from specomp.experiment.tracking import WandbTracking

logging.basicConfig()
tracking = WandbTracking(**json.loads(sys.argv[1]))
for step in sys.argv[2:]:
    name, _, key = step.partition(" ")
    record = Record(
        key=key, status="ok", choices={"model": "tiny_llama", "method": "svd", "ratio": "cr40"},
        config={"table": {"caption": "Table 1"}},
        ledger=made_ledger(measured_retention=0.5875, compressed={"model_bytes": 172608}),
        metrics={"wikitext2@1": {"ppl": 14.75}}, seconds={"compress": 1.5},
    )
    start = time.monotonic()
    if name == "train":
        tracking.training_logger(record).log_metrics({"train/kl": 0.25}, step=1)
    if name == "publish":
        rows = [("q", 3, None), ("k", 4, 0.5)]
        names = ("name", "rank", "compensation_gain")
        tracking.publish(record, [dict(zip(names, x)) for x in rows])
    if name == "pause":
        print("pausing", flush=True)
        sys.stdin.readline()
    print(f"{step}: {time.monotonic() - start}", flush=True)
print("the sweep is done", flush=True)
"""
GROUP = "Table 1"


def environment(home: Path, **variables: str) -> dict[str, str]:
    """This one, without what it knows of W&B and of proxies, and another home."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("WANDB") and "proxy" not in k.lower()
    }
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parent, here)))
    kept |= {"HOME": str(home), "PYTHONPATH": path, "WANDB_HTTP_TIMEOUT": "1"}
    return kept | variables


def start(folder: Path, *steps: str, **variables: str) -> subprocess.Popen:
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | {"folder": str(folder / "outputs")}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(settings), *steps],
        cwd=home,
        env=environment(home, **variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def seconds(told: str, step: str) -> float:
    return next(
        float(line.rpartition(":")[2]) for line in told.splitlines() if line.startswith(f"{step}:")
    )


def ended(process: subprocess.Popen, *, within: float) -> str:
    """What it said; it must have ended well and in time."""
    begun = time.monotonic()
    told, _ = process.communicate("\n", timeout=within)
    assert process.returncode == 0, told
    assert "the sweep is done" in told
    assert time.monotonic() - begun < within
    return told


def runs(folder: Path, kind: str = "offline-run") -> dict[str, Path]:
    return {
        path.parent.name.rpartition("-")[2]: path
        for path in sorted(folder.glob(f"outputs/wandb/{kind}-*/*.wandb"))
    }


def content(path: Path) -> tuple[dict, dict, list]:
    """(about, all that was logged, artifacts) of a run's file."""
    about, logged, artifacts = {}, {}, []
    for record in stored(path):
        if record.HasField("run"):
            run = record.run
            about = {
                "id": run.run_id,
                "group": run.run_group,
                "job_type": run.job_type,
                "name": run.display_name,
                "project": run.project,
            }
            about["config"] = {x.key: json.loads(x.value_json) for x in run.config.update}
        if record.HasField("history"):
            logged |= {
                "/".join(x.nested_key): json.loads(x.value_json) for x in record.history.item
            }
        if record.HasField("artifact"):
            artifacts.append((record.artifact.type, record.artifact.name))
    return about, logged, artifacts


def check_stored(path: Path, key: str) -> None:
    about, logged, artifacts = content(path)
    config = about.pop("config")
    assert about == {
        "id": key,
        "group": GROUP,
        "job_type": "svd",
        "name": "tiny_llama svd cr40",
        "project": "specomp",
    }
    assert config["table"] == {"caption": GROUP}
    assert logged["wikitext2@1/ppl"] == 14.75
    assert logged["measured_retention"] == 0.5875
    assert logged["model_bytes"] == 172608
    assert logged["linears/_type"] == "table-file"
    table = json.loads((path.parent / "files" / logged["linears/path"]).read_text())
    assert table["columns"] == ["name", "rank", "compensation_gain"]
    assert artifacts == [("run_table", f"run-{key}-linears")]
    assert table["data"] == [["q", 3, None], ["k", 4, 0.5]]


@pytest.fixture(scope="module")
def without_key(tmp_path_factory) -> Path:
    """Two records shown online by someone without a key, who sits at a terminal where W&B would
    ask.
    """
    folder = tmp_path_factory.mktemp("no_key")
    (folder / "home").mkdir()
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    settings = SETTINGS | {"folder": str(folder / "outputs")}
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD,
            json.dumps(settings),
            "publish aaaaaaaaaaaa",
            "publish bbbbbbbbbbbb",
        ],
        cwd=folder / "home",
        env=environment(folder / "home"),
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    try:
        told, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0, said
    assert "the sweep is done" in told
    assert said.count("no API key") == 1, said
    assert "Enter your choice" not in said
    return folder


def test_without_a_key_everything_is_stored(without_key):
    found = runs(without_key)
    assert list(found) == ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]
    for key, path in found.items():
        check_stored(path, key)


def test_files_are_under_the_outputs_only(without_key):
    home = {
        p.relative_to(without_key / "home").parts[0]
        for p in (without_key / "home").rglob("*")
        if p.is_file()
    }
    assert home <= {".cache"}, "the current folder and the home folder keep nothing but a log"
    assert any((without_key / "outputs" / "wandb" / "artifacts").rglob("*")), (
        "what the table's artifact holds until it is uploaded"
    )


def test_what_was_stored_is_uploaded_by_wandb_sync(without_key):
    """The command that the warning and the README name."""
    paths = [str(path.parent) for path in runs(without_key).values()]
    with Server() as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "x" * 40}
        command = [sys.executable, "-m", "wandb", "sync", *paths]
        home = without_key / "home"
        done = subprocess.run(
            command,
            cwd=home,
            env=environment(home, **variables),
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert set(server.runs) == {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
        for run in server.runs.values():
            assert (run["groupName"], run["jobType"], run["project"]) == (GROUP, "svd", "specomp")
        assert [x["wikitext2@1/ppl"] for x in server.history if "wikitext2@1/ppl" in x] == [
            14.75,
            14.75,
        ]
        assert sum("linears" in x for x in server.history) == 2
        assert server.artifacts, "the table is an artifact as well"


@pytest.mark.parametrize("kind", ["closed", pytest.param("silent", marks=pytest.mark.slow)])
def test_without_a_server_a_sweep_waits_once_and_stores_everything(tmp_path, kind):
    """closed: nothing listens. silent: something does and never answers."""
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if kind == "silent":
            listening.listen(50)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        process = start(
            tmp_path,
            "publish aaaaaaaaaaaa",
            "publish bbbbbbbbbbbb",
            WANDB_BASE_URL=url,
            WANDB_API_KEY="x" * 40,
        )
        told = ended(process, within=120)
    assert told.count("W&B (online) failed") == 1
    assert "W&B (offline) failed" not in told
    assert seconds(told, "publish bbbbbbbbbbbb") < SETTINGS["init_timeout"] + 5
    found = runs(tmp_path)
    assert list(found) == ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]
    for key, path in found.items():
        check_stored(path, key)


def test_a_server_that_goes_away_in_the_middle(tmp_path):
    """One record while it is there; it goes while the next is being trained; a third finds
    it gone.
    """
    with Server() as server:
        steps = [
            "train aaaaaaaaaaaa",
            "publish aaaaaaaaaaaa",
            "train bbbbbbbbbbbb",
            "pause",
            "publish bbbbbbbbbbbb",
            "publish cccccccccccc",
        ]
        process = start(tmp_path, *steps, WANDB_BASE_URL=server.url, WANDB_API_KEY="x" * 40)
        before = ""
        while "pausing" not in before:
            line = process.stdout.readline()
            assert line, before
            before += line
    told = before + ended(process, within=120)
    first = server.runs["aaaaaaaaaaaa"]
    assert (first["groupName"], first["jobType"], first["displayName"]) == (
        GROUP,
        "svd",
        "tiny_llama svd cr40",
    )
    assert json.loads(first["config"])["table"] == {"value": {"caption": GROUP}}
    assert [x for x in server.history if "train/kl" in x][0]["train/kl"] == 0.25
    last = next(x for x in server.summaries if "linears" in x)
    assert (last["wikitext2@1/ppl"], last["train/kl"]) == (
        14.75,
        0.25,
    ), "the training and the record are one run"
    assert list(runs(tmp_path)) == ["bbbbbbbbbbbb", "cccccccccccc"], "what did not arrive is stored"
    for key, path in runs(tmp_path).items():
        check_stored(path, key)
    assert told.count("W&B (online) failed") == 1
    # A table asks the server before it is logged, and the end of the run waits for it: both have
    # limits.
    assert seconds(told, "publish bbbbbbbbbbbb") < 60
    assert seconds(told, "publish cccccccccccc") < 10
