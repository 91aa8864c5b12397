"""What a benchmark's number is."""

from dataclasses import dataclass
from typing import Literal

# Units, both printed in percent: of right answers, which tables have a mean of; and any other.
FRACTION = "fraction"
SHARE = "share"
PERCENT = (FRACTION, SHARE)


PROBES = ("repeated_4grams", "refused_harmful", "refused_harmless")
# What a number was measured on, or the same number said another way; in records, not in summaries.
DETAILS = {"nll", "ppl_finite", "tokens", "windows", "window", "collapsed", "n", "chance", "texts"}
# Shares, and what may be a small part of one.
FINE = {"acc", "exact_match", "agreement", "kl", *PROBES}
# Beside a first one that tables have a column for.
SECOND = {"nonfinite_windows", "nonfinite_texts", "acc_norm"}


def is_detail(metric: str) -> bool:
    """Whether a number of a benchmark is no result of its own."""
    return metric in DETAILS or metric.endswith("_stderr") or "_bytes" in metric


def is_quoted(metric: str) -> bool:
    """Whether a table of all records has a column for it, unasked: no times of one machine."""
    return not (is_detail(metric) or metric in SECOND or "_per_s" in metric)


def digits(metric: str) -> int:
    """How many a number of a benchmark is printed with, after the point."""
    first = metric.partition(".")[0]
    return 4 if first in FINE or first.startswith("acc_") or first.endswith("_acc") else 2


@dataclass(frozen=True)
class Metric:
    """What a number is: its unit ("" for none), and whether more of it is better. column: it has
    one of its own in tables, beside the metric that they quote.
    """

    unit: str
    better: Literal["higher", "lower"]
    column: bool = False
