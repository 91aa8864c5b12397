"""What a run does around the compression itself."""

from typing import Annotated, Literal

from pydantic import Field

from specomp.models.identity import Form
from specomp.settings import configurable


@configurable
class Options:
    """See conf/config.yaml, where every field is explained."""

    save: bool
    export: Form
    reference: bool
    retry: bool
    redo: bool
    plan: bool | Literal["a100", "h100", "h200", "rtx4090"]  # of numerics/work.py
    profile: bool
    threads: Annotated[int, Field(ge=1, le=1024)] | None  # more than any machine gains by
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy's range
