"""specomp: SVD-based compression of language models. See api.py.

`import specomp` costs no import of torch, and makes compressed folders loadable by transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specomp.models.registration import register_when_needed

if TYPE_CHECKING:
    from specomp.api import (
        Bits,
        Calibration,
        Divergence,
        Method,
        Numbers,
        Progress,
        Report,
        compress,
        load,
        perplexity,
        save,
    )
    from specomp.errors import UserError
    from specomp.models.convert import convert
    from specomp.pricing import plan
    from specomp.rows import method, method_names

__version__ = "0.1.0"
__all__ = [
    "Bits", "Calibration", "Divergence", "Method", "Numbers", "Progress", "Report", "UserError",
    "compress", "convert", "load", "method", "method_names", "perplexity", "plan", "save",
]  # fmt: skip
ELSEWHERE = {
    "UserError": "errors", "convert": "models.convert",
    "method": "rows", "method_names": "rows", "plan": "pricing",
}  # fmt: skip

register_when_needed()


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'specomp' has no attribute {name!r}")
    found = getattr(import_module(f"specomp.{ELSEWHERE.get(name, 'api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
