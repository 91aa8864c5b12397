"""From counted work to seconds on this device: a short measurement of its speed, and what fraction of that speed a run reaches."""

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from specomp.models.load import device_name
from specomp.planning.work import Kind, Work, eigen

# Seconds each kind of speed is measured for; bytes copied; width of the product and of the eigenproblem on a CPU and on other devices.
PROBE_SECONDS, PROBE_BYTES = 0.12, 2**26
PROBE_WIDTH, PROBE_EIGEN = {"cpu": 768}, {"cpu": 320}
WIDE, WIDE_EIGEN = 4096, 1024
# What a run reaches of the measured speed, its matrices being narrower. Checked on SmolLM2-135M, one thread of an AMD EPYC
# (AVX-512), 64 samples of 512 tokens at cr40: adasvd, fwsvd and specomp took 0.91 to 0.98 of the estimate in the CPU time of the whole run.
EFFICIENCY: dict[Kind, float] = {"product": 0.75, "factorization": 0.9, "memory": 0.8, "disk": 1.0}
# Of 16-bit products, which are over sooner than what surrounds them: fitted on the trainings of experiments/soco (two threads, bfloat16).
EFFICIENCY_HALF = 0.4
# Bytes a second of cache entries (checksummed and written) or of a model folder: fitted on the same runs, not measured here.
DISK_SPEED = 5e8
# Bytes of CPU memory that a run takes before it holds anything: what Lightning, datasets and the first products add to this process.
OVERHEAD = 1.0e8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one device by itself: operations or bytes a second by (kind, dtype), as measured.

    busy: how many times longer the measurement took than its own work, because of other programs on the processor.
    """

    device: str
    threads: int
    rates: dict[tuple[Kind, str], float]
    busy: float

    def seconds(self, work: Work) -> float:
        """Estimated time of counted work. Kinds are added up: on a CPU they do not overlap."""
        return sum(amount / (self.rates[key] * efficiency(*key)) for key, amount in work.amounts.items() if amount)


def efficiency(kind: Kind, dtype: str) -> float:
    """The fraction of the measured speed that a run reaches."""
    return EFFICIENCY_HALF if dtype in ("bfloat16", "float16") else EFFICIENCY[kind]


def speed_for(works: list[Work], device: torch.device) -> Speed:
    """Measure what these need, a fraction of a second each, with torch's threads as they are set."""
    needed = sorted({key for work in works for key, amount in work.amounts.items() if amount})
    start = Clock.now(device.type)
    rates = {key: _rate(key[0], key[1], device.type, torch.get_num_threads()) for key in needed}
    spent = Clock.now(device.type) - start
    return Speed(device=device_name(device), threads=torch.get_num_threads(), rates=rates, busy=spent.wall / max(spent.own, 1e-9))


@functools.cache
def _rate(kind: Kind, dtype: str, device: str, threads: int) -> float:
    if kind == "disk":
        return DISK_SPEED
    if kind == "memory":
        source = torch.ones(PROBE_BYTES // 4, device=device)
        target = torch.empty_like(source)
        return 2 * PROBE_BYTES / _seconds(lambda: target.copy_(source), device, threads)
    number = getattr(torch, dtype)
    if kind == "factorization":
        k = PROBE_EIGEN.get(device, WIDE_EIGEN)
        matrix = torch.randn(k, k, dtype=number, device=device)
        matrix = matrix @ matrix.T
        return eigen(k) / _seconds(lambda: torch.linalg.eigh(matrix), device, threads)
    n = PROBE_WIDTH.get(device, WIDE)
    matrix = torch.randn(n, n, device=device).to(number)
    return 2 * n**3 / _seconds(lambda: matrix @ matrix, device, threads)


@dataclass(frozen=True)
class Clock:
    """Seconds on the wall, and of them those that this thread worked: a CPU shared with other programs is not a slower CPU."""

    wall: float
    own: float

    @staticmethod
    def now(device: str) -> "Clock":
        """After everything that was started has ended."""
        if device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter()
        return Clock(wall, time.thread_time() if device == "cpu" else wall)

    def __sub__(self, other: "Clock") -> "Clock":
        return Clock(self.wall - other.wall, self.own - other.own)


def _seconds(act: Callable[[], object], device: str, threads: int) -> float:
    """Time of one call: the best on the wall with all threads, or of one thread by itself where the others wait for other programs."""
    if device != "cpu":
        return min(x.wall for x in _calls(act, device))
    try:
        torch.set_num_threads(1)
        alone = statistics.median(x.own for x in _calls(act, device))
    finally:
        torch.set_num_threads(threads)
    return alone if threads == 1 else min(alone, *(x.wall for x in _calls(act, device)))


def _calls(act: Callable[[], object], device: str) -> list[Clock]:
    """Repeated calls, after a first one."""
    act()
    spent: list[Clock] = []
    while not spent or (sum(x.own for x in spent) < PROBE_SECONDS and sum(x.wall for x in spent) < 4 * PROBE_SECONDS):
        start = Clock.now(device)
        act()
        spent.append(Clock.now(device) - start)
    return spent


def resident() -> float:
    """Bytes of CPU memory that this process has taken, libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
