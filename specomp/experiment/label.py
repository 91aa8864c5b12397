"""What an experiment is called: in the first line of a run, above its summary, in tables."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from specomp.settings import CONF

SETTINGS = ("method.", "calibration.", "quantizer.", "seed=")
SLOT = "method/"
UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")  # no =: Hydra would take model.path=FOLDER apart


def first_line(hydra: Any, cfg: Any) -> str:
    """Model, method, ratio and text of what is about to run."""
    choices, typed = hydra.runtime.choices, hydra.overrides.task
    ratio = ratio_name(choices["ratio"], cfg.ratio)
    amount = f"ratio={ratio}" if ratio == choices["ratio"] else ratio
    method = " ".join([cfg.method.name, *changes(choices, typed)])
    words = [cfg.model.name, method, *([amount] if spends(choices) else [])]
    return ", ".join([*words, f"calibrated on {text_name(choices, cfg)}"])


def method_name(choices: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """What a record's method is called. A dense reference has the config of the run that measured
    it.
    """
    return "dense" if is_reference(choices) else _name(choices, config, "method")


def is_reference(choices: Mapping[str, str]) -> bool:
    """Whether nothing is compressed; with a quantizer the dense row is."""
    return choices.get("method") == "dense" and choices.get("quantizer", "none") == "none"


def model_name(choices: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """What a record's model is called."""
    return _name(choices, config, "model")


def _name(choices: Mapping[str, str], config: Mapping[str, Any], group: str) -> str:
    return str((config.get(group) or {}).get("name") or choices.get(group))


def text_name(choices: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The text that a method is calibrated on; empty where that is not known."""
    corpus = config.get("corpus")
    return str(corpus["name"] if corpus else choices.get("calibration") or "")


def ratio_name(choice: str | None, ratio: Mapping[str, Any] | None) -> str:
    """A ratio by its choice where it is what the choice says, else by its numbers: 0.333 typed over
    cr40 is compression=0.333.
    """
    own = _ratio_of(str(choice))
    told = {k: v for k, v in (ratio or {}).items() if not k.startswith("_")}
    if not told or own == told:
        return str(choice)
    return " ".join(f"{key}={value}" for key, value in told.items())


@cache
def _ratio_of(choice: str) -> dict[str, Any] | None:
    """What a file of conf/ratio says of the budget, with the file that it starts from (rows.load
    would cost an import of torch).
    """
    path = CONF / "ratio" / f"{choice}.yaml"
    if not path.is_file():
        return None
    own: Any = OmegaConf.load(path)
    starts = [x for x in own.get("defaults", []) if isinstance(x, str) and x != "_self_"]
    found = {k: v for x in starts for k, v in (_ratio_of(x) or {}).items()}
    return found | {
        str(k): v
        for k, v in own.get("ratio", own).items()
        if not str(k).startswith("_") and k != "defaults"
    }


def spends(choices: Mapping[str, str]) -> bool:
    """Whether a ratio changes anything: not of the dense row, which a quantizer compresses."""
    return choices.get("method") != "dense"


def run_name(choices: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """All that tells a record from another, in one line: model, method with what differs from its
    row, ratio, text.
    """
    words = [model_name(choices, config), method_name(choices, config)]
    if not is_reference(choices):
        words += changes(choices, config.get("overrides") or [])
        if spends(choices):
            words.append(ratio_name(choices.get("ratio"), config.get("ratio")))
        words.append(text_name(choices, config))
    return " ".join(filter(None, words))


def folder_name(choices: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Model, method and ratio for the name of a folder: letters, digits and _.+- only, at most 100
    characters. A key has to follow: what differs beyond these three is not in it.
    """
    amount = (
        ratio_name(choices.get("ratio"), config.get("ratio"))
        if spends(choices)
        else str(choices.get("quantizer"))
    )
    words = [model_name(choices, config), method_name(choices, config), amount]
    return "-".join(UNSAFE.sub("_", x).lstrip(".-")[:40] for x in words)[:100]


def changes(choices: Mapping[str, str], overrides: Sequence[str]) -> list[str]:
    """What differs from the method's row as it stands in conf/: slots that were chosen otherwise,
    on the command line or by an experiment, and settings that were typed; the quantizer too.
    """
    if is_reference(choices):
        return []  # nothing is compressed, by whatever settings
    row = slots_of(str(choices.get("method")))
    found = []
    if choices.get("quantizer", "none") != "none":
        found.append(f"quantizer={choices['quantizer']}")
    typed = [x.lstrip("+") for x in overrides]
    chosen = {k.split("@")[0]: v for k, v in choices.items() if k.startswith(SLOT)}
    if row:
        found += [f"{k}={v}" for k, v in chosen.items() if v != row.get(k.removeprefix(SLOT))]
    else:  # a row that is not in conf/: what it had of its own cannot be told
        found += [x for x in typed if x.startswith(SLOT)]
    return found + [x for x in typed if x.startswith(SETTINGS) and not x.startswith("method.name=")]


@cache
def slots_of(method: str) -> dict[str, str]:
    """The choices of a row's own file; empty for a row that is not ours."""
    path = CONF / "method" / f"{method}.yaml"
    return dict(_defaults(OmegaConf.load(path))) if path.is_file() else {}


def _defaults(row: Any) -> Iterator[tuple[str, str]]:
    for entry in row.get("defaults", []):
        if OmegaConf.is_dict(entry):
            yield from ((k.split("/")[-1].split("@")[0], str(v)) for k, v in entry.items())
        elif entry != "_self_":
            yield from slots_of(entry).items()
