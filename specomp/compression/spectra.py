"""Spectra of the linears: of the dense model the expensive part of factorization, cached by content
and free of any ratio.
"""

import logging
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from specomp.cache import checksum, digest, if_free, meanwhile
from specomp.compression.calibrate import Statistics, statistic_key
from specomp.compression.run import Run
from specomp.errors import UserError, first_line, not_finite
from specomp.forms.prices import numbers
from specomp.models.family import LinearSpec
from specomp.models.modules import Substitute
from specomp.numerics.factors import Norm, Spectrum
from specomp.numerics.linalg import SOLVE_DTYPE
from specomp.numerics.ratio import break_even_rank
from specomp.numerics.statistics import Statistic, Stats
from specomp.settings import configurable
from specomp.slots import Target, Whitening, describe

log = logging.getLogger(__name__)
# Bumped whenever the same statistics would give another spectrum.
VERSION = 1
# What the entry of a linear's singular values is called, behind its name.
VALUES = ".values"


@configurable
class Weight:
    """The target that is the weight itself: T = W."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, W: Tensor, stats: Stats) -> Tensor:
        """W (m, n)."""
        return W


class Spectra:
    """Spectra in the norm of a whitening slot, of statistics of the dense model; computed on first
    use, then read from the cache.
    """

    def __init__(
        self,
        run: Run,
        target: Target,
        whitening: Whitening,
        statistics: Statistics,
        *,
        complete: bool,
    ) -> None:
        """complete: keep every component, as a training that chooses among them needs; otherwise
        those that can be stored.
        """
        self.run, self.target, self.whitening, self.statistics = run, target, whitening, statistics
        self.complete = complete or stores_more(run)
        self._by_name = {linear.name: linear for linear in run.linears}
        said = {
            "version": VERSION,
            "model": run.model_key,
            "target": describe(target),
            "whitening": describe(whitening),
            "solve_dtype": str(SOLVE_DTYPE),
            "statistics": sorted(statistic_key(run, x) for x in whitening.needs),
        }
        # of target and norm, however many components are kept
        self.norm_key = digest(said)
        self.key = digest(said | {"complete": True}) if self.complete else self.norm_key
        self._last: tuple[str, Spectrum] | None = None
        self._values: dict[str, Tensor] = {}

    def __call__(self, linear: LinearSpec) -> Spectrum:
        """The spectrum of one linear, on its device. Unless complete, components beyond break-even
        keep their singular value only.
        """
        last = self._last  # read once: the linears of a decoder layer are worked on side by side
        if last is not None and last[0] == linear.name:
            return last[1]
        device = self.run.device(linear.decoder_layer)
        # Side by side, jobs would wait for each other at every linear; so one goes on from the
        # other end.
        with meanwhile(
            self.run.cache.lock("spectra", self._entry(linear.name)), self._decompose_another
        ):
            stored = self._stored(linear, self.statistics)
        parts: dict[str, Tensor] = {part: tensor.to(device) for part, tensor in stored.items()}
        spectrum = Spectrum(parts["U"], parts["s"], parts["rows"], float(parts["damping"]))
        self._last = (linear.name, spectrum)
        return spectrum

    def values(self, linear: LinearSpec) -> Tensor:
        """(k): all singular values of one linear, on its device; without reading its vectors where
        these are in the cache.
        """
        if linear.name not in self._values:
            cache = self.run.cache
            found = cache.load("spectra", self.key, f"{linear.name}{VALUES}")
            if found is None:
                self._values[linear.name] = self(linear).s
            else:
                cache.count("spectra", hit=True)
                self._values[linear.name] = found["s"].to(self.run.device(linear.decoder_layer))
        return self._values[linear.name]

    def forget(self) -> None:
        """Free what was read; it can be read again."""
        self._last = None

    def _entry(self, name: str) -> str:
        """What the lock of one linear's spectrum is called."""
        return digest([self.key, name])

    def _stored(self, linear: LinearSpec, statistics: Statistics) -> dict[str, Tensor]:
        """From the cache, or into it; its lock is held."""
        cache, name = self.run.cache, linear.name
        stored = cache.load("spectra", self.key, name)
        cache.count("spectra", hit=stored is not None)
        if stored is None:
            spectrum = self._decompose(linear, statistics)
            stored = {
                "U": spectrum.U,
                "s": spectrum.s,
                "rows": spectrum.rows,
                "damping": spectrum.s.new_tensor([spectrum.damping]),
            }
            # Laid out as it comes back from the cache: sums over another layout round differently.
            stored = {part: tensor.contiguous() for part, tensor in stored.items()}
            cache.save("spectra", self.key, name, stored)
        if not cache.has("spectra", self.key, f"{name}{VALUES}"):
            cache.save("spectra", self.key, f"{name}{VALUES}", {"s": stored["s"]})
        return stored

    def _decompose_another(self) -> bool:
        """The last linear that nobody has decomposed or is decomposing, into the cache; False where
        there is none.
        """
        run = self.run
        if run.store is not None:  # its decoder layers come one at a time
            return False
        for name, linear in reversed(self._by_name.items()):
            if run.cache.has("spectra", self.key, name) or self._weight(name) is None:
                continue
            with if_free(run.cache.lock("spectra", self._entry(name))) as free:
                if free and not run.cache.has("spectra", self.key, name):
                    # Statistics of its own: other threads may be reading those of the decoder layer
                    # they work on.
                    self._stored(linear, type(self.statistics)(run, self.statistics.statistics))
                    return True
        return False

    def _decompose(self, linear: LinearSpec, statistics: Statistics) -> Spectrum:
        keep = None if self.complete else kept_components(linear, complete=False)
        stats = statistics(linear)
        with self.run.resident(linear.decoder_layer):
            W = self._weight(linear.name)
            assert W is not None, (
                f"{linear.name} is a {type(self.run.model.get_submodule(linear.name)).__name__}"
            )
            return decompose(self.whitening(stats), self.target(W, stats), linear.name, keep=keep)

    def _weight(self, name: str) -> Tensor | None:
        """(m, n), or None where something else has taken its place."""
        module = self.run.model.get_submodule(name)
        return module.weight.detach() if isinstance(module, nn.Linear) else None


