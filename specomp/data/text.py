"""What every source of text offers, whether it comes from the hub, from a folder or from the Python
installation.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pydantic import BeforeValidator


@runtime_checkable
class TextSource(Protocol):
    """One long text with a name and a description of where it came from."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def max_documents(self) -> int | None: ...

    def text(self) -> str:
        """The whole text. Raises UserError when it cannot be had."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able: name, split, origin (no machine path), documents, characters, sha256 of the
        text, fingerprint.
        """
        ...


def plain(value: Any) -> Any:
    """Mappings of a composed config as built-in dicts, at every depth: pydantic builds nested
    settings from dicts only.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


Plain = BeforeValidator(plain)


def text_sha256(text: str) -> str:
    """sha256 (hex) of the UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def describe_text(
    name: str, *, split: str, origin: str, documents: Sequence[str], text: str
) -> dict[str, Any]:
    """The description shared by all sources; `fingerprint` is the same on one line."""
    sha256 = text_sha256(text)
    return {
        "name": name,
        "split": split,
        "origin": origin,
        "documents": len(documents),
        "characters": len(text),
        "sha256": sha256,
        "fingerprint": f"{name}/{split} ({origin}), {len(text)} characters, sha256:{sha256[:16]}",
    }
