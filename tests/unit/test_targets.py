"""A yaml is code: what it may call, told before anything is imported."""

import sys

import pytest
import yaml
from command import typed
from composing import COMPOSE
from hydra import initialize_config_dir
from running import CONF
from strangers import __name__ as strangers

import specomp
from specomp import rows
from specomp.errors import UserError
from specomp.targets import ALLOW, checked, targets

FOREIGN = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "functools.partial",
    "lightning.pytorch.utilities.rank_zero.os.system",
    "lightning.Trainer.fit",
    "specompevil.x.Class",
    "specomp.cli.import_module",
    "specomp.models.load.copy.deepcopy",
    "specomp.experiment.record.Path",
    "specomp.experiment.record.subprocess.run",
    "specomp.experiment.record._git",
    "specomp.cache.Cache.__init__",
    "specomp.slots.Method.nothing",
    "specomp",
    "Method",
    "",
    "${x}",
    "specomp..Method",
    "specomp.slots.Method ",
    "specomp/slots.Method",
    None,
    7,
]


@pytest.mark.parametrize("target", FOREIGN, ids=repr)
def test_what_is_refused(target):
    with pytest.raises(UserError) as caught:
        checked(target, "method.whitening")
    line = str(caught.value)
    assert "\n" not in line and ALLOW in line
    assert line.startswith(f"method.whitening._target_={target} is not called: ")


def test_every_target_of_ours_is_called():
    """Also those that a module has from another of ours: points of records name them so."""
    found = 0
    for path in CONF.rglob("*.yaml"):
        if "hydra" not in path.parts:
            for where, target in targets(yaml.safe_load(path.read_text()) or {}, path.stem):
                found += checked(target, where) == target
    assert found > 90


def test_nothing_is_imported_to_find_out(tmp_path, monkeypatch):
    (tmp_path / "expensive.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="is not called"):
        checked("expensive.Thing", "model")
    assert "expensive" not in sys.modules


@pytest.fixture
def mypkg(tmp_path, monkeypatch):
    """A package of the user's."""
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").touch()
    (tmp_path / "mypkg" / "parts.py").write_text(
        "import os\nfrom os import system\nclass Own: ...\n"
    )
    (tmp_path / "mypkgevil.py").write_text("class Own: ...\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("allow", ["mypkg", "mypkg.parts", " other , mypkg "])
def test_what_the_environment_allows(mypkg, monkeypatch, allow):
    monkeypatch.setenv(ALLOW, allow)
    assert checked("mypkg.parts.Own", "model") == "mypkg.parts.Own"
    for target in ("mypkgevil.Own", "mypkg.parts.os.system", "mypkg.parts.system", "os.system"):
        with pytest.raises(UserError, match=f"model._target_={target} is not called"):
            checked(target, "model")


@pytest.mark.parametrize("allow", ["", ",", " , ", "mypk", "mypkg.other", "mypkg.parts.Own.x"])
def test_what_allows_nothing(mypkg, monkeypatch, allow):
    monkeypatch.setenv(ALLOW, allow)
    with pytest.raises(UserError, match="is not called"):
        checked("mypkg.parts.Own", "model")


def test_the_library_reads_rows_by_the_same_rule():
    with pytest.raises(UserError, match=r"whitening\._target_=os\.getcwd is not called"):
        specomp.method("svd", whitening={"_target_": "os.getcwd"})
    with pytest.raises(UserError, match=r"x\.y\[0\]\._target_=os\.getcwd is not called"):
        rows.built({"y": [{"_target_": "os.getcwd", "_partial_": True}]}, "x")


CODE = "_target_: os.system"
# (what was typed, the key that the line names)
TYPED: list[tuple[list[str], str]] = [
    (["method.whitening._target_=os.system"], "method.whitening._target_=os.system"),
    ([f"+benchmark.parts.own={{{CODE}, _args_: [ls], _partial_: true}}"], "own._target_=os.system"),
    ([f"+table.x=[{{{CODE}}}]"], "table.x[0]._target_=os.system"),
    (["+x._target_=${y}", "+y=os.system"], "x._target_=os.system"),
    (["+x._target_=${nowhere}"], "x._target_=${nowhere}: Interpolation key"),
    (["+x='${oc.create:${y}}'", f"+y='{{{CODE}}}'"], "x._target_=os.system"),
    (["+x='${oc.create:${nowhere}}'"], "x=${oc.create:${nowhere}}: Interpolation key"),
    (["trainer._target_=subprocess.Popen"], "trainer._target_=subprocess.Popen"),
    (["hydra.launcher._target_=os.system"], "hydra.launcher._target_=os.system"),
    ([f"+hydra.launcher.x={{{CODE}}}"], "hydra.launcher.x._target_=os.system"),
    (["hydra.sweeper._target_=os.system"], "hydra.sweeper._target_=os.system"),
    ([f"+hydra.callbacks.own={{{CODE}, command: ls}}"], "hydra.callbacks.own._target_=os.system"),
    (["+hydra.job_logging.handlers.own.class=subprocess.Popen"], "handlers.own.class"),
    (["+hydra.job_logging.handlers.own={class: logging.os.system}"], "handlers.own.class"),
    (["hydra.job_logging.handlers.console.stream=ext://os.environ"], "console.stream=ext://os"),
    (["+hydra.job.env_set.SPECOMP_ALLOW=os"], "hydra.job.env_set.SPECOMP_ALLOW"),
    (["+hydra.job.env_set.GIT_CONFIG_COUNT=1"], "hydra.job.env_set.GIT_CONFIG_COUNT"),
    (["+hydra.launcher.env.SPECOMP_ALLOW=os"], "a config does not set SPECOMP_ALLOW"),
    (["+SPECOMP_ALLOW=os"], "a config does not set SPECOMP_ALLOW"),
]


@pytest.mark.parametrize(("words", "named"), TYPED, ids=[" ".join(x) for x, _ in TYPED])
def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, words, named):
    def nothing_runs(*_):
        raise AssertionError("was run")

    monkeypatch.setattr("os.system", nothing_runs)
    monkeypatch.setattr("subprocess.Popen", nothing_runs)
    done = typed(tmp_path, "debug=tiny", *words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("specomp: ") and named in done.stderr


def test_a_yaml_of_ones_own_is_held_to_it(tmp_path):
    """In the file of a choice, and in one that changes what Hydra calls."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: os.system\nname: x\n")
    (tmp_path / "budget").mkdir()
    hydra = {
        "calls": f"callbacks: {{own: {{{CODE}}}}}",
        "logs": "job_logging: {formatters: {simple: {(): os.system}}}",
    }
    for name, text in hydra.items():
        (tmp_path / "budget" / f"{name}.yaml").write_text(
            f"# @package _global_\nhydra:\n  {text}\n"
        )
    for choice in ("model=mine", "budget=calls", "budget=logs"):
        done = typed(tmp_path, "debug=none", "--config-dir", str(tmp_path), choice)
        assert done.returncode == 1 and "_target_=os.system is not called" in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_hydra_itself_may_call_its_launchers_and_sweepers():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for launcher in ("basic", "joblib", "submitit_local", "slurm_gpu"):
            overrides = [f"hydra/launcher={launcher}"]
            assert "launcher" in COMPOSE("config", overrides, return_hydra_config=True).hydra


def test_strangers_are_ours_only_where_they_are_allowed(monkeypatch):
    with pytest.raises(UserError):
        checked(f"{strangers}.HalvesForm", "x")
    monkeypatch.setenv(ALLOW, strangers)
    assert checked(f"{strangers}.HalvesForm", "x")
