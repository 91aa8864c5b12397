"""Who may import whom, and which third-party package is known where: read from the sources, nothing
is run.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "specomp"

# A file may import what stands on its own floor or a lower one.
FLOORS = {
    **dict.fromkeys(
        ("numerics", "cache", "disk", "errors", "settings", "progress", "profiling"), 0
    ),
    **dict.fromkeys(("checksums", "interrupts", "targets"), 0),
    "models": 1,
    **dict.fromkeys(("slots", "forms", "quantization", "data"), 2),
    **dict.fromkeys(("compression", "training", "evaluation"), 3),
    "methods": 4,
    **dict.fromkeys(("rows", "pricing", "api"), 5),
    "experiment": 6,
    "tables": 7,
    **dict.fromkeys(("cli", "results"), 8),
    **dict.fromkeys(("__main__", "run"), 9),
}
# Besides the standard library, torch and pydantic.
THIRD_PARTY = {
    "hydra": {
        "specomp/cli.py",
        "specomp/experiment/pipeline.py",
        "specomp/experiment/config.py",
        "specomp/experiment/logs.py",
        "specomp/tables/dashboard.py",
        "specomp/tables/sweep.py",
        "specomp/experiment/guard.py",
        "specomp/experiment/making.py",
    },
    "omegaconf": {
        "specomp/cli.py",
        "specomp/rows.py",
        "specomp/experiment/completed.py",
        "specomp/experiment/config.py",
        "specomp/experiment/label.py",
        "specomp/experiment/logs.py",
        "specomp/experiment/pipeline.py",
        "specomp/tables/sweep.py",
        "specomp/experiment/environment.py",
        "specomp/experiment/guard.py",
        "specomp/experiment/making.py",
    },
    "wandb": {"specomp/experiment/tracking.py"},
    "wandb_workspaces": {"specomp/tables/dashboard.py"},
    "matplotlib": {"specomp/experiment/figures.py", "specomp/tables/charts.py"},
    "pandas": {
        "specomp/compression/report.py",
        "specomp/tables/charts.py",
        "specomp/tables/render.py",
        "specomp/tables/report.py",
        "specomp/tables/sweep.py",
    },
    "jinja2": {"specomp/tables/report.py"},
    "lm_eval": {
        "specomp/evaluation/harness.py",
        "specomp/evaluation/definitions.py",
        "specomp/evaluation/language_model.py",
    },
    "peft": {"specomp/training/adapters.py"},
    "compressed_tensors": {"specomp/models/packed.py"},
    "loguru": {"specomp/models/packed.py"},
    "huggingface_hub": {"specomp/models/"},
    "tokenizers": {"specomp/models/"},
    "yaml": {"specomp/models/card.py"},
    "gguf": {"specomp/models/gguf_export.py", "specomp/models/gguf.py"},
    "transformers": {
        "specomp/models/",
        "specomp/data/",
        "specomp/evaluation/",
        "specomp/compression/run.py",
        "specomp/pricing.py",
        "specomp/api.py",
    },
    "datasets": {"specomp/data/", "specomp/evaluation/definitions.py"},
    "lightning": {
        "specomp/compression/module.py",
        "specomp/training/",
        "specomp/experiment/checks.py",
        "specomp/experiment/config.py",
        "specomp/experiment/tracking.py",
    },
    "safetensors": {"specomp/cache.py", "specomp/disk.py", "specomp/models/", "specomp/data/"},
    "xxhash": {"specomp/cache.py", "specomp/checksums.py"},
    "filelock": {"specomp/cache.py", "specomp/disk.py", "specomp/experiment/record.py"},
    "rich": {
        "specomp/progress.py",
        "specomp/compression/report.py",
        "specomp/experiment/plan.py",
        "specomp/experiment/summary.py",
    },
    "numpy": {"specomp/data/"},
}
COMMON = {"torch", "pydantic", "jaxtyping"}
MATHEMATICS = {"torch", "jaxtyping"}  # all that numerics knows
# What a library that compresses in closed form must not cost.
EXPERIMENTS_ONLY = {"hydra", "lightning", "lm_eval", "wandb", "matplotlib"}
EXTRAS = {"matplotlib", "peft", "compressed_tensors", "loguru", "wandb_workspaces"}
FILES = [ROOT / "run.py", *sorted(PACKAGE.rglob("*.py"))]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def nodes(body: Iterable[ast.AST], *, deferred: bool) -> Iterator[ast.AST]:
    """Everything in a file but what is there for type checkers; deferred: also what stands inside
    functions.
    """
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from nodes(node.orelse, deferred=deferred)
            continue
        yield node
        if deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from nodes(ast.iter_child_nodes(node), deferred=deferred)


def imports(path: Path, *, deferred: bool = True) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import in a file; names are empty for `import module`."""
    for node in nodes(tree(path).body, deferred=deferred):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno} is a relative import"
            yield node.module or "", tuple(alias.name for alias in node.names)


