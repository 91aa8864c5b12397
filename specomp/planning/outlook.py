"""What counting a request yields: its stages, and the bytes it needs here and there."""

from dataclasses import dataclass

from specomp.compression.ledger import Size
from specomp.experiment.config import Request
from specomp.planning.sizes import ModelShape, Ranks
from specomp.planning.work import Work


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, called as a record calls it. held: bytes beside the dense model; unknown: work that could not be counted."""

    name: str
    detail: str
    work: Work
    held: float
    sure: bool = True  # nothing in it is an estimate but its time
    unknown: bool = False


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Everything counted of one request."""

    request: Request
    shape: ModelShape
    ranks: Ranks
    compressed: Size
    samples: int
    length: int
    statistics_held: int
    statistics_cached: int
    spectra_cached: int
    hidden_carried: int
    refined_cached: int
    teacher_cached: int
    stages: list[Stage]
    notes: list[str]
