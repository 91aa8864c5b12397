"""Compression: every linear truncated to its rank, repaired and packed, decoder layer by decoder layer.

Calibration only, as a predict-only LightningModule: no optimizer, no gradient. Where a slot asks for inputs from the compressed model,
the hidden states of the calibration set travel along (stages/stream.py).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from specomp.errors import UserError, not_finite
from specomp.factors import GramNorm, LowRankFactors, QuantizedFactors, Spectrum, truncate
from specomp.linalg import relative
from specomp.methods.base import Method, Quantizer, Upstream
from specomp.methods.block_refine import BlockRefine
from specomp.models.family import LinearSpec
from specomp.modules import PivotedLinear, replace_linear
from specomp.ratio import is_low_rank
from specomp.stages.calibrate import DenseStatistics, linear_module, predict
from specomp.stages.decompose import DenseSpectra, decompose, target_of
from specomp.stages.observe import stats_of
from specomp.stages.refine import refined, refinement_key
from specomp.stages.setup import Setup
from specomp.stages.stream import HiddenStream
from specomp.statistics import GRADIENT_SCOPES, Statistic, Stats

# Largest min(m, n) of a decoder layer whose linears are worked on side by side.
SMALL = 1024
# Points of a spectrum that a report keeps.
SPECTRUM_POINTS = 13


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """What happened to one linear. Errors are relative Frobenius norms; loss is ||D (W' - T) S||_F in the method's own norm."""

    name: str
    m: int
    n: int
    rank: int
    stored: int
    dense: bool
    weight_error: float = 0.0
    norm_error: float = 0.0
    # Achieved loss over the Eckart-Young bound at this rank: 1 certifies the solver; above 1 is what compensation and dtype moved.
    loss_over_bound: float = 1.0
    # Loss on the compensation's own inputs after over before it; null without compensation. Of a block refinement it is the loss of the
    # decoder layer's outputs, and the errors above are those before it.
    compensation_gain: float | None = None
    damping: float = 0.0
    # Of the rounded product to the unrounded one, in the method's norm; null without quantization. Damping: the most of both Hessians.
    quantization_error: float | None = None
    quantization_damping: float = 0.0
    # Largest coefficient of a pivoted linear in absolute value; null for other packings.
    growth: float | None = None
    # Singular values in the method's norm over the largest, from the first to the last at equal distances; empty for a dense linear.
    spectrum: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class CompressionModule(L.LightningModule):
    """One predict step per decoder layer: observe it (if it must see compressed inputs), factorize its linears, pack, move on."""

    def __init__(
        self,
        setup: Setup,
        method: Method,
        quantizer: Quantizer,
        ranks: Mapping[str, int],
        spectra: DenseSpectra,
        dense: DenseStatistics,
        finished: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, so that Lightning neither moves nor registers the model.
        self._setup, self.finished = (setup,), finished
        self.method, self.quantizer, self.ranks, self.spectra, self.dense = method, quantizer, ranks, spectra, dense
        self.reports: list[LinearReport] = []
        upstream = setup.calibration.upstream
        self.quantize_from = quantizer_reads(method, upstream, quantizer)
        self.whiten_needs = seen_by_the_norm(method) | (quantizer.needs if self.quantize_from == "whitening" else frozenset())
        self.repair_needs = method.compensation.needs | (quantizer.needs if self.quantize_from == "repair" else frozenset())
        # Gradients are the dense model's: nothing else has the loss of a whole model.
        self.streamed_needs = frozenset(x for x in self.whiten_needs if x.scope not in GRADIENT_SCOPES)
        self.whiten_streamed = upstream == "compressed" and bool(self.streamed_needs)
        self.refinement = method.compensation if isinstance(method.compensation, BlockRefine) else None
        self.repair_streamed = method.compensation.upstream == "compressed" and bool(method.compensation.needs)
        self.stream: HiddenStream | None = None
        self.dense_stream: HiddenStream | None = None  # where a statistic compares both models

    def on_predict_start(self) -> None:
        """Embed the calibration set if anything has to see compressed inputs."""
        if self.whiten_streamed or self.repair_streamed or self.refinement:
            setup, limit = self._setup[0], self.method.compensation.num_samples
            samples = setup.samples
            if not self.whiten_streamed and limit is not None and limit < samples.num_samples:
                samples = samples.subset(limit)  # no other sample has a reader
            self.stream = HiddenStream(replace(setup, samples=samples))
            if self.refinement or any(x.scope == "pair" for x in self.streamed_needs):
                self.dense_stream = self.stream.twin()

    @torch.no_grad()
    def predict_step(self, batch: int, batch_idx: int) -> None:
        """Compress decoder layer `batch`."""
        setup = self._setup[0]
        with setup.resident(batch):
            self._compress_layer(batch)
            # Before the next decoder layer comes in.
            self.dense.forget()
            self.spectra.forget()
            if self.stream is not None:
                self.stream.advance(batch)
            if self.finished is not None:
                self.finished(batch)

    def _compress_layer(self, index: int) -> None:
        setup = self._setup[0]
        streamed = self._observe(index)
        linears = [linear for linear in setup.linears if linear.decoder_layer == index]
        if self.dense.statistics:
            self.dense.layer(index)  # read once, before several workers ask for it
        with one_thread_each(linears, setup.device(index)) as run:
            reports = list(run(lambda linear: self._compress(linear, *streamed), linears))
        if self.refinement and not all(x.dense for x in reports):
            assert self.stream is not None and self.dense_stream is not None
            key = refinement_key(setup, self.method, self.ranks)
            gain = refined(setup, self.refinement, key, index, self.stream, self.dense_stream)
            reports = [x if x.dense else replace(x, compensation_gain=gain) for x in reports]
        self.reports.extend(reports)

    def _observe(self, index: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What the still dense decoder layer sees of compressed inputs: for the whitening, and for the repair."""
        if self.stream is None:
            return {}, {}
        whitening = self.streamed_needs if self.whiten_streamed else frozenset()
        repair = self.repair_needs if self.repair_streamed else frozenset()
        limit = self.method.compensation.num_samples
        if limit is None:
            values = self._observe_all(self.stream, index, whitening | repair)
            return values, values
        first = self._observe_all(self.stream, index, whitening) if whitening else {}
        return first, self.stream.observe(index, repair, limit) if repair else {}

    def _observe_all(self, stream: HiddenStream, index: int, needs: frozenset[Statistic]) -> Mapping[str, Tensor]:
        if self.dense_stream is None:
            return stream.observe(index, needs)
        if not needs:
            return self.dense_stream.advance(index)
        return stream.observe_beside(index, needs, self.dense_stream)

    @torch.no_grad()
    def _compress(self, linear: LinearSpec, whitening_values: Mapping[str, Tensor], repair_values: Mapping[str, Tensor]) -> LinearReport:
        start, method, setup = time.perf_counter(), self.method, self._setup[0]
        rank = self.ranks[linear.name]
        report = LinearReport(name=linear.name, m=linear.m, n=linear.n, rank=rank, stored=linear.params, dense=True)
        if not is_low_rank(linear.m, linear.n, rank, method.packing.stored):
            return report
        module = linear_module(setup.model, linear)
        W = module.weight.detach()
        whitening_stats = self.dense(linear.name)
        if self.whiten_streamed:
            whitening_stats = Stats({**whitening_stats, **stats_of(linear, whitening_values, self.streamed_needs)})
        target, norm = target_of(method.target, W, whitening_stats, linear.name), method.whitening(whitening_stats)
        spectrum = decompose(norm, target, linear.name, keep=rank) if self.whiten_streamed else self.spectra(linear.name)
        factors = truncate(spectrum, rank)
        repair_stats = stats_of(linear, repair_values, self.repair_needs) if self.repair_streamed else self.dense(linear.name)
        if method.compensation.needs:
            repaired = method.compensation(target.float(), factors, repair_stats)
            if not (repaired.U.isfinite().all() and repaired.Vt.isfinite().all()):
                raise not_finite(f"{linear.name}: its repaired factors are not finite")
            report = replace(report, compensation_gain=_gain(method, repair_stats, target, factors, repaired))
            factors = repaired
        seen = repair_stats if self.quantize_from == "repair" else whitening_stats
        stored = quantize(self.quantizer, factors, seen, W.dtype, linear.name)
        packed = method.packing(module, stored)
        setup.model.get_submodule(linear.name).requires_grad_(False)
        replace_linear(setup.model, linear.name, packed.requires_grad_(False))
        return replace(
            report,
            dense=False,
            stored=sum(p.numel() for name, p in packed.named_parameters() if not name.endswith("bias")),
            damping=spectrum.damping,
            growth=packed.growth() if isinstance(packed, PivotedLinear) else None,
            seconds=time.perf_counter() - start,
            **errors_of(packed.merged_weight(), target.float(), norm, spectrum, rank),  # type: ignore[operator]
            **quantization_of(factors, stored, norm),  # type: ignore[arg-type]
        )


def quantizer_reads(method: Method, upstream: Upstream, quantizer: Quantizer) -> Literal["whitening", "repair", "dense"]:
    """Whose inputs the quantizer looks at: those that passed through compressed decoder layers where the method has such (GPTQ's scripts
    run on the compressed model), on as many samples as the method reads there; else the dense model's."""
    if not quantizer.needs or method.training.trains == "spectrum":
        return "dense"
    if upstream == "compressed":
        return "whitening"
    return "repair" if method.compensation.upstream == "compressed" and method.compensation.needs else "dense"


def quantize(quantizer: Quantizer, factors: LowRankFactors, stats: Stats, dtype: torch.dtype, name: str) -> LowRankFactors:
    """The quantizer, with what is numerically impossible said of the linear it concerns. Raises UserError."""
    try:
        return quantizer(factors, stats, dtype)
    except ValueError as error:
        raise UserError(f"{name}, quantizing its factors: {error}: calibrate on more tokens, or raise quantizer.damping.") from error


def quantization_of(factors: LowRankFactors, stored: LowRankFactors, norm: Any) -> dict[str, float]:
    """What rounding did to a linear; nothing where nothing was rounded."""
    if not isinstance(stored, QuantizedFactors):
        return {}
    product = factors.product().float()
    error = relative(norm.loss(stored.product() - product), norm.loss(product))
    return {"quantization_error": error, "quantization_damping": stored.damping}


def seen_by_the_norm(method: Method) -> frozenset[Statistic]:
    """Statistics that the target and its norm are made of."""
    return method.target.needs | method.whitening.needs


def dense_needs(method: Method, upstream: Upstream, quantizer: Quantizer) -> frozenset[Statistic]:
    """Statistics of the dense model that a method reads; the others are taken on the way. Raises UserError where that cannot be."""
    repair, needs = method.compensation, method.allocation.needs
    if quantizer_reads(method, upstream, quantizer) == "dense":
        needs |= quantizer.needs
    seen = seen_by_the_norm(method)
    gradients = frozenset(x for x in seen if x.scope in GRADIENT_SCOPES)
    if upstream == "dense":
        if any(x.scope == "pair" for x in seen):
            raise UserError("The target compares inputs of the dense and of the compressed model: set calibration.upstream=compressed.")
        needs |= seen
    elif gradients and gradients == seen:
        raise UserError("The whitening reads gradients of the dense model's loss alone: set calibration.upstream=dense.")
    else:
        needs |= gradients
    if repair.upstream == "dense" and repair.needs:
        if repair.num_samples is not None:
            raise UserError(
                f"A compensation on dense inputs reads every sample, this one num_samples={repair.num_samples} of them: set "
                "method.compensation.upstream=compressed, or num_samples=null (for AdaComp stack_of_batch=gram, which reads all)."
            )
        needs |= repair.needs
    return needs


@contextmanager
def one_thread_each(linears: Sequence[LinearSpec], device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over the linears of a decoder layer: side by side on a CPU where they are small, one after the other elsewhere.

    Small eigenproblems do not fill several threads (two of 576 at once on two cores: 12 % faster than one after the other on both,
    and everything around them overlaps); those of large models do. The longest start first: the last linear of a decoder layer is
    often the longest, and everyone would wait for it (a fifth of the time of SmolLM2). Results keep the order of the linears.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or max(min(x.m, x.n) for x in linears) > SMALL:
        yield map
        return
    try:
        with ThreadPoolExecutor(min(threads, len(linears)), initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def longest_first(work: Callable[[LinearSpec], Any], linears: Sequence[LinearSpec]) -> Iterable[Any]:
                ordered = sorted(linears, key=lambda x: (x.params, x.n), reverse=True)
                done = dict(zip(ordered, pool.map(work, ordered), strict=True))
                return [done[x] for x in linears]

            yield longest_first
    finally:
        torch.set_num_threads(threads)


def errors_of(packed: Tensor, target: Tensor, norm: Any, spectrum: Spectrum, rank: int) -> dict[str, Any]:
    """Relative errors of what is actually stored, in its dtype, the certificate against the Eckart-Young bound, and its spectrum."""
    error = packed - target
    loss = norm.loss(error)
    whole = float(spectrum.s.double().square().sum().sqrt())
    bound = spectrum.tail(rank)
    return {
        "weight_error": relative(float(error.norm()), float(target.norm())),
        "norm_error": relative(loss, whole),
        # A bound that is rounding noise itself certifies nothing.
        "loss_over_bound": loss / bound if bound > 1e-6 * whole else 1.0,
        "spectrum": sampled(spectrum.s),
    }


def sampled(s: Tensor) -> str:
    """SPECTRUM_POINTS of singular values (k,), descending, over the largest."""
    index = torch.linspace(0, len(s) - 1, SPECTRUM_POINTS).round().long()
    return " ".join(f"{relative(float(x), float(s[0])):.3g}" for x in s[index.to(s.device)])


def _gain(method: Method, stats: Stats, target: Tensor, before: LowRankFactors, after: LowRankFactors) -> float:
    norm = GramNorm(next(iter(stats[x] for x in method.compensation.needs)))
    return relative(norm.loss(after.product() - target.float()), norm.loss(before.product() - target.float()))


def compress(
    setup: Setup,
    method: Method,
    quantizer: Quantizer,
    ranks: Mapping[str, int],
    spectra: DenseSpectra,
    dense: DenseStatistics,
    finished: Callable[[int], None] | None = None,
) -> list[LinearReport]:
    """Replace the model's linears by their packed factors; returns one report per linear.

    finished: told of every decoder layer when its modules are final; those of a streamed model lose their numbers after that.
    """
    setup.model.requires_grad_(False)  # also where every statistic came from the cache and no calibration pass did it
    module = CompressionModule(setup, method, quantizer, ranks, spectra, dense, finished)
    count = len(setup.layers)
    predict(setup.trainer, module, range(count), f"compress with {method.name}", count)
    return module.reports