def packages(path: Path, *, deferred: bool = True) -> set[str]:
    """Third-party packages that a file imports."""
    known = {*sys.stdlib_module_names, "specomp"}
    return {module.split(".")[0] for module, _ in imports(path, deferred=deferred)} - known


def file_of(module: str) -> Path | None:
    """The file of a module of the package."""
    place = ROOT / module.replace(".", "/")
    return next((x for x in (place.with_suffix(".py"), place / "__init__.py") if x.exists()), None)


def own(path: Path, *, deferred: bool = True) -> set[Path]:
    """The files of the package that a file imports; names of the package itself (its version) left
    out.
    """
    found: set[Path] = set()
    for module, names in imports(path, deferred=deferred):
        if module.split(".")[0] != "specomp":
            continue
        inside = {file for name in names if (file := file_of(f"{module}.{name}")) is not None}
        owner = file_of(module)
        assert owner is not None, f"{label(path)} imports {module}, which is no file"
        # A folder's own file says nothing but what the folder is.
        found |= inside or {owner}
    return found - {PACKAGE / "__init__.py", path}


def room(path: Path) -> str:
    """The file or folder of the package that a file belongs to."""
    return path.stem if path.parent in (PACKAGE, ROOT) else path.relative_to(PACKAGE).parts[0]


def in_a_circle(graph: dict[Path, set[Path]]) -> set[Path]:
    """What is left when files that import nothing that is left are taken away."""
    left = dict(graph)
    while free := [path for path, needs in left.items() if not needs & set(left)]:
        for path in free:
            del left[path]
    return set(left)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, node) of every call by a plain name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_tables_name_files_that_exist():
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert rooms == set(FLOORS), "a new file or folder needs a floor here, and a removed one none"
    for package, places in THIRD_PARTY.items():
        for place in places:
            assert (ROOT / place).exists()
            here = [
                x
                for x in FILES
                if label(x) == place or (place.endswith("/") and label(x).startswith(place))
            ]
            assert any(package in packages(x) for x in here), f"{place} does not import {package}"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "__init__"], ids=label)
def test_imports_stay_on_a_floor_or_go_down(path):
    here = FLOORS[room(path)]
    upwards = {label(x) for x in own(path) if FLOORS[room(x)] > here}
    assert not upwards, f"{label(path)} (floor {here}) imports {sorted(upwards)}"


def test_no_file_imports_itself_on_a_detour():
    left = in_a_circle({path: own(path) for path in FILES})
    assert not left, f"import cycle among {sorted(map(label, left))}"


def test_the_package_itself_imports_only_models():
    """Its public names are imported when they are asked for; type checkers see them all."""
    path = PACKAGE / "__init__.py"
    assert {room(x) for x in own(path)} == {"models"}
    (hint,) = [x for x in tree(path).body if isinstance(x, ast.If)]
    told = {alias.name for x in hint.body if isinstance(x, ast.ImportFrom) for alias in x.names}
    (public,) = [
        ast.literal_eval(x.value)
        for x in tree(path).body
        if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__"
    ]
    assert told == set(public)


