"""W&B: files without a network, and never a reason to stop."""

import builtins
import io
import logging
import sys
import threading
import types
from dataclasses import replace

import pytest
from ledgers import made_ledger
from lightning.pytorch.loggers import WandbLogger
from pydantic import ValidationError

from specomp.experiment import tracking
from specomp.experiment.record import Record
from specomp.experiment.tracking import NoTracking, SweepReport, WandbTracking

SETTINGS = {
    "project": "specomp",
    "entity": None,
    "group": None,
    "mode": "offline",
    "init_timeout": 5.0,
    "finish_timeout": 6.0,
}
RECORD = Record(
    key="0123456789abcdef",
    status="ok",
    choices={"model": "tiny_llama", "method": "svd", "ratio": "cr40"},
    config={"seed": 0},
    ledger=made_ledger(measured_retention=0.5875, compensation_gain=0.5),
    metrics={"wikitext2@1": {"ppl": 14.76}},
    seconds={"compress": 1.5},
)
LINEARS = [
    {"name": "q", "rank": 3, "compensation_gain": None},
    {"name": "k", "rank": 4, "compensation_gain": 0.5},
]


SWEEP = SweepReport(
    key="sweep-1",
    name="table1",
    caption="Table 1",
    html="<p>all</p>",
    points=[
        {"series": "svd", "measured_retention": 0.6, "ppl": 20.0},
        {"series": "svd", "measured_retention": 0.4, "ppl": None},
    ],
    curves={"curves/ppl": ("measured_retention", "ppl")},
)


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """SETTINGS in a folder of the test's own, in a process that has not given up on the service."""
    monkeypatch.setattr(tracking, "_offline_from_now", threading.Event())
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setitem(SETTINGS, "folder", str(tmp_path / "outputs"))
    return SETTINGS


class FakeRun:
    entity = "someone"

    def __init__(self, id="", mode="offline") -> None:
        self.id, self.offline = id, mode == "offline"
        self.logged, self.artifacts, self.finished = [], [], False

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def log(self, values):
        self.logged.append(values)

    def finish(self, quiet=False):
        self.finished = True


class FakeArtifact:
    def __init__(self, name, type, description):
        self.name, self.type, self.files = name, type, {}

    def new_file(self, name, encoding):
        self.files[name] = io.StringIO()
        self.files[name].close = lambda: None
        return self.files[name]


@pytest.fixture
def fake(monkeypatch):
    """A wandb module that remembers what it was asked; `fails` names the modes whose init
    raises.
    """
    module = types.ModuleType("wandb")
    module.inits, module.runs, module.fails = [], [], set()
    module.run, module.key, module.left = None, True, []

    def init(**options):
        module.inits.append(options)
        if options["mode"] in module.fails:
            raise RuntimeError("no server\nsecond line")
        module.runs.append(FakeRun(options["id"], options["mode"]))
        return module.runs[-1]

    def login(*, prompt, verify):
        assert not prompt
        return module.key

    module.init, module.login, module.teardown = init, login, lambda: module.left.append(True)
    module.Html = lambda data, **_: data
    module.plot = types.SimpleNamespace(
        line=lambda table, x, y, *, stroke, title: (table, x, y, stroke, title)
    )
    module.Artifact = FakeArtifact
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
    assert options["name"] == "tiny_llama svd cr40"
    assert options["mode"] == "offline"
    assert options["config"] == {"seed": 0}
    assert options["settings"]["init_timeout"] == 5.0
    assert options["settings"]["finish_timeout"] == 6.0
    assert str(options["dir"]) == SETTINGS["folder"]
    assert options["dir"].is_dir()
    summary, table = run.logged
    counted = {"target_retention": 0.6, "target_compression": 0.4, "measured_retention": 0.5875}
    counted |= {"measured_retention_model": 0.794, "compensation_gain": 0.5, "model_bytes": 6352}
    assert summary == {"wikitext2@1/ppl": 14.76, "seconds/compress": 1.5} | counted
    assert table["linears"] == {
        "columns": ["name", "rank", "compensation_gain"],
        "data": [["q", 3, None], ["k", 4, 0.5]],
    }
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
    assert f"`wandb sync {SETTINGS['folder']}/wandb/" in line
    assert "\n" not in line
    assert fake.left, "the service still holds the id of the run it could not start"


def test_a_sweep_waits_for_a_dead_server_once(fake, caplog):
    fake.fails = {"online"}
    for _ in range(3):
        WandbTracking(**SETTINGS | {"mode": "online"}).publish(RECORD, LINEARS)
    assert [x["mode"] for x in fake.inits] == ["online", "offline", "offline", "offline"]
    assert len(caplog.records) == 1


def test_without_a_key_nothing_is_asked(fake, caplog):
    fake.key = False
    WandbTracking(**SETTINGS | {"mode": "online"}).publish(RECORD, LINEARS)
    assert [x["mode"] for x in fake.inits] == ["offline"]
    assert "no API key: `wandb login` stores one" in caplog.text


def test_a_training_and_its_record_are_one_run(fake):
    online = WandbTracking(**SETTINGS | {"mode": "online"})
    logger = online.training_logger(RECORD)
    assert isinstance(logger, WandbLogger)
    (fake.run,) = fake.runs
    online.publish(RECORD, LINEARS)
    assert len(fake.inits) == 1
    assert fake.run.finished
    online.publish(replace(RECORD, key="another record"), [])
    assert len(fake.inits) == 2, "the run of another record is not this one's"


def test_a_training_without_gates_has_no_histograms(fake):
    training = {
        "steps": 2,
        "phases": [
            {"phase": "start", "step": 0, "kl": 0.5},
            {"phase": "recover", "step": 2, "kl": 0.4},
        ],
    }
    WandbTracking(**SETTINGS | {"mode": "online"}).publish(
        replace(RECORD, training=training), LINEARS
    )
    (run,) = fake.runs
    assert run.finished and not any(
        name.startswith("gates/") for values in run.logged for name in values
    )


def test_a_whole_sweep_is_one_more_run_of_its_group(fake):
    assert WandbTracking(**SETTINGS | {"mode": "online"}).publish_sweep(SWEEP) == "someone"
    (options,), (run,) = fake.inits, fake.runs
    assert (options["id"], options["group"], options["job_type"]) == (
        "sweep-1",
        "Table 1",
        "report",
    )
    logged = {name: value for values in run.logged for name, value in values.items()}
    assert logged["report"] == "<p>all</p>"
    assert logged["points"]["data"] == [["svd", 0.6, 20.0], ["svd", 0.4, None]]
    table, *chart = logged["curves/ppl"]
    assert chart == ["measured_retention", "ppl", "series", "curves/ppl"]
    assert table == {
        "columns": ["series", "measured_retention", "ppl"],
        "data": [["svd", 0.6, 20.0]],
    }, "no point without a value"
    (artifact,) = run.artifacts
    assert (artifact.name, artifact.type) == ("table1-report", "report")
    assert artifact.files["table1.html"].getvalue() == "<p>all</p>"


def test_a_sweep_that_is_stored_has_no_place_yet(fake):
    assert WandbTracking(**SETTINGS).publish_sweep(SWEEP) is None
    fake.fails = {"online", "offline"}
    assert WandbTracking(**SETTINGS | {"mode": "online"}).publish_sweep(SWEEP) is None


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "sometimes"},
        {"init_timeout": 0},
        {"finish_timeout": 0},
        {"unknown": 1},
        {"project": None},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        WandbTracking(**SETTINGS | wrong)
