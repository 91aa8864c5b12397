"""Values that no setting can have, in one line before torch is imported; what cannot work with
others, before any work.
"""

import ast
import contextlib
import logging
import os
from pathlib import Path

import pytest
from command import typed
from running import compose_config
from test_bad_input import check_line, refused

from specomp.cli import log_once
from specomp.experiment import guard, making
from specomp.experiment.environment import PLACES, hidden, plain_config, remember
from specomp.experiment.record import point_of

# (what was typed, what the line says)
VALUES: list[tuple[list[str], list[str]]] = [
    (["ratio.compression=inf"], ["ratio.compression=inf", "finite"]),
    (["ratio.compression=-inf"], ["ratio.compression=-inf", "finite"]),
    (["ratio.compression=nan"], ["ratio.compression=nan", "finite"]),
    (["ratio=bits", "ratio.bits=inf"], ["ratio.bits=inf", "finite"]),
    (["calibration.num_samples=-1"], ["calibration.num_samples=-1", "negative"]),
    (["calibration.num_samples=1e300"], ["calibration.num_samples=1e+300", "64 bits"]),
    (["calibration.length=-1"], ["calibration.length=-1", "negative"]),
    (["seed=99999999999999999999"], ["seed=99999999999999999999", "from 0 to 4294967295"]),
    (["seed=4294967296"], ["seed=4294967296", "from 0 to 4294967295"]),
    (["seed=-1"], ["seed=-1", "from 0 to 4294967295"]),
    (["model.seed=-1"], ["model.seed=-1", "from 0 to 4294967295"]),
    (["threads=1000000"], ["options.threads=1000000", "less than or equal to 1024"]),
    (["threads=-1"], ["threads=-1", "negative"]),
    (["model.name=../../x"], ["model.name='../../x'", "slashes"]),
    (["model.name=a/b"], ["model.name='a/b'", "slashes"]),
    (["model.name=.."], ["model.name='..'", "dot"]),
    (["model.name=''"], ["model.name=''", "1 to 100 characters"]),
    (["model.name=" + "x" * 101], ["model.name='xxx", "1 to 100 characters"]),
    (["method.name=a/b"], ["method.name='a/b'", "slashes"]),
    (["method.name='a\nb'"], ["method.name='a\\nb'", "line breaks"]),
    (["paths.cache=null"], ["paths.cache=null", "paths.cache=FOLDER"]),
    (["paths.outputs=null"], ["paths.outputs=null", "paths.outputs=FOLDER"]),
    (["paths.cache=''"], ["paths.cache is empty"]),
    (["paths.outputs='~nobody_at_all/x'"], ["paths.outputs=~nobody_at_all/x", "home"]),
    (["model=local", "model.path=null"], ["model.path=null", "model.path=VALUE"]),
    (["model=local", "model.path=''"], ["model.path is empty", "model.path=VALUE"]),
    (["corpus=text", "corpus.path=null"], ["corpus.path=null", "corpus.path=VALUE"]),
    (["calibration=token_ids", "calibration.path=null"], ["calibration.path=null"]),
    (["-m", "method=glob(zzz*)"], ["method=glob(zzz*): there is nothing to sweep", "adasvd"]),
    (["-m", "ratio=glob(*,exclude=*)"], ["there is nothing to sweep", "cr10"]),
    (["-m", "seed=range(3,3)"], ["seed=range(3,3): there is nothing to sweep"]),
    (["-m", "hydra/launcher=nope"], ["hydra/launcher has no choice nope", "basic"]),
    (["-m", "hydra/sweeper=optuna"], ["hydra/sweeper has no choice optuna", "specomp[optuna]"]),
    (["-m", "hydra/launcher=ray_cluster"], ["RayLauncher is not installed", "specomp[ray]"]),
    (["quantizer="], ["quantizer has no choice '': there are awq_int4, gptq_int2, "]),
    (["model=hub", "model.repo=x/y", "model.revision="], ["model.revision is empty"]),
    (["nosuch=x"], ["The config has no setting nosuch"]),
    (["method=adasdv"], ["method has no choice adasdv; did you mean adasvd?"]),
    (["--config-dir=/nowhere"], ["'/nowhere' not found"]),
    (["--config-name=nowhere"], ["Cannot find primary config 'nowhere'"]),
    (["method=[a"], ["method=[a"]),
    (["hydra.run.dir=null"], ["hydra.run.dir=null", "not Optional"]),
    (["+x=${nowhere}"], ["x=${nowhere}: Interpolation key 'nowhere' not found"]),
    (["--cfg=job", "-m"], ["Only one of"]),
]


