"""Who may import whom, and which third-party package is known where: read from the sources, nothing is run."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "specomp"

# A file or folder of the package may import itself and what stands on a lower level.
LEVELS = {
    **dict.fromkeys(("errors", "settings", "profiling", "linalg", "grid"), 0),
    **dict.fromkeys(("progress", "cache", "ratio", "options"), 1),
    **dict.fromkeys(("factors", "modules", "logs"), 2),
    **dict.fromkeys(("models", "statistics"), 3),
    **dict.fromkeys(("budget", "ledger", "gates", "phases"), 4),
    **dict.fromkeys(("methods", "quantization", "data"), 5),
    **dict.fromkeys(("stages", "evaluation", "results"), 6),
    "checks": 7,
    "notes": 8,
    "experiment": 8,
    **dict.fromkeys(("factorize", "planning"), 9),
    "pipeline": 10,
    "run": 11,
}
# Besides the standard library, torch and pydantic.
THIRD_PARTY = {
    "hydra": {
        "run.py",
        "specomp/pipeline.py",
        "specomp/experiment.py",
        "specomp/checks.py",
        "specomp/logs.py",
        "specomp/results/sweep.py",
        "specomp/results/dashboard.py",
    },
    "omegaconf": {
        "run.py",
        "specomp/pipeline.py",
        "specomp/experiment.py",
        "specomp/checks.py",
        "specomp/logs.py",
        "specomp/results/sweep.py",
    },
    "wandb": {"specomp/results/tracking.py"},
    "wandb_workspaces": {"specomp/results/dashboard.py"},
    "matplotlib": {"specomp/results/figures.py", "specomp/results/charts.py"},
    "lm_eval": {"specomp/evaluation/harness.py"},
    "peft": {"specomp/stages/recover.py"},
    "compressed_tensors": {"specomp/models/packed.py"},
    "loguru": {"specomp/models/packed.py"},
    "huggingface_hub": {"specomp/models/"},
    "tokenizers": {"specomp/models/"},
    "transformers": {"specomp/models/", "specomp/data/", "specomp/evaluation/", "specomp/stages/setup.py"},
    "datasets": {"specomp/data/", "specomp/evaluation/harness.py"},
    "lightning": {
        "specomp/stages/",
        "specomp/phases.py",
        "specomp/results/tracking.py",
        "specomp/data/",
        "specomp/experiment.py",
        "specomp/checks.py",
    },
    "safetensors": {"specomp/cache.py", "specomp/models/", "specomp/data/"},
    "xxhash": {"specomp/cache.py"},
    "filelock": {"specomp/cache.py", "specomp/results/record.py"},
    "rich": {"specomp/progress.py", "specomp/results/summary.py", "specomp/planning/"},
    "numpy": {"specomp/data/"},
}
COMMON = {"torch", "pydantic"}
FILES = [ROOT / "run.py", *sorted(PACKAGE.rglob("*.py"))]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import in a file, wherever it stands; names are empty for `import module`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno} is a relative import"
            yield node.module or "", tuple(alias.name for alias in node.names)


def own(path: Path) -> Iterator[str]:
    """The files and folders of the package that a file imports; the version string, which is the package's own, left out."""
    for module, names in imports(path):
        if module == "specomp" and names:
            yield from (name for name in names if name != "__version__")
        elif module.split(".")[0] == "specomp":
            yield module.split(".")[1]


def unit(path: Path) -> str:
    """The file or folder of the package that a file belongs to."""
    return path.stem if path.parent in (PACKAGE, ROOT) else path.relative_to(PACKAGE).parts[0]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, node) of every call by a plain name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_tables_name_files_that_exist():
    units = {unit(path) for path in FILES} - {"__init__"}
    assert units == set(LEVELS), "a new file or folder needs a level here, and a removed one none"
    for places in THIRD_PARTY.values():
        assert all((ROOT / place).exists() for place in places)


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) != "__init__"], ids=label)
def test_imports_go_down_only(path):
    here = unit(path)
    upwards = {name for name in own(path) if name != here and LEVELS[name] >= LEVELS[here]}
    assert not upwards, f"{label(path)} (level {LEVELS[here]}) imports {sorted(upwards)}"


def test_the_package_itself_imports_only_models():
    assert set(own(PACKAGE / "__init__.py")) == {"models"}


@pytest.mark.parametrize("folder", sorted(p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"), ids=label)
def test_no_cycles_inside_a_folder(folder):
    inside = {p.stem: {m.split(".")[2] for m, _ in imports(p) if m.startswith(f"specomp.{folder.name}.")} for p in folder.glob("*.py")}
    while inside:
        free = {name for name, needs in inside.items() if not needs & set(inside)}
        assert free, f"import cycle among {sorted(inside)}"
        inside = {name: needs for name, needs in inside.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_third_party_packages_stay_where_they_belong(path):
    outside = {module.split(".")[0] for module, _ in imports(path)} - set(sys.stdlib_module_names) - COMMON - {"specomp"}
    for package in outside:
        assert package in THIRD_PARTY, f"{label(path)} imports {package}, which is on no list"
        places = THIRD_PARTY[package]
        assert any(label(path) == x or (x.endswith("/") and label(path).startswith(x)) for x in places), f"{label(path)} imports {package}"


def test_services_and_the_harness_are_known_to_one_file_each():
    for package in ("wandb", "lm_eval"):
        assert sum(any(m.split(".")[0] == package for m, _ in imports(path)) for path in FILES) == 1


def test_wandb_and_lm_eval_are_imported_when_used():
    for path in FILES:
        top = {alias.name for node in tree(path).body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module or "" for node in tree(path).body if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in top} & {"wandb", "lm_eval"}, f"{label(path)} makes every run pay for it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=label)
def test_papers_do_not_import_each_other(path):
    others = {module.split(".")[2] for module, _ in imports(path) if module.startswith("specomp.methods.")}
    assert others <= {"base"}, f"{label(path)}: what two papers share belongs into factors, statistics or budget"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_print_no_pickle_no_foreign_code(path):
    for name, node in calls(path):
        where = f"{label(path)}:{node.lineno}"
        assert name not in {"print", "eval", "exec"}, f"{where} calls {name}"
        assert name not in {"pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pickle.Unpickler", "torch.save"}, where
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True", f"{where} runs pickled code"
        assert options.get("allow_pickle", "False") == "False", where
        assert options.get("trust_remote_code") != "True", where


def test_the_checks_can_fail(tmp_path):
    """The readers above see imports inside functions, aliases, and calls."""
    path = tmp_path / "x.py"
    path.write_text("def f():\n    import wandb.sdk as w\n    from specomp.experiment.pipeline import run\n    print(torch.load('x'))\n")
    assert ("wandb.sdk", ()) in set(imports(path))
    assert set(own(path)) == {"pipeline"}
    assert {name for name, _ in calls(path)} == {"print", "torch.load"}