class StoredSpectra(Spectra):
    """Spectra of what the compressed model stores by now, packed or dense, in a norm of the dense
    model's statistics.

    One that was stored at rank r has r components; those beyond are rounding. Cached by the numbers
    that are stored.
    """

    def __init__(self, run: Run, statistics: Statistics) -> None:
        super().__init__(run, Weight(), run.method.whitening, statistics, complete=True)
        self.key = self.norm_key = digest({"norm": self.key, "stored": stored_numbers(run)})

    def _weight(self, name: str) -> Tensor | None:
        module = self.run.model.get_submodule(name)
        return module.merged_weight() if isinstance(module, Substitute) else super()._weight(name)


def kept_components(linear: LinearSpec, *, complete: bool) -> int:
    """Components whose vectors a cached spectrum has: all, or those that two factors can store."""
    full = min(linear.m, linear.n)
    return full if complete else min(full, math.ceil(break_even_rank(linear.m, linear.n)))


def stores_more(run: Run) -> bool:
    """Whether the method's form comes in ranks from two factors' break-even on, for any linear."""
    if run.method.packing.size_of != "rank":
        return False
    for unit in run.units:
        (linear,) = unit.linears
        beyond = math.ceil(break_even_rank(linear.m, linear.n))
        form, dense = run.method.packing, linear.params
        if beyond in form.sizes(unit) and numbers(form.parts(unit, beyond)) < dense:
            return True
    return False


def stored_numbers(run: Run) -> dict[str, str]:
    """Checksum of what every linear consists of by now, by its name."""
    modules = ((x.name, run.model.get_submodule(x.name)) for x in run.linears)
    return {
        name: checksum({part: value.cpu() for part, value in module.state_dict().items()})
        for name, module in modules
    }


def target_of(target: Target, W: Tensor, stats: Stats, name: str) -> Tensor:
    """target(W, stats), with what is numerically impossible said of the linear it concerns. Raises
    UserError.
    """
    try:
        return target(W, stats)
    except ValueError as error:
        raise UserError(
            f"{name}: {error}: calibrate on more tokens, raise method.target.damping, or use"
            " method/target=weight."
        ) from error


def decompose(norm: Norm, target: Tensor, name: str, keep: int | None = None) -> Spectrum:
    """norm.decompose, with what is numerically impossible said of the linear it concerns. Raises
    UserError.
    """
    try:
        spectrum = norm.decompose(target, keep=keep)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise not_finite(f"{name}: its decomposition failed ({first_line(error)})") from error
    except ValueError as error:
        raise UserError(
            f"{name}: {error}: calibrate on more tokens or with calibration.precision=float32,"
            " raise the damping of method.whitening, or use method/whitening=gram, which needs no"
            " damping."
        ) from error
    if not all(bool(x.isfinite().all()) for x in (spectrum.U, spectrum.s, spectrum.rows)):
        raise not_finite(f"{name}: its factors are not finite")
    return spectrum
