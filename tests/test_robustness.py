"""Stopped, killed, run twice at once: what is finished stays, what is not is done by the same
command.
"""

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from command import finish, start
from running import compose_config, key_of, store, trainer_factory
from safetensors import safe_open

from specomp.compression.module import CalibrationOnlyModule, lightning_loop
from specomp.experiment.pipeline import run
from specomp.tables.paper import paper_table
from specomp.tables.sweep import load_sweep

METHODS, RATIOS = ("svd", "svd_llm", "asvd"), ("cr20", "cr60")
SWEEP = [f"method={','.join(METHODS)}", f"ratio={','.join(RATIOS)}", "options.save=false", "-m"]


def stop_when(
    process: subprocess.Popen[str], condition: Callable[[], bool], number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Send a signal as soon as the condition holds."""
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    return finish(process)


def finished(folder: Path) -> dict[str, str]:
    """Key -> time of every compressed model whose record is complete."""
    records = [
        x for x in store(folder).all() if x.status == "ok" and x.choices["method"] != "dense"
    ]
    assert all(x.ledger and x.metrics and x.dense_metrics for x in records)
    return {x.key: x.provenance["time"] for x in records}


def whole(folder: Path) -> None:
    """Every record and every cache entry under its final name can be read."""
    for path in (folder / "outputs" / "records").glob("*.json"):
        json.loads(path.read_text())
    for path in (folder / "cache").rglob("[!.]*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["checksum"]


def go_on(folder: Path) -> None:
    """The rest of the sweep, in this process; what was finished keeps its record."""
    before = finished(folder)
    for method in METHODS:
        for ratio in RATIOS:
            assert (
                run(
                    compose_config(
                        folder, f"method={method}", f"ratio={ratio}", "options.save=false"
                    )
                )
                is not None
            )
    after = finished(folder)
    assert len(after) == len(METHODS) * len(RATIOS)
    assert before.items() <= after.items()


def test_ctrl_c_in_the_middle_of_a_sweep(tmp_path):
    done = stop_when(start(tmp_path, *SWEEP), lambda: bool(finished(tmp_path)), signal.SIGINT)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr + done.stdout
    assert (
        done.stdout.count(
            "Interrupted. Finished work is kept; the same command goes on from there."
        )
        == 1
    )
    assert 1 <= len(finished(tmp_path)) < len(METHODS) * len(RATIOS)
    assert {x.status for x in store(tmp_path).all()} <= {"ok", "running"}
    whole(tmp_path)
    go_on(tmp_path)


def test_killed_while_statistics_are_written(tmp_path):
    sweep = ["method=svd_llm,svd,asvd", *SWEEP[1:]]
    done = stop_when(
        start(tmp_path, *sweep),
        lambda: (tmp_path / "cache" / "statistics").exists(),
        signal.SIGKILL,
    )
    assert done.returncode == -signal.SIGKILL
    whole(tmp_path)
    go_on(tmp_path)


def test_killed_experiment_ends_with_the_same_table(tmp_path):
    """SIGKILL in the middle of a paper's table, and the same command again: only the point that was
    under way is done twice.
    """
    typed = ["debug=tiny", "ratio=cr40,cr60", "benchmark=tiny", "save=false"]
    killed, whole_run = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole_run):
        folder.mkdir()
    line = ["experiment=adasvd_table3a", *typed, "-m"]
    assert (
        stop_when(start(killed, *line), lambda: bool(finished(killed)), signal.SIGKILL).returncode
        == -signal.SIGKILL
    )
    before = finished(killed)
    assert 1 <= len(before) < 4
    whole(killed)
    for folder in (killed, whole_run):
        done = finish(start(folder, *line))
        assert done.returncode == 0, done
    after = finished(killed)
    assert len(after) == 4 and before.items() <= after.items(), "finished points are not run again"
    tables = [
        paper_table(load_sweep(["adasvd_table3a", *typed], store(x).all()), "csv")
        for x in (killed, whole_run)
    ]
    assert tables[0] == tables[1]
    assert done.stdout.count("calibrate gram") == 1, "one pass for every point that needs it"


def test_three_processes_at_once(tmp_path):
    """Twice the same job: the second waits, then finds the record complete. Another method: shares
    the statistics and the spectra.
    """
    jobs = [
        start(tmp_path, f"method={x}", "options.save=false")
        for x in ("svd_llm", "svd_llm", "svd_llm_update")
    ]
    done = [finish(x) for x in jobs]
    assert [x.returncode for x in done] == [0, 0, 0], done
    logs = "".join(x.stdout for x in done)
    assert logs.count("calibrate gram, decoder layers") == 1
    assert logs.count("is complete.") == 1
    records = [x for x in store(tmp_path).all() if x.choices["method"] != "dense"]
    assert [x.status for x in records] == ["ok", "ok"]
    hits, misses = (
        sum((Counter(x.cache[kind]) for x in records), Counter()) for kind in ("hits", "misses")
    )
    assert (hits["statistics/gram"], misses["statistics/gram"]) == (1, 1)
    assert misses["spectra"] == 21  # each linear decomposed once
    assert records[0].dense_metrics == records[1].dense_metrics
    whole(tmp_path)


def test_cache_deleted_between_runs(tmp_path):
    """Everything in it can be made again, with the same numbers."""
    typed = ["method=svd_llm", "options.save=false"]
    first = run(compose_config(tmp_path, *typed))
    shutil.rmtree(tmp_path / "cache")
    assert run(compose_config(tmp_path, *typed)) == first  # the record needs no cache
    assert run(compose_config(tmp_path, *typed, "options.redo=true")) == first
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_interrupted_is_not_failed(tmp_path, monkeypatch):
    """Even options.retry=false goes on after Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    cfg = compose_config(tmp_path, "options.save=false", "options.retry=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibrationOnlyModule, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    record = store(tmp_path).load(key_of(cfg))
    assert record is not None and (record.status, record.error) == ("running", "interrupted")
    assert record.dense_metrics, "finished work is kept"
    assert run(cfg) is not None


def test_ctrl_c_inside_the_lightning_loop():
    """Lightning would end the process with 1 and leave Ctrl-C switched off."""

    class Interrupted(L.LightningModule):
        def predict_step(self, batch: int, batch_idx: int) -> None:
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs start with Ctrl-C ignored
    with pytest.raises(KeyboardInterrupt), lightning_loop() as terminable:
        loop = trainer_factory()(callbacks=[terminable])
        loop.predict(Interrupted(), range(3), return_predictions=False)
    assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler
