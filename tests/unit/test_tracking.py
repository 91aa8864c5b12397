"""W&B: files without a network, and never a reason to stop."""

import builtins
import logging
import sys
import time
import types

import pytest
from pydantic import ValidationError

from specomp.results.record import Record
from specomp.results.tracking import NoTracking, WandbTracking

SETTINGS = {"project": "specomp", "entity": None, "group": None, "mode": "offline", "init_timeout": 5.0}
RECORD = Record(
    key="0123456789abcdef",
    status="ok",
    choices={"model": "tiny_llama", "method": "svd", "ratio": "cr40"},
    config={"seed": 0},
    ledger={"measured_retention": 0.5875, "num_linears": 21},
    metrics={"wikitext2@1": {"ppl": 14.76}},
    seconds={"compress": 1.5},
)
LINEARS = [{"name": "q", "rank": 3, "compensation_gain": None}, {"name": "k", "rank": 4, "compensation_gain": 0.5}]


class FakeRun:
    def __init__(self) -> None:
        self.logged, self.finished = [], False

    def log(self, values):
        self.logged.append(values)

    def finish(self, quiet=False):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """A wandb module that remembers what it was asked; `fails` names the modes whose init raises."""
    module = types.ModuleType("wandb")
    module.inits, module.runs, module.fails = [], [], set()

    def init(**options):
        module.inits.append(options)
        if options["mode"] in module.fails:
            raise RuntimeError("no server\nsecond line")
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.init = init
    module.Settings = lambda **options: options
    module.Table = lambda columns, data: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def no_wandb(monkeypatch):
    """Fails the test if anything imports wandb."""
    real = builtins.__import__

    def watch(name, *rest, **options):
        assert name.split(".")[0] != "wandb", "wandb was imported"
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", watch)


def test_one_run_per_record(fake):
    WandbTracking(**SETTINGS).publish(RECORD, LINEARS)
    (options,), (run,) = fake.inits, fake.runs
    assert options["id"] == RECORD.key[:12]
    assert options["resume"] == "allow", "a benchmark added later goes to the same run"
    assert options["job_type"] == "svd"
    assert options["group"] == "tiny_llama"
    assert options["name"] == "svd cr40"
    assert options["mode"] == "offline"
    assert options["config"] == {"seed": 0}
    assert options["settings"]["init_timeout"] == 5.0
    summary, table = run.logged
    assert summary == {"wikitext2@1/ppl": 14.76, "seconds/compress": 1.5, "measured_retention": 0.5875}
    assert table["linears"] == {"columns": ["name", "rank", "compensation_gain"], "data": [["q", 3, None], ["k", 4, 0.5]]}
    assert run.finished


def test_a_group_of_ones_own(fake):
    WandbTracking(**SETTINGS | {"group": "table 1"}).publish(RECORD, [])
    assert fake.inits[0]["group"] == "table 1"
    assert len(fake.runs[0].logged) == 1, "no table without linears"


def test_online_falls_back_to_offline_with_one_line(fake, caplog):
    fake.fails = {"online"}
    WandbTracking(**SETTINGS | {"mode": "online"}).publish(RECORD, LINEARS)
    assert [x["mode"] for x in fake.inits] == ["online", "offline"]
    assert fake.runs[0].finished
    (line,) = [x.getMessage() for x in caplog.records]
    assert "W&B (online) failed: no server" in line
    assert "\n" not in line


def test_nothing_works_and_nothing_is_raised(fake, caplog):
    fake.fails = {"online", "offline"}
    WandbTracking(**SETTINGS | {"mode": "online"}).publish(RECORD, LINEARS)
    assert [x["mode"] for x in fake.inits] == ["online", "offline"]
    assert len(caplog.records) == 2
    assert all(x.levelno == logging.WARNING for x in caplog.records)
    assert fake.runs == []


def test_offline_is_tried_once(fake):
    fake.fails = {"offline"}
    WandbTracking(**SETTINGS).publish(RECORD, [])
    assert len(fake.inits) == 1


def test_a_failure_in_the_middle_closes_the_run(fake, caplog, monkeypatch):
    def fail(self, values):
        raise OSError

    monkeypatch.setattr(FakeRun, "log", fail)
    WandbTracking(**SETTINGS).publish(RECORD, LINEARS)
    assert fake.runs[0].finished
    assert "OSError()" in caplog.text


def test_without_the_package_a_warning_is_all(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb -> ImportError
    WandbTracking(**SETTINGS).publish(RECORD, LINEARS)
    assert "wandb" in caplog.text
    assert "The record itself is complete" in caplog.text


def test_ctrl_c_is_not_swallowed(fake, monkeypatch):
    def interrupt(self, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRun, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WandbTracking(**SETTINGS).publish(RECORD, LINEARS)
    assert fake.runs[0].finished


def test_disabled_and_none_import_nothing(no_wandb, caplog):
    WandbTracking(**SETTINGS | {"mode": "disabled"}).publish(RECORD, LINEARS)
    NoTracking().publish(RECORD, LINEARS)
    assert caplog.records == []


def test_the_watch_notices_an_import(no_wandb, caplog):
    WandbTracking(**SETTINGS).publish(RECORD, LINEARS)
    assert "wandb was imported" in caplog.text


@pytest.mark.parametrize("wrong", [{"mode": "sometimes"}, {"init_timeout": 0}, {"unknown": 1}, {"project": None}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        WandbTracking(**SETTINGS | wrong)


def test_offline_writes_local_files_without_a_network(tmp_path, monkeypatch, caplog):
    """The real package: a run folder appears that `wandb sync` could upload, and no warning is logged."""
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    WandbTracking(**SETTINGS | {"init_timeout": 60.0}).publish(RECORD, LINEARS)
    (written,) = tmp_path.glob(f"wandb/offline-run-*-{RECORD.key[:12]}/run-{RECORD.key[:12]}.wandb")
    deadline = time.monotonic() + 30  # W&B's own process writes the file, at times after `finish` has returned
    while b"wikitext2@1/ppl" not in written.read_bytes():
        assert time.monotonic() < deadline, f"only {written.stat().st_size} bytes were written"
        time.sleep(0.05)
    assert not [x for x in caplog.records if x.name.startswith("specomp")]
