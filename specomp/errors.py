"""The one exception whose message is meant for the person at the keyboard, and how the words of
others are quoted in it.
"""

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class UserError(ValueError):
    """Input that cannot work. Message: what happened, where, the numbers, what to change; run.py
    prints it as one line and exits 1.
    """


def needed(package: str, extra: str, what: str, otherwise: str = "") -> None:
    """Raises UserError where the package of an extra is not installed. package: as it is imported;
    otherwise: what to do without it.
    """
    if find_spec(package) is None:
        hint = f"pip install 'specomp[{extra}]'{otherwise}"
        raise UserError(f"{what} needs {package.replace('_', '-')}: {hint}.")


def meant(typed: str, known: Iterable[str]) -> str:
    """How a message about an unknown name ends: with the closest of those there are, or all."""
    known = list(known)
    close = difflib.get_close_matches(typed, known, n=1)
    return f"; did you mean {close[0]}?" if close else f": there are {', '.join(known)}."


def not_finite(what: str) -> UserError:
    """What to make of numbers that are none, wherever they show first."""
    return UserError(
        f"{what}: a weight is not finite, or activations overflow the model's dtype; see whether"
        " the dense model's perplexity is finite, or use model.dtype=float32."
    )


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, limit: int = 300) -> str:
    """All that an exception of another library says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
