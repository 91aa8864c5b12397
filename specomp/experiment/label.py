"""What an experiment is called: in the first line of a run, above its summary, in tables."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from specomp.settings import CONF

SETTINGS = ("method.", "calibration.", "quantizer.", "seed=")
SLOT = "method/"


def first_line(hydra: Any, cfg: Any) -> str:
    """Model, method, ratio and calibration of what is about to run."""
    choices, typed = hydra.runtime.choices, hydra.overrides.task
    ratio = [f"ratio={choices['ratio']}", *(x for x in typed if x.startswith("ratio."))]
    named = [cfg.model.name, " ".join([cfg.method.name, *changes(choices, typed)]), " ".join(ratio)]
    text = cfg.corpus.name if cfg.get("corpus") else choices["calibration"]
    return ", ".join([*named, f"calibrated on {text}"])


def changes(choices: Mapping[str, str], overrides: Sequence[str]) -> list[str]:
    """What differs from the method's row as it stands in conf/: slots that were chosen otherwise,
    on the command line or by an experiment, and settings that were typed; the quantizer too.
    """
    method = str(choices.get("method"))
    row = slots_of(method)
    found = []
    if choices.get("quantizer", "none") != "none" and method != "dense":
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
