"""Ledgers for tests of what is made of records."""

from typing import Any

from specomp.compression.ledger import Ledger

SIZE = {
    "linear_params": 1000,
    "model_params": 2000,
    "model_bytes": 8000,
    "held_bytes": 8000,
    "macs_per_token": 1500,
}
HALF = {
    "linear_params": 588,
    "model_params": 1588,
    "model_bytes": 6352,
    "held_bytes": 6352,
    "macs_per_token": 1088,
}


def made_ledger(
    *, dense: dict[str, int] | None = None, compressed: dict[str, int] | None = None, **fields: Any
) -> Ledger:
    """Of a model that lost 40 % of 1000 parameters, with what is given instead."""
    told = {
        "target_retention": 0.6,
        "target_compression": 0.4,
        "measured_retention": 0.588,
        "measured_retention_model": 0.794,
        "num_linears": 21,
    }
    sizes = {"dense": SIZE | (dense or {}), "compressed": HALF | (compressed or {})}
    return Ledger.from_dict(told | sizes | fields)
