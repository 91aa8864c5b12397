"""plan=true."""

from typing import Any


def show_plan(request: Any) -> None:
    """Being rebuilt."""
    raise NotImplementedError
