"""Counted work and this machine's speed: operations as torch counts them, bytes through memory and
on disk, and seconds of both.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

Kind = Literal["product", "factorization", "memory", "disk"]
aten = torch.ops.aten
# Seconds each kind of speed is measured for; bytes copied; width of the product and of the
# eigenproblem on a CPU and elsewhere.
PROBE_SECONDS, PROBE_BYTES = 0.12, 2**26
WIDTHS = {"cpu": (768, 320)}
WIDE = (4096, 1024)
# What a run reaches of the measured speed, its matrices being narrower
# (experiments/benchmarks/README.md says where from).
EFFICIENCY: dict[Kind, float] = {"product": 0.75, "factorization": 0.9, "memory": 0.8, "disk": 1.0}
# Of 16-bit products, which are over sooner than what surrounds them.
EFFICIENCY_HALF = 0.4
# Bytes a second of cache entries (checksummed and written) or of a model folder: fitted, not
# measured here.
DISK_SPEED = 5e8


@dataclass(frozen=True)
class Work:
    """Amounts by (kind, dtype): operations, or bytes for memory and disk, whose dtype is ''. A
    multiply-add is two operations.
    """

    amounts: Mapping[tuple[Kind, str], float] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        keys = {**self.amounts, **other.amounts}
        return Work({key: self.amounts.get(key, 0.0) + other.amounts.get(key, 0.0) for key in keys})

    def __mul__(self, times: float) -> "Work":
        return Work({key: times * amount for key, amount in self.amounts.items()})

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1

    def of(self, *kinds: Kind) -> float:
        """The amount of some kinds."""
        return sum(amount for (kind, _), amount in self.amounts.items() if kind in kinds)

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return self.of("product", "factorization")


def work(kind: Kind, amount: float, dtype: torch.dtype | None = None) -> Work:
    """An amount of one kind."""
    return Work({(kind, "" if dtype is None else str(dtype).removeprefix("torch.")): amount})


# What torch's own registry does not count, by the usual leading terms (Golub and Van Loan, Matrix
# Computations, 5.2, 5.4.5, 8.3): units of time, not what a library does. Each takes the operation's
# arguments.
def _svd(A: Tensor, *_: Any, **__: Any) -> float:
    k, longer = min(A.shape), max(A.shape)
    return 6 * longer * k**2 + 20 * k**3


def _qr(A: Tensor, *_: Any, **__: Any) -> float:
    m, n = max(A.shape), min(A.shape)
    return 2 * m * n**2 - 2 * n**3 / 3


FACTORIZATIONS: dict[Any, Callable[..., float]] = {
    aten._linalg_eigh: lambda A, *_, **__: 9 * len(A) ** 3,
    aten._linalg_svd: _svd,
    aten.geqrf: _qr,
    aten.linalg_qr: lambda A, *_, **__: 2 * _qr(A),
    aten.ormqr: lambda A, tau, C, *_, **__: (
        4 * len(C) * len(tau) * C.shape[1] - 2 * len(tau) ** 2 * C.shape[1]
    ),
    aten.linalg_cholesky_ex: lambda A, *_, **__: len(A) ** 3 / 3,
    aten.linalg_lu_factor_ex: lambda A, *_, **__: (
        max(A.shape) * min(A.shape) ** 2 - min(A.shape) ** 3 / 3
    ),
    aten.linalg_inv_ex: lambda A, *_, **__: 2 * len(A) ** 3,
    aten.linalg_solve_triangular: lambda A, B, *_, **__: len(A) ** 2 * B.numel() / len(A),
    aten.cholesky_solve: lambda B, A, *_, **__: 2 * len(A) * B.numel(),
}


class Counter(TorchDispatchMode):
    """Counts what runs inside, on any device, meta included: products, factorizations, and the
    bytes that all else moves.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        seen = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        dtype = seen[0].dtype if seen else None
        if packet in flop_registry:
            self.work += work("product", flop_registry[packet](*args, **kwargs, out_val=out), dtype)
        elif packet in FACTORIZATIONS:
            self.work += work("factorization", FACTORIZATIONS[packet](*args, **kwargs), dtype)
        elif not func.is_view and seen:
            moved = [*seen, *(x for x in tree_leaves(out) if isinstance(x, Tensor))]
            self.work += work("memory", sum(x.numel() * x.element_size() for x in moved))
        return out


