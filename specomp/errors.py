"""The one exception whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """Input that cannot work. Message: what happened, where, the numbers, what to change; run.py prints it as one line and exits 1."""
