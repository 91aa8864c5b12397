"""What a benchmark's number is."""

from dataclasses import dataclass
from typing import Literal

FRACTION = "fraction"  # a unit: of documents, printed in percent


@dataclass(frozen=True)
class Metric:
    """What a number is: its unit ("" for none), and whether more of it is better."""

    unit: str
    better: Literal["higher", "lower"]
