"""Settings: where the yamls are, and the check that every class they name in `_target_` makes of
types and ranges when it is built, before anything is loaded.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

C = TypeVar("C")
HERE = Path(__file__).parent
# in a wheel, in the repository
INSTALLED = (HERE / "conf").is_dir()
CONF = HERE / "conf" if INSTALLED else HERE.parent / "conf"
PROGRAM = "specomp" if INSTALLED else "python run.py"  # as it is typed there


BESIDE: list[Path] = []  # the folder of one's own yamls, of --config-dir


def choices(group: str) -> list[str]:
    """The files of a group."""
    found = (path for root in (CONF, *BESIDE) for path in (root / group).glob("[!_]*.yaml"))
    return sorted({path.stem for path in found})


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configurable(cls: type[C]) -> type[C]:
    """A frozen, keyword-only dataclass whose fields are validated by pydantic; unknown fields are
    refused.

    Ranges are written on the field: `compression: Annotated[float, Field(ge=0, lt=1)]`. Defaults
    live in the yaml, not here.
    """
    make: Callable[[type], Any] = dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    )
    return make(cls)  # type: ignore[no-any-return]


def default_cache() -> Path:
    """Where the cache is unless it is said otherwise; conf/config.yaml says the same."""
    return Path(os.environ.get("SPECOMP_CACHE") or "~/.cache/specomp").expanduser()
