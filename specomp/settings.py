"""Typed settings: every class a yaml names in `_target_` checks its types and ranges when it is
built, before anything is loaded.
"""

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

C = TypeVar("C")


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
