"""Rows and slots from conf/*.yaml with OmegaConf alone: what Hydra composes, for a caller who holds
a model and no command line.

Only what these files use: a defaults list is a look-up (a slot of a row, or a file of the same
group to start from).
"""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from specomp.errors import UserError, meant
from specomp.settings import CONF, choices
from specomp.slots import Method, check_slots
from specomp.targets import checked


def method_names() -> list[str]:
    """Every row of conf/method."""
    return choices("method")


def method(name: str = "adasvd", **slots: Any) -> Method:
    """The row of that name with other slots: a choice by its name, settings of the row's own choice
    as a mapping, or an object.

    For example method("adasvd", allocation="uniform", compensation={"iterations": 3}); `quantizer`
    is one of them. Raises UserError for a name or a setting that there is not.
    """
    row: Any = load("method", name)
    given: dict[str, Any] = {}
    row["rounding"] = load("quantizer", "none")
    for slot, change in slots.items():
        key, group = (
            ("rounding", "quantizer")
            if slot in ("quantizer", "rounding")
            else (slot, f"method/{slot}")
        )
        if key not in row or key in ("name", "_target_"):
            raise UserError(
                f"A method has no slot {slot!r}: there are"
                f" {', '.join(k for k in row if k not in ('name', '_target_'))}."
            )
        if isinstance(change, str):
            row[key] = load(group, change)
        elif isinstance(change, Mapping):
            row[key] = OmegaConf.merge(row[key], dict(change))
        else:
            given[key] = change
    parts = {
        key: given[key] if key in given else built(value, key)
        for key, value in row.items()
        if key != "_target_"
    }
    made = Method(**parts)
    check_slots(made)
    return made


def slot(name: str, choice: str, **settings: Any) -> Any:
    """A choice of one slot, some of its settings changed: slot("training", "lora", steps=100).
    Raises UserError.
    """
    group = "quantizer" if name in ("quantizer", "rounding") else f"method/{name}"
    return built(OmegaConf.merge(load(group, choice), settings), name)


def load(group: str, choice: str) -> DictConfig:
    """One file of a group with what it starts from and its slots. Raises UserError for a name that
    there is not.
    """
    path = CONF / group / f"{choice}.yaml"
    if not path.is_file():
        raise UserError(f"{group} has no choice {choice!r}{meant(choice, choices(group))}")
    own: Any = OmegaConf.load(path)
    merged: Any = OmegaConf.create({})
    defaults = own.pop("defaults", [])
    for entry in [*defaults, *([] if "_self_" in defaults else ["_self_"])]:
        if entry == "_self_":  # a file of the whole config has its own part under its group
            merged = OmegaConf.merge(merged, own.get(group, own))
        elif isinstance(entry, str):
            merged = OmegaConf.merge(merged, load(group, entry))
        else:
            ((slot, value),) = entry.items()
            if slot.startswith("override ") and group in own:
                continue  # what a command line without that slot gets; here the budget says it
            if slot.startswith("override "):
                raise UserError(
                    f"{group}={choice} is an old name of"
                    f" {slot.split('/', 1)[-1].partition('@')[0]}={value}: use that."
                )
            merged[slot] = load(f"{group}/{slot}", value)
    return merged  # type: ignore[no-any-return]


def built(node: Any, where: str) -> Any:
    """What a node's `_target_` makes of it. Raises UserError for settings that it refuses."""
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        return _build(plain, where)
    except ValidationError as error:
        problems = [
            f"{'.'.join([where, *map(str, x['loc'])])}={x['input']}: {x['msg']}"
            for x in error.errors()
        ]
        raise UserError("; ".join(problems) + ".") from error


def _build(node: Any, where: str) -> Any:
    if isinstance(node, list):
        return [_build(x, f"{where}[{i}]") for i, x in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {
        key: _build(value, f"{where}.{key}")
        for key, value in node.items()
        if key not in ("_target_", "_convert_", "_partial_")
    }
    if "_target_" not in node:
        return values
    module, _, name = checked(node["_target_"], where).rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return partial(kind, **values) if node.get("_partial_") else kind(**values)
