"""What forms are made of: the norm, the target, the spectrum and the factors of a linear, as the
route of the method says.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from specomp.cache import digest, waiting
from specomp.compression.calibrate import Statistics, statistic_key
from specomp.compression.observe import stats_of
from specomp.compression.run import Run
from specomp.compression.spectra import Spectra, decompose, target_of
from specomp.errors import UserError, not_finite
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.elimination import VERSION
from specomp.numerics.factors import LowRankFactors, Norm, Spectrum, truncate
from specomp.numerics.linalg import relative
from specomp.numerics.statistics import Statistic, Stats
from specomp.slots import Chain, Rounded, Rounding, Trained, describe

SMALL = 2**18  # bytes of what is remembered in memory too
Values = Mapping[str, Tensor]
"""What a decoder layer accumulated, by place and statistic."""


class DenseEvidence:
    """Of the dense model, before anything is compressed: what predicts losses."""

    rounding: Rounding | None = None

    def __init__(self, run: Run, spectra: Spectra) -> None:
        self.run, self.spectra = run, spectra
        # what several forms ask for that differ in what they make of it, such as their grids
        self.known: dict[tuple[Unit, Any], Mapping[str, Tensor]] = {}

    def stats(self, linear: LinearSpec) -> Stats:
        """What its spectra are made of."""
        return self.spectra.statistics(linear)

    def weight(self, linear: LinearSpec) -> Tensor:
        """T (m n)."""
        W = linear_module(self.run.model, linear).weight.detach()
        return target_of(self.spectra.target, W, self.stats(linear), linear.name)

    def spectrum(self, linear: LinearSpec) -> Spectrum:
        """From the cache, or into it."""
        return self.spectra(linear)

    def singular_values(self, linear: LinearSpec) -> Tensor:
        """From the cache, or into it."""
        return self.spectra.values(linear)

    def norm(self, linear: LinearSpec) -> Norm:
        """Of these statistics."""
        return self.spectra.whitening(self.stats(linear))

    def remembered(
        self,
        unit: Unit,
        made_by: Any,
        make: Callable[[], Mapping[str, Tensor]],
        reads: frozenset[Statistic] = frozenset(),
    ) -> Mapping[str, Tensor]:
        """From the cache, or into it."""
        asked: tuple[Unit, Any] | None = (unit, made_by)
        try:
            known = self.known.get((unit, made_by))
        except TypeError:  # settings that have no hash
            asked = known = None
        if known is not None:
            return known
        run = self.run
        what = {"version": VERSION, "spectra": self.spectra.key, "of": describe(made_by)}
        if reads:
            what["spectra"] = self.spectra.norm_key
            what["reads"] = sorted(statistic_key(run, x) for x in reads)
        key = digest(what)
        found = run.cache.load("units", key, unit.name)
        if found is None:
            lock = run.cache.lock("units", digest([key, unit.name]))
            with waiting(lock, f"works on {unit.name}"):
                found = run.cache.load("units", key, unit.name)
                run.cache.count("units", hit=found is not None)
                if found is None:
                    with run.resident(unit.decoder_layer):
                        found = dict(make())
                    run.cache.save("units", key, unit.name, found)
        else:
            run.cache.count("units", hit=True)
        if asked is not None and sum(x.nbytes for x in found.values()) <= SMALL:
            self.known[asked] = found
        return found

    def on(self, rounding: Rounding) -> Self:
        """The same, which rounds so."""
        found = copy.copy(self)
        found.rounding = rounding
        return found

    def lost(self, linear: LinearSpec, share: float) -> None:
        """Of a trial: not reported."""

    def factors(self, linear: LinearSpec, rank: int) -> LowRankFactors:
        """Truncated, not compensated: what a probe tries."""
        return truncate(self.spectrum(linear), rank)

    def rounded(self, linear: LinearSpec, chain: Chain) -> tuple[Rounded, ...]:
        """As they are, but for trials of a grid."""
        if self.rounding is None:
            return tuple(map(Rounded, chain.matrices))
        dtype = self.place(linear)["dtype"]
        return rounded_by(self.rounding, linear, chain, self.stats(linear), dtype)

    def bias(self, linear: LinearSpec) -> Tensor | None:
        """Of the linear."""
        return self.run.model.get_submodule(linear.name).bias  # type: ignore[return-value]

    def dense(self, linear: LinearSpec) -> nn.Module:
        """The linear itself."""
        return self.run.model.get_submodule(linear.name)

    def place(self, linear: LinearSpec) -> dict[str, Any]:
        """dtype and device of the linear."""
        weight = linear_module(self.run.model, linear).weight
        return {"dtype": weight.dtype, "device": weight.device}


@dataclass
class Account:
    """What was found out about one linear on the way. See LinearReport."""

    norm_error: float | None = None
    compensation_gain: float | None = None
    quantization_error: float | None = None
    quantization_damping: float = 0.0


@dataclass
class LayerEvidence(DenseEvidence):
    """Of one decoder layer that is being compressed, on the inputs that the route says."""

    run: Run
    spectra: Spectra
    statistics: Statistics
    whitening: Values  # what the decoder layer saw of compressed inputs: for the norm,
    compensation: Values  # and for the repair
    trained: Trained | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)  # chosen, by linear
    known: dict[tuple[Unit, Any], Mapping[str, Tensor]] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    _norms: dict[str, tuple[Stats, Norm, Tensor]] = field(default_factory=dict)
    _spectra: dict[str, Spectrum] = field(default_factory=dict)

    def account(self, linear: LinearSpec) -> Account:
        """Of one linear."""
        return self.accounts.setdefault(linear.name, Account())

    def stats(self, linear: LinearSpec) -> Stats:
        """Of the inputs that the norm sees."""
        return self._seen(linear)[0]

    def norm(self, linear: LinearSpec) -> Norm:
        """In which errors count."""
        return self._seen(linear)[1]

    def weight(self, linear: LinearSpec) -> Tensor:
        """T (m n) on these inputs."""
        return self._seen(linear)[2]

    def remembered(
        self,
        unit: Unit,
        made_by: Any,
        make: Callable[[], Mapping[str, Tensor]],
        reads: frozenset[Statistic] = frozenset(),
    ) -> Mapping[str, Tensor]:
        """Of these inputs: from the cache only where they are the dense model's."""
        if self.run.route.caches_spectra:
            return super().remembered(unit, made_by, make, reads)
        return make()

    def lost(self, linear: LinearSpec, share: float) -> None:
        """Kept for the report."""
        self.account(linear).norm_error = share

    def _seen(self, linear: LinearSpec) -> tuple[Stats, Norm, Tensor]:
        if linear.name not in self._norms:
            method, streamed = self.run.method, self.run.route.whitening.streamed
            stats = self.statistics(linear)
            if streamed:
                stats = Stats({**stats, **stats_of(linear, self.whitening, streamed)})
            if self.trained is not None:  # the linear itself is gone by now
                whole = self.spectra(linear)
                target = whole.U @ whole.rows
            else:
                target = target_of(
                    method.target,
                    linear_module(self.run.model, linear).weight.detach(),
                    stats,
                    linear.name,
                )
            self._norms[linear.name] = stats, method.whitening(stats), target
        return self._norms[linear.name]

    def spectrum(self, linear: LinearSpec) -> Spectrum:
        """In the norm of these inputs."""
        if linear.name not in self._spectra:
            if self.run.route.caches_spectra:
                found = self.spectra(linear)
            else:
                found = decompose(
                    self.norm(linear),
                    self.weight(linear),
                    linear.name,
                    keep=self.sizes[linear.name],
                )
            self._spectra[linear.name] = found
        return self._spectra[linear.name]

    def singular_values(self, linear: LinearSpec) -> Tensor:
        """In the norm of these inputs."""
        return self.spectrum(linear).s

    def factors(self, linear: LinearSpec, rank: int) -> LowRankFactors:
        """Truncated and compensated; or what a training kept. Raises UserError where they are not
        finite.
        """
        if self.trained is not None:
            return self.trained.factors(linear, rank)
        factors, repair = truncate(self.spectrum(linear), rank), self.run.method.compensation
        if not repair.needs:
            return factors
        stats, target = self._repair_stats(linear), self.weight(linear).float()
        repaired = repair(target, factors, stats)
        if not (repaired.U.isfinite().all() and repaired.Vt.isfinite().all()):
            raise not_finite(f"{linear.name}: its repaired factors are not finite")
        after, before = (repair.loss(x.product() - target, stats) for x in (repaired, factors))
        self.account(linear).compensation_gain = relative(after, before)
        return repaired

    def _repair_stats(self, linear: LinearSpec) -> Stats:
        streamed = self.run.route.compensation.streamed
        return (
            stats_of(linear, self.compensation, streamed) if streamed else self.statistics(linear)
        )

    def rounded(self, linear: LinearSpec, chain: Chain) -> tuple[Rounded, ...]:
        """On the inputs that the route says. Raises UserError where that is numerically
        impossible.
        """
        rounding = self.rounding or self.run.method.rounding
        stats = (
            self._repair_stats(linear)
            if self.run.route.rounds == "compensation"
            else self.stats(linear)
        )
        # of gradients, which only the dense model has
        if missing := rounding.needs - stats.keys():
            stats = Stats({**stats, **{x: self.statistics(linear)[x] for x in missing}})
        found = rounded_by(rounding, linear, chain, stats, self.place(linear)["dtype"])
        if all(x.exact for x in found):
            return found
        account, norm = self.account(linear), self.norm(linear)
        before = chain.assemble(*(x.float() for x in chain.matrices))
        after = chain.assemble(*(x.values for x in found))
        account.quantization_error = relative(norm.loss(after - before), norm.loss(before))
        account.quantization_damping = max(x.damping for x in found)
        return found

    def bias(self, linear: LinearSpec) -> Tensor | None:
        """Of the linear, with what a training adds."""
        own = super().bias(linear)
        return own if self.trained is None else self.trained.bias(linear, own)

    def dense(self, linear: LinearSpec) -> nn.Module:
        """The linear itself, or one with the weight that a training left."""
        if self.trained is None or linear.name in self.trained.left:
            return super().dense(linear)
        factors, dtype = self.trained.factors(linear, min(linear.m, linear.n)), self.run.model.dtype
        weight = factors.product().to(dtype)
        # of an MLP that was cut it is smaller than the linear
        whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        whole.weight = nn.Parameter(weight)
        bias = self.bias(linear)
        whole.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.to(whole.weight.device, dtype))
        )
        return whole

    def place(self, linear: LinearSpec) -> dict[str, Any]:
        """dtype and device of what is stored."""
        return (
            {"dtype": self.run.model.dtype, "device": self.run.device(linear.decoder_layer)}
            if self.trained
            else super().place(linear)
        )

    def hold(self, linear: LinearSpec, spectrum: Spectrum) -> None:
        """Use this spectrum of it."""
        self._spectra[linear.name] = spectrum

    def forget(self, linear: LinearSpec) -> None:
        """Free what was made of one linear."""
        self._norms.pop(linear.name, None)
        self._spectra.pop(linear.name, None)


def rounded_by(
    rounding: Rounding, linear: LinearSpec, chain: Chain, stats: Stats, dtype: torch.dtype
) -> tuple[Rounded, ...]:
    """The matrices; stats: of the linear's inputs. Raises UserError where that is numerically
    impossible.
    """
    inputs = chain.inputs
    if inputs is not None:
        stats = stats.part(None, inputs) if inputs.ndim == 1 else stats.through(inputs)
    try:
        return rounding(chain, stats, dtype)
    except ValueError as error:
        raise UserError(
            f"{linear.name}, quantizing it: {error}: calibrate on more tokens, or raise"
            " quantizer.damping."
        ) from error


def linear_module(model: nn.Module, linear: LinearSpec) -> nn.Linear:
    """The dense module behind a spec."""
    module = model.get_submodule(linear.name)
    assert isinstance(module, nn.Linear), f"{linear.name} is a {type(module).__name__}"
    return module
