"""The one exception whose message is meant for the person at the keyboard, and how the words of
others are quoted in it.
"""


class UserError(ValueError):
    """Input that cannot work. Message: what happened, where, the numbers, what to change; run.py
    prints it as one line and exits 1.
    """


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