def seconds(work: Work, rates: Mapping[tuple[Kind, str], float]) -> float:
    """Estimated time of counted work. Kinds are added up: on a CPU they do not overlap."""
    return sum(
        amount / (rates[key] * efficiency(*key)) for key, amount in work.amounts.items() if amount
    )


def efficiency(kind: Kind, dtype: str) -> float:
    """The fraction of the measured speed that a run reaches."""
    return EFFICIENCY_HALF if dtype in ("bfloat16", "float16") else EFFICIENCY[kind]


def needed(works: list[Work]) -> list[tuple[Kind, str]]:
    """The kinds and dtypes of which there is some."""
    return sorted({key for x in works for key, amount in x.amounts.items() if amount})


def measured_rates(works: list[Work], device: torch.device) -> dict[tuple[Kind, str], float]:
    """Operations or bytes a second of what these need, each measured for a moment with torch's
    threads as they are set.
    """
    return {
        key: _rate(key[0], key[1], device.type, torch.get_num_threads()) for key in needed(works)
    }


# Peaks as their makers state them (dense, without sparsity, TF32 off), in operations or bytes a
# second: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and GeForce RTX 4090. What
# factorizations reach is stated nowhere; here they are given the share of the float32 peak that
# eigenproblems of 4096 have on such devices, about 1 in 40: an assumption.
class Device(NamedTuple):
    """Operations a second by dtype, bytes a second and bytes of its memory."""

    float64: float
    float32: float
    half: float  # 16 bits
    memory: float
    room: float


STATED = {
    "a100": Device(9.7e12, 19.5e12, 312e12, 2.04e12, 80e9),
    "h100": Device(34e12, 67e12, 989e12, 3.35e12, 80e9),
    "h200": Device(34e12, 67e12, 989e12, 4.8e12, 141e9),
    "rtx4090": Device(1.29e12, 82.6e12, 165e12, 1.01e12, 24e9),
}
FACTORIZED = 1 / 40


def stated_rates(works: list[Work], name: str) -> dict[tuple[Kind, str], float]:
    """The same of a device that is not here, by name."""
    device = STATED[name]

    def rate(kind: Kind, dtype: str) -> float:
        if kind == "disk":
            return DISK_SPEED
        if kind == "memory":
            return device.memory
        peak: float = getattr(device, dtype, device.half)
        return peak if kind == "product" else FACTORIZED * min(peak, device.float32)

    return {key: rate(*key) for key in needed(works)}


@functools.cache
def _rate(kind: Kind, dtype: str, device: str, threads: int) -> float:
    if kind == "disk":
        return DISK_SPEED
    n, k = WIDTHS.get(device, WIDE)
    if kind == "memory":
        values: dict[str, Any] = {
            "a": torch.ones(PROBE_BYTES // 4, device=device),
            "b": torch.ones(PROBE_BYTES // 4, device=device),
        }
        statement, amount = "b.copy_(a)", 2.0 * PROBE_BYTES
    elif kind == "factorization":
        half = torch.randn(k, k, dtype=getattr(torch, dtype), device=device)
        values = {"a": half @ half.T, "eigh": torch.linalg.eigh}
        statement = "eigh(a)"
        amount = 9.0 * k**3
    else:
        values = {"a": torch.randn(n, n, device=device).to(getattr(torch, dtype))}
        statement = "a @ a"
        amount = 2.0 * n**3
    timer = Timer(statement, globals=values, num_threads=threads)
    return amount / timer.blocked_autorange(min_run_time=PROBE_SECONDS).median