@pytest.mark.parametrize(("words", "said"), VALUES, ids=[" ".join(x)[:60] for x, _ in VALUES])
def test_one_line_before_anything_slow(tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("specomp.experiment.pipeline.run", None)
    done = typed(tmp_path, "debug=tiny", *words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("specomp: ")
    check_line(done.stderr.strip(), said)


def test_what_refuses_them_imports_no_torch():
    """Also of the settings class that is made first."""
    for module in (guard, making):
        tree = ast.parse(Path(module.__file__).read_text())
        names = {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
        assert not any(str(x).startswith(("torch", "specomp.experiment.checks")) for x in names)


@pytest.mark.parametrize("typed_ratio", ["20", "0.2", "20,40"])
def test_what_a_refusal_proposes_works(tmp_path, typed_ratio):
    line = typed(tmp_path, "debug=tiny", "-m", f"ratio={typed_ratio}").stderr
    proposed = line.rpartition("written ")[2].strip().rstrip(".")
    assert proposed.startswith("ratio.compression=0.2")
    for value in proposed.partition("=")[2].split(","):
        assert compose_config(tmp_path, f"ratio.compression={value}").ratio.compression < 1


@pytest.mark.parametrize("typed_ratio", ["200", "-1", "nan", "1e3"])
def test_nothing_is_proposed_that_is_refused(tmp_path, typed_ratio):
    line = typed(tmp_path, "debug=tiny", f"ratio={typed_ratio}").stderr
    assert len(line.splitlines()) == 1 and "is written" not in line


def test_a_dense_export_that_no_plain_model_holds(tmp_path):
    """Qwen has no switch for biases of its MLP; LLaMA has."""
    trained = ["method=soco", "export=dense", "options.save=true"]
    line = refused(tmp_path, "model=tiny_qwen", *trained)
    check_line(line, ["21 of 21 linears have an output bias", "use export=factors"])
    with pytest.raises(AssertionError, match="calibrated"):
        refused(tmp_path, *trained, "method/training=polish", "method/whitening=gram")


def test_tasks_of_the_hub_without_a_network(tmp_path):
    line = refused(tmp_path, "benchmark=zeroshot", "benchmark.limit=1")
    check_line(line, ["piqa: cannot load its data", "paths.data"])


# ---- the environment


@pytest.mark.parametrize("empty", ["", "  "])
def test_a_variable_that_is_empty_is_not_set(tmp_path, monkeypatch, empty):
    for name in PLACES:
        monkeypatch.setenv(name, empty)
    monkeypatch.chdir(tmp_path)
    paths = compose_config(tmp_path).paths
    assert paths.cache == str(tmp_path / "cache")
    assert not any(name in os.environ for name in PLACES)


def test_secrets_of_the_environment_are_in_no_record(tmp_path, monkeypatch):
    """Nor in what a point is made of; places are, as conf/config.yaml takes them from there."""
    monkeypatch.setenv("MY_TOKEN", "hunter2-hunter2")
    monkeypatch.setenv("SPECOMP_DATA", "/some/data")
    cfg = compose_config(
        tmp_path, "+x=${oc.env:MY_TOKEN}", "+y=${x}", "+z=${oc.env:SPECOMP_DATA}", "+w=a${x}b"
    )
    kept = plain_config(cfg)
    assert kept["x"] == kept["y"] == "${oc.env:MY_TOKEN}"
    assert kept["w"] == "a${oc.env:MY_TOKEN}b" and kept["z"] == "/some/data"
    assert cfg.x == "hunter2-hunter2", "what is run has the value"
    assert "hunter2" not in str(kept)
    before = point_of(kept)
    monkeypatch.setenv("MY_TOKEN", "another")
    assert point_of(plain_config(cfg)) == before


def test_secrets_of_the_environment_are_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2-hunter2")
    done = typed(tmp_path, "debug=tiny", "plan=true", "model.name=${oc.env:MY_TOKEN}")
    assert done.returncode == 0 and "${oc.env:MY_TOKEN}" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    done = typed(tmp_path, "debug=tiny", "model.dtype=${oc.env:MY_TOKEN}")
    assert done.returncode == 1 and "model.dtype=${oc.env:MY_TOKEN}" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    for path in (tmp_path / "outputs" / "logs").rglob("*"):
        assert path.is_dir() or "hunter2" not in path.read_text()


def test_only_what_could_be_a_secret_is_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("SHORT", "1")
    remember(compose_config(tmp_path, "+x=${oc.env:SHORT}"))
    assert hidden("11 of 21") == "11 of 21"


def test_a_log_that_cannot_be_written_ends_in_one_line(capsys):
    """Not a traceback a message."""
    handler = logging.FileHandler("/dev/full")
    log = logging.getLogger("of.this.test")
    log.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logging.Handler, "handleError", log_once)
            for _ in range(3):
                log.critical("something")
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
    assert capsys.readouterr().err == "specomp: the log ends here: No space left on device.\n"


def test_outputs_that_cannot_be_made_are_one_line(tmp_path):
    (tmp_path / "a_file").touch()
    for words in ([f"paths.outputs={tmp_path}/a_file"], [f"hydra.run.dir={tmp_path}/a_file/x"]):
        done = typed(tmp_path, "debug=tiny", *words)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("specomp: Cannot") and "a_file" in done.stderr