def test_the_library_imports_none_of_what_experiments_need():
    """`import specomp; specomp.compress`: whatever is imported on the way, before any function is
    called.
    """
    reached, left = set(), {PACKAGE / "api.py", PACKAGE / "rows.py"}
    while left:
        reached |= left
        left = {x for path in left for x in own(path, deferred=False)} - reached
    for path in reached:
        assert not packages(path, deferred=False) & EXPERIMENTS_ONLY, label(path)
        assert FLOORS[room(path)] <= FLOORS["api"]


def test_the_first_line_of_a_run_waits_for_no_torch():
    """Nor do help, completion and refusals: what the command and Hydra's callback import."""
    reached, left = set(), {PACKAGE / "cli.py", PACKAGE / "experiment" / "logs.py"}
    while left:
        reached |= left
        left = {x for path in left for x in own(path, deferred=False)} - reached
    for path in reached:
        slow = packages(path, deferred=False) & {"torch", "transformers", "lightning"}
        assert not slow, label(path)


@pytest.mark.parametrize("start", ["experiment/pipeline.py", "tables/table.py", "cli.py"])
def test_no_run_and_no_table_needs_an_extra(start):
    """Only when something that needs one is asked for."""
    reached, left = set(), {PACKAGE / start}
    while left:
        reached |= left
        left = {x for path in left for x in own(path, deferred=False)} - reached
    for path in reached:
        assert not packages(path, deferred=False) & EXTRAS, label(path)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_third_party_packages_stay_where_they_belong(path):
    for package in packages(path) - COMMON:
        assert package in THIRD_PARTY, f"{label(path)} imports {package}, which is on no list"
        places = THIRD_PARTY[package]
        allowed = any(
            label(path) == x or (x.endswith("/") and label(path).startswith(x)) for x in places
        )
        assert allowed, f"{label(path)} imports {package}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "numerics").glob("*.py")), ids=label)
def test_mathematics_knows_torch_alone(path):
    assert packages(path) <= MATHEMATICS


def test_a_service_is_known_to_one_file():
    assert sum("wandb" in packages(path) for path in FILES) == 1


def test_wandb_and_lm_eval_are_imported_when_used():
    for path in FILES:
        early = packages(path, deferred=False) & {"wandb", "lm_eval"}
        assert not early, f"{label(path)} makes every run pay for it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=label)
def test_papers_do_not_import_each_other(path):
    others = [x for x in own(path) if x.parent == path.parent]
    assert not others, f"{label(path)}: what two papers share belongs on a lower floor"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_print_no_pickle_no_foreign_code(path):
    for name, node in calls(path):
        where = f"{label(path)}:{node.lineno}"
        assert name not in {"print", "eval", "exec"}, f"{where} calls {name}"
        pickled = {"load", "loads", "dump", "dumps", "Unpickler"}
        assert name not in {"torch.save", *(f"pickle.{x}" for x in pickled)}, where
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True", f"{where} runs pickled code"
        assert options.get("allow_pickle", "False") == "False", where
        assert options.get("trust_remote_code") != "True", where


def test_the_checks_can_fail(tmp_path):
    """The readers above see imports inside functions and classes, aliases, whole modules, and
    calls.
    """
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import hydra\n"
        "class C:\n    import lightning\n"
        "def f():\n    import wandb.sdk as w\n    from specomp.experiment.pipeline import run\n"
        "    from specomp.tables import charts\n    from specomp import __version__, rows\n"
        "    print(torch.load('x'))\n"
    )
    assert ("wandb.sdk", ()) in set(imports(path))
    assert packages(path) == {"wandb", "lightning"}
    assert packages(path, deferred=False) == {"lightning"}
    assert {x.relative_to(PACKAGE).as_posix() for x in own(path)} == {
        "experiment/pipeline.py",
        "tables/charts.py",
        "rows.py",
    }
    assert [name for name, _ in calls(path)] == ["print", "torch.load"]
    a, b, c = (tmp_path / x for x in "abc")
    assert in_a_circle({a: {b}, b: {c}, c: set()}) == set()
    assert in_a_circle({a: {b}, b: {a}, c: set()}) == {a, b}
