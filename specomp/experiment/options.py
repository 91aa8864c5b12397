"""What a run does around the compression itself."""

from typing import Annotated

from pydantic import AfterValidator, Field

from specomp.models.identity import Form
from specomp.numerics.work import STATED
from specomp.settings import configurable


def _known(plan: bool | str) -> bool | str:
    if isinstance(plan, str) and plan not in STATED:
        raise ValueError(f"there are true, false, {', '.join(STATED)}")
    return plan


@configurable
class Options:
    """See conf/config.yaml, where every field is explained."""

    save: bool
    export: Form
    reference: bool
    retry: bool
    redo: bool
    plan: Annotated[bool | str, AfterValidator(_known)]  # a device's name: of numerics/work.py
    profile: bool
    threads: Annotated[int, Field(ge=1, le=1024)] | None  # more than any machine gains by
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy's range

    @property
    def elsewhere(self) -> str | None:
        """The device that a plan is for, where it is not this machine's."""
        return self.plan if isinstance(self.plan, str) else None
