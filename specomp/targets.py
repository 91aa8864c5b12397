"""What a yaml may call. `_target_` is code and a yaml comes from anywhere, so only classes that
specomp itself defines, the trainer, and what the person at the keyboard allows are called; told
from names and sources, before anything is imported.
"""

import ast
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from specomp.errors import UserError, one_line

ALLOW = "SPECOMP_ALLOW"  # of the environment, never of a config: a yaml cannot allow itself
PACKAGE = Path(__file__).parent
OURS = PACKAGE.name
TRAINER = "lightning.Trainer"
FUNCTIONS = ("specomp.training.sharded.sharded_trainer",)  # all others do more than make an object
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def checked(target: Any, where: str) -> str:
    """A `_target_` that may be called. where: the key it stands at. Raises UserError."""
    reason = _refused(target)
    if reason is None:
        return str(target)
    raise UserError(
        f"{where}._target_={target} is not called: {reason}; {ALLOW} in the environment lists"
        " further modules, if you trust them."
    )


def listed(name: str) -> bool:
    """Whether SPECOMP_ALLOW, module prefixes with commas between them, covers a dotted name."""
    allowed = (x.strip() for x in os.environ.get(ALLOW, "").split(","))
    return any(within(name, x) for x in allowed if x)


def within(name: str, module: str) -> bool:
    """Whether a dotted name is a module's or of something inside it."""
    return f"{name}.".startswith(f"{module}.")


def _refused(target: Any) -> str | None:
    """Why it may not be called; None where it may."""
    if not isinstance(target, str) or not DOTTED.fullmatch(target):
        return "it is no dotted name of a class"
    if target == TRAINER or target in FUNCTIONS or _is_own_class(target):
        return None
    if listed(target):
        home = _home(target)
        # a module that is listed may hold what others define: os.system through mypackage.os
        return None if home is None or listed(home) or within(home, OURS) else f"it is of {home}"
    if within(target, OURS):
        return "specomp defines no such class"
    return f"it is neither a class of specomp nor {TRAINER}"


def _is_own_class(target: str) -> bool:
    """Whether a file of the package has a class statement of that name, or imports it from one."""
    module, _, name = target.rpartition(".")
    if not within(target, OURS):
        return False
    origin = _classes(module).get(name)
    return origin == target or (origin is not None and _is_own_class(origin))


@cache
def _classes(module: str) -> dict[str, str]:
    """What a module of the package defines as a class or imports, by the name it has there; read
    from its source.
    """
    place = PACKAGE.joinpath(*module.split(".")[1:])
    path = next((x for x in (place.with_suffix(".py"), place / "__init__.py") if x.is_file()), None)
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path else []:
        if isinstance(node, ast.ClassDef):
            found[node.name] = f"{module}.{node.name}"
        elif isinstance(node, ast.ImportFrom):
            found |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    return found


def _home(target: str) -> str | None:
    """The module that defines what a name of a listed module stands for; None for one that there
    is not, which whoever calls it says.
    """
    found: Any = None
    parts = target.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        try:
            found = import_module(name)
        except ModuleNotFoundError:
            found = getattr(found, parts[count - 1], None)
        except Exception as error:
            raise UserError(f"{target}: importing {name} fails: {one_line(error)}.") from error
        if found is None:
            return None
    return str(getattr(found, "__module__", None) or getattr(found, "__name__", type(found)))


def targets(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(key, `_target_`) of everything in plain mappings and lists that would be called."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield where, node["_target_"]
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from targets(value, f"{where}[{index}]")
