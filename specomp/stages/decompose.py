"""Spectra of the linears: of the dense model the expensive part of factorization, cached by content and free of any ratio."""

import logging
import math

import torch
from torch import Tensor, nn

from specomp.cache import checksum, digest, if_free, meanwhile
from specomp.errors import UserError, not_finite
from specomp.factors import Norm, Spectrum
from specomp.linalg import SOLVE_DTYPE
from specomp.methods.base import Target, Whitening, describe
from specomp.methods.svd import Weight
from specomp.models.files import first_line
from specomp.modules import LowRankLinear, PivotedLinear
from specomp.ratio import break_even_rank
from specomp.stages.calibrate import DenseStatistics, statistic_key
from specomp.stages.setup import Setup
from specomp.statistics import Stats

log = logging.getLogger(__name__)
# Bumped whenever the same statistics would give another spectrum.
VERSION = 1


class DenseSpectra:
    """Spectra in the norm of a whitening slot, of statistics of the dense model; computed on first use, then read from the cache."""

    def __init__(self, setup: Setup, target: Target, whitening: Whitening, statistics: DenseStatistics, *, complete: bool = False) -> None:
        """complete: keep every component, as a training that chooses among them needs; otherwise those a factorization can store."""
        self.setup, self.target, self.whitening, self.statistics, self.complete = setup, target, whitening, statistics, complete
        self._by_name = {linear.name: linear for linear in setup.linears}
        self.key = digest(
            {
                "version": VERSION,
                "model": setup.model_key,
                "target": describe(target),
                "whitening": describe(whitening),
                "solve_dtype": str(SOLVE_DTYPE),
                "statistics": sorted(statistic_key(setup, x) for x in whitening.needs),
            }
            | ({"complete": True} if complete else {})
        )
        self._last: tuple[str, Spectrum] | None = None

    def __call__(self, name: str) -> Spectrum:
        """The spectrum of one linear, on its device. Unless complete, components beyond break-even keep their singular value only."""
        last = self._last  # read once: the linears of a decoder layer are worked on side by side
        if last is not None and last[0] == name:
            return last[1]
        device = self.setup.device(self._by_name[name].decoder_layer)
        # Side by side, jobs would wait for each other at every linear; so one goes on from the other end.
        with meanwhile(self.setup.cache.lock("spectra", self._entry(name)), self._decompose_another):
            stored = self._stored(name, self.statistics)
        parts: dict[str, Tensor] = {part: tensor.to(device) for part, tensor in stored.items()}
        spectrum = Spectrum(parts["U"], parts["s"], parts["rows"], float(parts["damping"]))
        self._last = (name, spectrum)
        return spectrum

    def forget(self) -> None:
        """Free what was read; it can be read again."""
        self._last = None

    def _entry(self, name: str) -> str:
        """What the lock of one linear's spectrum is called."""
        return digest([self.key, name])

    def _stored(self, name: str, statistics: DenseStatistics) -> dict[str, Tensor]:
        """From the cache, or into it; its lock is held."""
        cache = self.setup.cache
        stored = cache.load("spectra", self.key, name)
        cache.count("spectra", hit=stored is not None)
        if stored is None:
            spectrum = self._decompose(name, statistics)
            stored = {"U": spectrum.U, "s": spectrum.s, "rows": spectrum.rows, "damping": spectrum.s.new_tensor([spectrum.damping])}
            # Laid out as it comes back from the cache: sums over another layout round differently.
            stored = {part: tensor.contiguous() for part, tensor in stored.items()}
            cache.save("spectra", self.key, name, stored)
        return stored

    def _decompose_another(self) -> bool:
        """The last linear that nobody has decomposed or is decomposing, into the cache; False where there is none."""
        setup = self.setup
        if setup.store is not None:  # its decoder layers come one at a time
            return False
        for name in reversed(self._by_name):
            if setup.cache.has("spectra", self.key, name) or self._weight(name) is None:
                continue
            with if_free(setup.cache.lock("spectra", self._entry(name))) as free:
                if free and not setup.cache.has("spectra", self.key, name):
                    # Statistics of its own: other threads may be reading those of the decoder layer they work on.
                    self._stored(name, DenseStatistics(setup, self.statistics.statistics))
                    return True
        return False

    def _decompose(self, name: str, statistics: DenseStatistics) -> Spectrum:
        linear = self._by_name[name]
        keep = None if self.complete else math.ceil(break_even_rank(linear.m, linear.n))
        stats = statistics(name)
        with self.setup.resident(linear.decoder_layer):
            W = self._weight(name)
            assert W is not None, f"{name} is a {type(self.setup.model.get_submodule(name)).__name__}"
            return decompose(self.whitening(stats), self.target(W, stats), name, keep=keep)

    def _weight(self, name: str) -> Tensor | None:
        """(m, n), or None where something else has taken its place."""
        module = self.setup.model.get_submodule(name)
        return module.weight.detach() if isinstance(module, nn.Linear) else None


class StoredSpectra(DenseSpectra):
    """Spectra of what the compressed model stores by now, packed or dense, in a norm of the dense model's statistics.

    One that was stored at rank r has r components; those beyond are rounding. Cached by the numbers that are stored.
    """

    def __init__(self, setup: Setup, whitening: Whitening, statistics: DenseStatistics) -> None:
        super().__init__(setup, Weight(), whitening, statistics, complete=True)
        self.key = digest({"norm": self.key, "stored": stored_numbers(setup)})

    def _weight(self, name: str) -> Tensor | None:
        module = self.setup.model.get_submodule(name)
        return module.merged_weight() if isinstance(module, (LowRankLinear, PivotedLinear)) else super()._weight(name)


def stored_numbers(setup: Setup) -> dict[str, str]:
    """Checksum of what every linear consists of by now, by its name."""
    modules = ((x.name, setup.model.get_submodule(x.name)) for x in setup.linears)
    return {name: checksum({part: value.cpu() for part, value in module.state_dict().items()}) for name, module in modules}


def target_of(target: Target, W: Tensor, stats: Stats, name: str) -> Tensor:
    """target(W, stats), with what is numerically impossible said of the linear it concerns. Raises UserError."""
    try:
        return target(W, stats)
    except ValueError as error:
        raise UserError(f"{name}: {error}: calibrate on more tokens, raise method.target.damping, or use method/target=weight.") from error


def decompose(norm: Norm, target: Tensor, name: str, keep: int | None = None) -> Spectrum:
    """norm.decompose, with what is numerically impossible said of the linear it concerns. Raises UserError."""
    try:
        spectrum = norm.decompose(target, keep=keep)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise not_finite(f"{name}: its decomposition failed ({first_line(error)})") from error
    except ValueError as error:
        raise UserError(
            f"{name}: {error}: calibrate on more tokens or with calibration.precision=float32, raise the damping of method.whitening, "
            "or use method/whitening=gram, which needs no damping."
        ) from error
    if not all(bool(x.isfinite().all()) for x in (spectrum.U, spectrum.s, spectrum.rows)):
        raise not_finite(f"{name}: its factors are not finite")
    return spectrum
