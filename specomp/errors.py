"""The one exception whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """Input that cannot work. Message: what happened, where, the numbers, what to change; run.py prints it as one line and exits 1."""


def not_finite(what: str) -> UserError:
    """What to make of numbers that are none, wherever they show first."""
    return UserError(
        f"{what}: a weight is not finite, or activations overflow the model's dtype; see whether the dense model's perplexity is finite, "
        "or use model.dtype=float32."
    )
