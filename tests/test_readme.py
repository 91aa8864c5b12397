"""What the README and the method cards say can be typed can be typed, and its example of a new
method runs.
"""

import re
import shlex
import sys
import types

import pytest
from hydra import compose, initialize_config_dir
from running import CONF, ROOT, compose_run
from tiny import tiny_model, tiny_tokenizer

from specomp.experiment.making import make
from specomp.experiment.record import COMMITTED, stored
from specomp.tables.sweep import load_sweep

README = (ROOT / "README.md").read_text()
CARDS = (ROOT / "specomp" / "methods" / "README.md").read_text()
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for text in (README, CARDS, EXPERIMENTS)
    for line in text.splitlines()
    if re.match(r"    python run\.py ", line)
    and not re.search(r"hydra/(launcher|sweeper)=", line)  # those need extras
]
RESULTS = [
    shlex.split(line.split("#")[0])[1:]
    for line in README.splitlines()
    if re.match(r"    specomp (table|report) \w+ ", line)
]
PLACEHOLDERS = {
    "FILE": "text.txt",
    "COMMIT": "main",
    "ORG/NAME": "a/b",
    "FOLDER": "folder",
    "F": "calibration.npy",
    "G": "test.npy",
}


def overrides(command: str) -> list[str]:
    """The overrides of a command line; of a sweep, its first job."""
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    chosen = []
    for word in words:
        key, _, value = word.partition("=")
        value = value.split(",")[0] if "-m" in shlex.split(command) else value
        chosen.append(f"{key}={PLACEHOLDERS.get(value, value)}")
    return chosen


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "config", overrides=[*overrides(command), "paths.data=null"], return_hydra_config=True
        )
    assert make(cfg, "method", rounding=cfg.quantizer) is not None
    for group in ("ratio", "calibration", "benchmark", "quantizer", "options"):
        assert make(cfg, group) is not None


@pytest.mark.parametrize("typed", RESULTS, ids=lambda x: " ".join(x[:2]))
def test_tables_and_reports_show_the_committed_results(typed) -> None:
    assert not load_sweep(typed[1:], stored([COMMITTED])).missing()


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 8 and len(RESULTS) == 2


def test_methods_table_is_complete() -> None:
    for path in (CONF / "method").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.stem


def test_example_method_runs(tmp_path, monkeypatch) -> None:
    source = re.search(r"```python\n# specomp/methods/clipped\.py\n(.*?)```", README, re.S)
    yaml = re.search(r"```yaml\n# conf/method/clipped\.yaml\n(.*?)```", README, re.S)
    assert source
    assert yaml
    module = types.ModuleType("specomp.methods.clipped")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.group(1), "clipped.py", "exec", dont_inherit=True), module.__dict__)
    monkeypatch.setattr(sys.modules["specomp.methods"], "clipped", module, raising=False)
    monkeypatch.setenv("SPECOMP_ALLOW", module.__name__)  # its file is not in the package here
    folder = tmp_path / "conf" / "method"
    folder.mkdir(parents=True)
    (folder / "clipped.yaml").write_text(yaml.group(1))
    record = compose_run(
        tmp_path, f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "method=clipped", "ratio=cr20"
    )
    assert record.status == "ok"
    assert record.choices["method"] == "clipped"
    assert 0.75 < record.counted.measured_retention <= 0.8


def test_notebook_example_runs(tmp_path, monkeypatch, capsys) -> None:
    source = re.search(r"## In a notebook\n\n```python\n(.*?)```", README, re.S)
    assert source
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    names = {"FOLDER": str(folder), "TEXT": "The words of a text. " * 1000}
    shorter = (
        source.group(1)
        .replace("64 * 512", "8 * 64")
        .replace("512", "64")
        .replace("64)  #", "64)  #")
    )
    exec(
        shorter.replace("view(64, 64)", "view(8, 64)").replace("num_samples=64", "num_samples=8"),
        names,
    )
    assert "retention of the linears" in capsys.readouterr().out
