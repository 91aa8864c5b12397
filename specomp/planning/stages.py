"""The stages of a run as work and memory: what pipeline.py will do with a request, counted instead of done."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from specomp.compression.ledger import Size
from specomp.compression.loop import dense_needs, quantizer_reads, seen_by_the_norm
from specomp.data.token_ids import read_token_ids
from specomp.experiment.checks import check_budget, check_training
from specomp.experiment.config import Request
from specomp.forms.options import full_rank
from specomp.forms.pivoted import Pivoted
from specomp.methods.block_refine import BlockRefine
from specomp.numerics.ratio import break_even_rank, is_low_rank
from specomp.numerics.statistics import GRADIENT_SCOPES, Precision, Statistic
from specomp.planning.outlook import Outlook, Stage
from specomp.planning.sizes import (
    FLOAT,
    ModelShape,
    Ranks,
    check_context,
    compressed_size,
    kept_components,
    norm_of,
    num_bytes,
    ranks_of,
    shape_of,
    spectrum_bytes,
    values_of_layer,
)
from specomp.planning.texts import Reading, readings
from specomp.planning.work import (
    NOTHING,
    Work,
    backward,
    decomposition,
    disk,
    forward,
    memory,
    packed_errors,
    pivoting,
    reduction,
    repair,
    rounding,
)
from specomp.training.phases import Distillation

# Tensors of the residual stream and of the MLP's width that are alive at once in a decoder layer's forward pass, and those that it keeps
# for the backward pass; float32 logits alive at once in a cross-entropy with its gradient.
ALIVE_HIDDEN, ALIVE_MLP, KEPT_HIDDEN, KEPT_MLP, ALIVE_LOGITS = 6, 3, 14, 5, 3


def outlook(request: Request) -> Outlook:
    """Count a request. Reads no text, no weights and no network, but a file of token ids. Raises UserError."""
    shape = shape_of(request.source.config_for_plan(request.cache), request.source.dtype)
    samples, length = calibration_size(request)
    check_context(shape, length)
    if not request.method.is_dense:
        check_budget(shape.linears, request.ratio.retention, request.method.packing.stored)
    if request.method.training.trains != "nothing":
        check_training(request.method, request.calibration.upstream, samples, request.processes)
    ranks = ranks_of(request.method, request.ratio, shape.linears)
    return _Counting(request, shape, ranks, samples, length).outlook()


def calibration_size(request: Request) -> tuple[int, int]:
    """Samples, and tokens of each."""
    spec: Any = request.calibration
    if spec.num_samples is not None and spec.length is not None:
        return int(spec.num_samples), int(spec.length)
    rows, length = read_token_ids(spec.path).shape
    return spec.num_samples or rows, spec.length or length


class _Counting:
    """The quantities that the stages share."""

    def __init__(self, request: Request, shape: ModelShape, ranks: Ranks, samples: int, length: int) -> None:
        self.request, self.shape, self.ranks, self.samples, self.length = request, shape, ranks, samples, length
        method, spec = request.method, request.calibration
        self.tokens, self.batch = samples * length, min(spec.batch_size, samples)
        self.batches = math.ceil(samples / self.batch)
        self.taught = length * (method.training.samples_of(samples) if isinstance(method.training, Distillation) else 0)
        self.trains = method.training.trains != "nothing"
        self.gated = method.training.trains == "spectrum"
        half = spec.precision == "bfloat16" and shape.dtype == torch.float32
        self.dtype = torch.bfloat16 if half else shape.dtype
        wide = spec.accumulate == "float64"
        products = torch.float64 if wide else torch.float32 if spec.precision == "float32" else torch.bfloat16
        self.precision = Precision(torch.float64 if wide else torch.float32, products)
        self.compressed = compressed_size(shape, method, request.quantizer, ranks.by_name)
        self.needs = frozenset() if method.is_dense else dense_needs(method, spec.upstream, request.quantizer)
        quantize_from = quantizer_reads(method, spec.upstream, request.quantizer)
        seen = frozenset(x for x in seen_by_the_norm(method) if x.scope not in GRADIENT_SCOPES)
        self.whiten_streamed = spec.upstream == "compressed" and bool(seen) and not self.gated
        self.refinement = method.compensation if isinstance(method.compensation, BlockRefine) else None
        self.streamed: frozenset[Statistic] = frozenset()
        if self.whiten_streamed:
            self.streamed |= seen | (request.quantizer.needs if quantize_from == "whitening" else frozenset())
        if method.compensation.upstream == "compressed" and method.compensation.needs:
            self.streamed |= method.compensation.needs | (request.quantizer.needs if quantize_from == "repair" else frozenset())
        limit = method.compensation.num_samples
        self.stream_samples = samples if self.whiten_streamed or limit is None else min(limit, samples)
        self.whitening_values = values_of_layer(method.whitening.needs, shape, self.precision)
        self.repair_values = values_of_layer(method.compensation.needs, shape, self.precision)
        cost = method.packing.stored
        self.low = [x for x in shape.linears if is_low_rank(x.m, x.n, ranks.by_name[x.name], cost)]
        self.complete = self.gated or any(is_low_rank(x.m, x.n, math.ceil(break_even_rank(x.m, x.n)), cost) for x in shape.linears)

    # --- the whole

    def outlook(self) -> Outlook:
        request, shape = self.request, self.shape
        layer = num_bytes(values_of_layer(self.needs, shape, self.precision).values())
        window = min(request.calibration.window or shape.num_layers, shape.num_layers)
        stages = [self.load()]
        read = [r for label, part in request.suite.parts.items() for r in readings(part, label)]
        method, dense = request.method, request.method.is_dense
        if read and request.options.reference and not dense:
            stages.append(self.evaluate(read, "evaluate dense", shape.size))
        if not dense:
            stages += [self.calibrate(), self.allocate()]
            rest = [self.compress()] + ([self.train()] if self.trains else [])
            stages += rest[::-1] if self.gated and not method.repairs else rest
        if request.options.save and not dense:
            size = self.compressed.model_bytes
            stages.append(Stage(name="save", detail="a folder", work=disk(size), held=size))
        if read:
            stages.append(self.evaluate(read, "evaluate", self.compressed))
        hidden = self.stream_samples * self.length * shape.hidden * shape.dtype.itemsize * self.num_streams
        return Outlook(
            request=request,
            shape=shape,
            ranks=self.ranks,
            compressed=self.compressed,
            samples=self.samples,
            length=self.length,
            statistics_held=layer * window,
            statistics_cached=layer * shape.num_layers,
            spectra_cached=0 if dense else sum(spectrum_bytes(x, complete=self.complete) for x in self.decomposed),
            hidden_carried=hidden,
            refined_cached=self.refined_bytes() if self.refinement else 0,
            teacher_cached=self.taught * shape.hidden * shape.dtype.itemsize,
            stages=stages,
            notes=list(self.notes()),
        )

    @property
    def decomposed(self) -> Sequence[Any]:
        """Linears whose spectra go through the cache."""
        if self.gated or self.ranks.asked in ("spectra", "trials"):
            return self.shape.linears
        return [] if self.whiten_streamed else self.low

    def notes(self) -> Iterable[str]:
        """What a reader of the numbers should know."""
        method, shape = self.request.method, self.shape
        if self.ranks.asked:
            yield f"the allocation asks for {self.ranks.asked}: the ranks shown are uniform ones, at the same budget"
        if hasattr(self.request.source, "repo"):
            yield f"downloading the weights ({shape.size.model_bytes / 1e9:.1f} GB, once) is not counted"
        if not method.is_dense:
            yield "nothing is taken from the cache here; jobs that share model and calibration share statistics, spectra and dense metrics"
        if isinstance(method.packing, Pivoted):
            yield "exchanges of pivot rows depend on the weights and are not counted"
        if getattr(method.whitening, "solve", None) == "auto" and not method.is_dense:
            yield "eigenproblems are counted in float32; solve=auto repeats those in float64 that it cannot resolve"
        if self.trains and self.request.processes > 1:
            yield f"the training is counted for one process, not for {self.request.processes}"

    # --- stages

    def load(self) -> Stage:
        size = self.shape.size
        return Stage(name="load", detail=f"{size.model_params:,} parameters", work=disk(size.model_bytes), held=0)

    def activations(self, sequences: int, length: int) -> float:
        """Bytes alive in a forward pass without gradients."""
        shape, tokens = self.shape, sequences * length
        return tokens * (ALIVE_HIDDEN * shape.hidden + ALIVE_MLP * shape.widest) * shape.dtype.itemsize

    def calibrate(self) -> Stage:
        shape, spec = self.shape, self.request.calibration
        window = min(spec.window or shape.num_layers, shape.num_layers)
        starts = range(0, shape.num_layers, window)
        work, passes, held = NOTHING, [], 0.0
        for gradients in (False, True):
            chosen = [x for x in self.needs if (x.scope in GRADIENT_SCOPES) == gradients]
            if not chosen:
                continue
            updates = self.samples if gradients else self.batches
            values = {s: values_of_layer([s], shape, self.precision) for s in chosen}
            for statistic, found in values.items():
                products = torch.promote_types(self.precision.products, torch.float32) if gradients else self.precision.products
                for value in found.values():
                    each = reduction(statistic, value, self.samples, self.length, products, updates)
                    work += each * shape.num_layers
            for start in starts:
                layers = min(window, shape.num_layers - start)
                work += forward(shape, self.tokens, self.length, self.dtype, linears=shape.size.linear_params, head=gradients)
                if gradients:
                    weights = sum(x.params for x in shape.layer) * layers if any(x.scope == "linear" for x in chosen) else 0
                    share = (shape.num_layers - start) / shape.num_layers
                    linears = shape.size.linear_params
                    work += backward(shape, self.tokens, self.length, self.dtype, linears=linears, share=share, weights=weights)
                    work += memory(4 * FLOAT * weights * self.samples)
            total = num_bytes(v for found in values.values() for v in found.values())
            work += disk(total * shape.num_layers)
            alive = self.activations(self.batch, self.length)
            if gradients:
                alive = self.kept(self.length) * shape.num_layers + ALIVE_LOGITS * self.length * shape.vocabulary * FLOAT
            # One decoder layer's values are mirrored beside its sums.
            held = max(held, total * (window + 1) + alive)
            kind = "forward and backward" if gradients else "forward"
            passes.append(f"{len(starts)} x {self.tokens:,} tokens {kind}")
        return Stage(name="calibrate", detail="; ".join(passes) or "no statistics", work=work, held=held)

    def kept(self, length: int) -> float:
        """Bytes that one decoder layer keeps of one sequence for its backward pass."""
        shape = self.shape
        return length * (KEPT_HIDDEN * shape.hidden + KEPT_MLP * shape.widest) * shape.dtype.itemsize

    def spectra(self) -> Work:
        """Decomposing the linears and storing the components."""
        work = NOTHING
        for linear in self.decomposed:
            norm = norm_of(self.request.method.whitening, linear, self.whitening_values)
            work += decomposition(linear, norm, kept_components(linear, complete=self.complete))
            work += disk(spectrum_bytes(linear, complete=self.complete))
        return work

    def allocate(self) -> Stage:
        asked, shape = self.ranks.asked, self.shape
        if asked not in ("spectra", "trials"):
            return Stage(name="allocate", detail="", work=NOTHING, held=0)
        work, detail = self.spectra(), f"{len(self.decomposed)} eigenproblems"
        if asked == "trials":
            trials = len(shape.linears) * len(getattr(self.request.method.allocation, "candidates", ()))
            work += forward(shape, self.tokens, self.length, shape.dtype, linears=shape.size.linear_params, head=True) * trials
            detail += f"; {trials:,} trials of {self.tokens:,} tokens"
        return Stage(name="allocate", detail=detail, work=work, held=self.activations(1, self.length) + self.workspace())

    def compress(self) -> Stage:
        method, shape, request = self.request.method, self.shape, self.request
        # What was repaired is decomposed and packed once more after its training.
        again = self.gated and method.repairs
        early = (self.gated and not again) or self.ranks.asked in ("spectra", "trials")
        work = NOTHING if early else self.spectra()
        for linear in self.low:
            rank, norm = self.ranks.by_name[linear.name], norm_of(method.whitening, linear, self.whitening_values)
            if self.whiten_streamed and not early:
                work += decomposition(linear, norm, full_rank(linear))
            if method.compensation.needs:
                value = self.repair_values[f"site{linear.site}:{next(iter(method.compensation.needs)).name}"]
                work += repair(linear, method.compensation, rank, value)
            if isinstance(method.packing, Pivoted):
                work += pivoting(linear, rank) * (1 + again)
            if request.quantizer.bits < 16:
                work += rounding(linear, request.quantizer, rank)
            work += packed_errors(linear, norm, rank) * (1 + again)
        detail = f"{len(self.low)} linears"
        held = self.workspace() + num_bytes(values_of_layer(self.needs, shape, self.precision).values())
        if self.num_streams:
            work += self.stream()
            tokens = self.stream_samples * self.length
            held += tokens * shape.hidden * shape.dtype.itemsize * self.num_streams + self.activations(self.batch, self.length)
            held += 2 * num_bytes(values_of_layer(self.streamed, shape, self.precision).values())
            detail += f"; {tokens:,} tokens carried through every decoder layer {1 + self.num_streams} times"
            if self.refinement:
                detail += f"; {self.refinement.steps} steps each"
        return Stage(name="compress", detail=detail, work=work, held=held)

    @property
    def num_streams(self) -> int:
        """Models whose hidden states are carried along: none, the compressed one, or the dense one beside it."""
        if self.refinement or any(x.scope == "pair" for x in self.streamed):
            return 2
        return 1 if self.streamed else 0

    def refined_bytes(self) -> int:
        """Fitted linears as they are stored, biases and the order of pivot rows included."""
        item = self.shape.dtype.itemsize
        biases = sum(x.m for x in self.shape.linears if x.name in self.shape.biased)
        order = self.compressed.held_bytes - self.compressed.model_params * item
        return (self.compressed.linear_params + biases) * item + order

    def stream(self) -> Work:
        """Each decoder layer once dense, observed, and once compressed; where both models are compared, once more on dense inputs."""
        shape, tokens = self.shape, self.stream_samples * self.length
        work = NOTHING
        for linears in (*[shape.size.linear_params] * self.num_streams, self.compressed.linear_params):
            work += forward(shape, tokens, self.length, self.dtype, linears=linears, head=False)
        if self.refinement:  # the loss before and after; its steps: forward, and gradients of activations and of weights
            seen = 2 * tokens + 3 * self.refinement.steps * self.batch * self.length
            work += forward(shape, seen, self.length, self.dtype, linears=self.compressed.linear_params, head=False)
        batches = math.ceil(self.stream_samples / self.batch)
        for statistic in self.streamed:
            for value in values_of_layer([statistic], shape, self.precision).values():
                each = reduction(statistic, value, self.stream_samples, self.length, self.precision.products, batches)
                work += each * shape.num_layers
        return work

    def workspace(self) -> float:
        """Bytes in flight around the largest linear: copies of its weight and its Gram, in float64 where something is solved in it."""
        wide = 2 if self.request.method.compensation.needs or any(v.ndim == 2 for v in self.whitening_values.values()) else 1
        return max(wide * FLOAT * (3 * x.params + min(x.m, x.n) ** 2 * 3 + x.n**2) for x in self.shape.layer)

    def train(self) -> Stage:
        """The teacher once; every step forward and backward, through the components that exist in its phase or through what is stored."""
        shape, training = self.shape, self.request.method.training
        assert isinstance(training, Distillation)
        dtype = torch.bfloat16 if training.precision == "bfloat16" else torch.float32
        everything = sum(min(x.m, x.n) * (x.m + x.n) for x in shape.linears) if self.gated else self.compressed.linear_params
        exist, steps = float(everything), 0
        work = self.spectra() if self.gated else NOTHING
        work += forward(shape, self.taught, self.length, self.dtype, linears=shape.size.linear_params, head=False)
        work += disk(self.taught * shape.hidden * shape.dtype.itemsize)
        for phase in training.schedule.values():
            tokens = phase.steps * training.batch_size * self.length
            each = forward(shape, tokens, self.length, dtype, linears=exist, head=True)
            each += forward(shape, tokens, self.length, dtype, linears=0, head=True)  # the teacher's logits
            each += backward(shape, tokens, self.length, dtype, linears=exist)
            if training.activation_checkpointing:
                each += forward(shape, tokens, self.length, dtype, linears=exist, head=False)
            held_out = training.held_out * self.length
            work += each + forward(shape, 2 * held_out, self.length, dtype, linears=exist, head=True)
            steps += phase.steps
            if phase.prune_margin is not None:
                exist = min(exist, phase.prune_margin * self.request.ratio.retention * sum(x.params for x in shape.linears))
        sequences = training.micro_batch_size
        layers = 1 if training.activation_checkpointing else shape.num_layers
        narrow = dtype.itemsize / shape.dtype.itemsize
        held = float(self.compressed.held_bytes - shape.size.held_bytes)
        if self.gated:
            held = everything * dtype.itemsize - shape.size.linear_params * shape.dtype.itemsize
        held += self.kept(self.length) * sequences * layers * (1 + narrow) / 2
        held += 6 * training.token_chunk * shape.vocabulary * FLOAT + shape.head * dtype.itemsize
        total = steps * training.batch_size * self.length
        detail = f"{len(shape.linears)} eigenproblems; " if self.gated else ""
        detail += f"{self.taught:,} tokens of the teacher; {steps} steps, {total:,} tokens"
        return Stage(name="train", detail=detail, work=work, held=held)

    def evaluate(self, read: Sequence[Reading], name: str, size: Size) -> Stage:
        shape, work, held = self.shape, NOTHING, 0.0
        linears = size.macs_per_token - shape.head
        for reading in read:
            dtype = torch.bfloat16 if reading.half and shape.dtype == torch.float32 else shape.dtype
            if reading.tokens:
                # A step of one token reads every weight once.
                run = reading.tokens - reading.decoded * reading.batch
                work += forward(shape, run, reading.length, dtype, linears=linears, head=True) + memory(reading.decoded * size.held_bytes)
            longest = reading.longest or reading.length
            # Logits in the dtype of the products, and in a harness task all of them in float32 beside that.
            logits = reading.batch * longest * shape.vocabulary * (dtype.itemsize + (FLOAT if reading.longest else 0))
            held = max(held, self.activations(reading.batch, longest) + logits)
        known = sum(r.tokens or 0 for r in read)
        sure = all(r.sure in ("", "at most") for r in read)
        unknown = [r.label for r in read if r.tokens is None]
        detail = f"{known:,} tokens" if sure else f"about {known:,} tokens"
        detail += f"; unknown: {', '.join(unknown)}" if unknown else ""
        held += size.held_bytes - shape.size.held_bytes
        if self.trains and name == "evaluate":
            held += self.train().held  # a process keeps the memory of its training: measured on SmolLM2
        return replace(Stage(name=name, detail=detail, work=work, held=held, sure=sure), unknown=bool(unknown))
