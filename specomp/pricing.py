"""plan: what a compression takes, said before any weight is loaded. It prices the route that the
core executes, and decides nothing.

Forward and backward passes are counted by torch on the meta device; what is done with one linear is
done, by the core's own functions, on a small random one, and scaled up. Figures with ~ are
estimates; all others are counted.
"""

import copy
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specomp.cache import Cache
from specomp.compression.calibrate import passes
from specomp.compression.evidence import LayerEvidence
from specomp.compression.ledger import Size, measure
from specomp.compression.loop import store_unit
from specomp.compression.observe import place_of, stats_of
from specomp.compression.run import Run
from specomp.compression.search import apart
from specomp.compression.spectra import decompose, kept_components, stores_more
from specomp.compression.workers import workers
from specomp.data.calibration import CalibrationSet
from specomp.errors import UserError
from specomp.evaluation.workload import Workload
from specomp.forms.gridded import WHOLE, Gridded, Trials
from specomp.forms.menu import Alike, options
from specomp.forms.options import DENSE, Menu, Options, fill
from specomp.forms.prices import Budget, bits, held, numbers
from specomp.models.families import family_of
from specomp.models.family import LinearSpec, Unit
from specomp.models.load import skeleton
from specomp.numerics.elimination import eliminating
from specomp.numerics.statistics import Statistic, shapes
from specomp.numerics.work import Counter, Work, work
from specomp.quantization.gptq import SWEPT_BYTES
from specomp.slots import Choice, Form, Method

FLOAT = 4  # bytes: spectra, statistics of float32 sums, logits
# Copies of a weight that two-sided rounding works with.
ROUNDED = 10
# Largest side of the linear that stands in for one.
SMALL = 512
COMPONENTS = ("rank", "dimensions")  # what is made of a spectrum, or beside one
EVEN = 16  # what their sides are multiples of, as those of any model: patterns of masks need it
# Likewise where grids are tried on it, column by column.
TRIED = 48
# Tensors of the residual stream and of the MLP's width that are alive at once in a decoder layer's
# forward pass, and those that it keeps for the backward pass; float32 logits alive at once in a
# cross-entropy with its gradient.
ALIVE_HIDDEN, ALIVE_MLP, KEPT_HIDDEN, KEPT_MLP, ALIVE_LOGITS = 6, 3, 14, 5, 3


class NeedsData(Exception):  # noqa: N818
    """An allocation asked for what only a run knows."""


class NoData:
    """Evidence, reads and statistics of a plan: there are none."""

    def stats(self, linear: LinearSpec) -> Any:
        raise NeedsData("statistics")

    def spectrum(self, linear: LinearSpec) -> Any:
        raise NeedsData("spectra")

    def singular_values(self, linear: LinearSpec) -> Any:
        raise NeedsData("spectra")

    def remembered(self, unit: Unit, made_by: Any, make: Any, reads: Any = None) -> Any:
        raise NeedsData("spectra")

    def norm(self, linear: LinearSpec) -> Any:
        raise NeedsData("statistics")

    def probe(self, unit: Any, choice: Any) -> float:
        raise NeedsData("trials")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, called as a record calls it. held: bytes beside the dense model; unknown: work
    that could not be counted.
    """

    name: str
    detail: str
    work: Work
    held: float
    sure: bool = True  # nothing in it is an estimate but its time
    unknown: bool = False


class Plan:
    """What a run will take. The run in it has a skeleton for a model and no data."""

    def __init__(
        self,
        run: Run,
        *,
        workloads: Mapping[str, Sequence[Workload]] | None = None,
        reference: bool = False,
        compared: Mapping[str, Sequence[Workload]] | None = None,
        save: bool = True,
    ) -> None:
        """workloads: what benchmarks run the model over, by label; reference: also the dense one;
        compared: those that see the dense model first in any case; save: a folder is written.
        """
        self.run, self.method, self.route = run, run.method, run.route
        self.workloads, self.reference, self.save = dict(workloads or {}), reference, save
        self.compared = dict(compared or {})
        self.size = measure(run.model, run.linears)
        self.layer = [x for x in run.linears if x.decoder_layer == 0]
        self.num_layers, self.config = len(run.layers), run.model.config
        self.hidden, self.vocabulary = int(self.config.hidden_size), int(self.config.vocab_size)
        self.head = self.size.macs_per_token - self.size.linear_params
        self.dtype = torch.bfloat16 if run.half_forward else run.model.dtype
        self.tokens = run.samples.num_samples * run.samples.length

    def share(self, menu: Menu) -> float:
        """What may be spent; of a budget that is met by a search where that begins, or the least
        that every unit can do with.
        """
        begins = self.run.budget.share(self.run.model.dtype)
        if self.run.budget.tries == 1:
            return begins
        return max(begins, *(float(x.prices[0]) / x.dense for x in menu.values()))

    # --- what is chosen, and its price

    @cached_property
    def asked(self) -> str | None:
        """What the allocation or a training would have to look at: then the choices are uniform
        ones at the same budget.
        """
        return self._chosen[1]

    @property
    def choices(self) -> dict[Unit, Choice]:
        """What is stored how."""
        return self._chosen[0]

    @cached_property
    def _chosen(self) -> tuple[dict[Unit, Choice], str | None]:
        run, data, wanted = self.run, NoData(), "a training"

        def made(
            wide: Mapping[Unit, Sequence[Form]] | None = None, *, predicted: bool = False
        ) -> dict[Unit, Options]:
            return options(
                run.units,
                run.forms,
                run.budget,
                run.model.dtype,
                data,  # type: ignore[arg-type]
                self.method.rounding.grid,
                wide,
                predicted=predicted,
            )

        if not self.method.training.chooses:
            try:
                menu = made(run.wide_units, predicted=True)
                return self.method.allocation(menu, self.share(menu), data), None
            except NeedsData as error:
                wanted = str(error)
        menu = made()
        share = self.share(menu)
        return {
            unit: menu[unit].choice(i)
            for unit, i in fill(menu, dict.fromkeys(menu, share), share).items()
        }, wanted

    @cached_property
    def compressed(self) -> Size:
        """What the ledger will count, by the same two functions."""
        run, item, grid = self.run, self.run.model.dtype.itemsize, self.method.rounding.grid
        parts = {
            f"{unit.name}.{name}": part
            for unit, choice in self.choices.items()
            for name, part in choice.form.parts(unit, choice.size, grid).items()
        }
        biases = (
            sum(x.m for x in run.linears if run.model.get_submodule(x.name).bias is None)
            if self.method.training.adds_bias
            else 0
        )
        stored, params = bits(parts, run.model.dtype), numbers(parts)
        others = self.size.model_params - self.size.linear_params + biases
        # of a mask's zeros too
        products = params + sum(
            unit.params - numbers(choice.form.parts(unit, choice.size, grid))
            for unit, choice in self.choices.items()
            if choice.form.size_of == "weights"
        )
        return Size(
            linear_params=params,
            model_params=others + params,
            model_bytes=others * item + stored // 8,
            held_bytes=others * item + held(parts, run.model.dtype) // 8,
            macs_per_token=self.head + products,
            linear_bits=stored,
        )

    @property
    def low(self) -> dict[Unit, Choice]:
        """Units that do not stay dense."""
        return {unit: choice for unit, choice in self.choices.items() if choice.form != DENSE}

    # --- what travels and what is cached, in bytes

    @cached_property
    def passes(self) -> list[tuple[bool, int]]:
        """Passes over the dense model before anything is changed: with a backward pass or not,
        tokens.
        """
        return [(job.gradients, self.tokens) for job in passes(self.run, self.route.dense)]

    @property
    def hidden_carried(self) -> int:
        """Hidden states that travel from decoder layer to decoder layer."""
        return (
            self.route.stream_samples
            * self.run.samples.length
            * self.hidden
            * self.run.model.dtype.itemsize
            * self.route.streams
        )

    @cached_property
    def decomposed(self) -> list[LinearSpec]:
        """Linears whose spectra go through the cache; twice those that are decomposed again as they
        are stored, which of cut units are smaller.
        """
        if self.method.training.chooses:
            again = self.method.repairs or bool(self.run.wide_units)
            return self.run.linears * (2 if again else 1)
        if self.asked in ("spectra", "trials"):
            if not any(x.size_of == "rank" for x in self.run.forms):
                return []
            needed = self.method.allocation.needs_spectra or len(self.run.forms) > 1
            whole = self.route.caches_spectra or needed
            mlps = {x.name for unit in self.run.wide_units for x in unit.linears}
            return [x for x in self.run.linears if whole or x.name in mlps]
        low = (unit for unit, choice in self.low.items() if choice.form.size_of in COMPONENTS)
        return [x for unit in low for x in unit.linears] if self.route.caches_spectra else []

    @cached_property
    def complete(self) -> bool:
        """Whether all components of a linear are kept."""
        return self.route.complete or stores_more(self.run)

    def spectrum_numbers(self, linear: LinearSpec) -> int:
        """Of one linear's entries in the cache: U, s, rows, damping; and s by itself."""
        return (
            kept_components(linear, complete=self.complete) * (linear.m + linear.n)
            + 2 * min(linear.m, linear.n)
            + 1
        )

    @property
    def spectra_cached(self) -> int:
        """Spectra."""
        return FLOAT * sum(map(self.spectrum_numbers, self.decomposed))

    @cached_property
    def ordered(self) -> list[Unit]:
        """Functional units whose dimensions are put in order."""
        run, kinds = self.run, {unit.kind for unit in self.run.wide_units}
        return [x for x in run.family.functional_units(run.model) if x.kind in kinds]

    @property
    def units_cached(self) -> int:
        """What forms remember of units."""
        run = self.run
        units = dict.fromkeys(run.units, run.forms) | run.wide_units
        return sum(form.kept(unit) for unit, forms in units.items() for form in forms)

    def statistics_of(self, statistics: Iterable[Statistic]) -> int:
        """What one decoder layer accumulates."""
        return sum(
            x.numel() * x.element_size()
            for x in self.observed(statistics, self.layer, 2, "meta").values()
        )

    @property
    def statistics_cached(self) -> int:
        """Statistics of the dense model."""
        return self.statistics_of(self.route.dense) * self.num_layers

    @property
    def refined_cached(self) -> int:
        """Refined decoder layers as they are stored, biases included; those that stay dense are not
        refined.
        """
        changed, item = {unit.decoder_layer for unit in self.low}, self.run.model.dtype.itemsize
        if not self.route.refines:
            return 0
        stored = [
            (unit, choice) for unit, choice in self.choices.items() if unit.decoder_layer in changed
        ]
        biases = sum(
            x.m
            for unit, _ in stored
            for x in unit.linears
            if self.run.model.get_submodule(x.name).bias is not None
        )
        return (
            sum(bits(c.form.parts(u, c.size), self.run.model.dtype) for u, c in stored) // 8
            + biases * item
        )

    @property
    def taught(self) -> int:
        """Tokens whose teacher's states are computed."""
        return (
            self.method.training.samples_of(self.run.samples.num_samples) * self.run.samples.length
        )

    @property
    def teacher_cached(self) -> int:
        """The teacher's states."""
        return self.taught * self.hidden * self.run.model.dtype.itemsize

    @property
    def compared_cached(self) -> int:
        """The dense model's states that benchmarks compare with."""
        tokens = sum(x.tokens or 0 for part in self.compared.values() for x in part)
        return tokens * self.hidden * self.run.model.dtype.itemsize

    # --- work

    def observed(
        self,
        statistics: Iterable[Statistic],
        linears: Sequence[LinearSpec],
        tokens: int,
        device: str,
    ) -> dict[str, Tensor]:
        """What the accumulators themselves make of random tokens, by place and statistic as an
        observer names it.
        """

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        found: dict[str, Tensor] = {}
        for statistic in statistics:
            for x in linears:
                name = f"{place_of(x, statistic)}:{statistic.name}"
                if name not in found:
                    accumulator = statistic.start(self.run.precision, 1)
                    seen = shapes(statistic, x.m, x.n, tokens, self.hidden)
                    accumulator.update(*(random(*shape) for shape in seen))
                    found[name] = accumulator.value()
        return found

    def accumulate(self, statistics: Iterable[Statistic], samples: int) -> Work:
        """Adding up the statistics of all decoder layers, a batch at a time."""
        batch = min(self.run.calibration.batch_size, samples) or 1
        with Counter() as counter:
            self.observed(statistics, self.layer, batch * self.run.samples.length, "meta")
        return counter.work * (self.num_layers * samples / batch)

    def forward(
        self,
        tokens: float,
        length: int,
        dtype: torch.dtype,
        *,
        linears: float,
        head: bool,
        backward: bool = False,
    ) -> Work:
        """Tokens in sequences of `length` through the model, forward or also backward; linears:
        multiply-adds of their weights a token.
        """
        outside, layer = counted(self.config, self.run.model.dtype, length, head, backward)
        whole = outside + layer * self.num_layers
        change = (4 if backward else 2) * (linears - self.size.linear_params) * tokens
        products = whole.of("product") * tokens / length + change
        return work("product", products, dtype) + work(
            "memory", whole.of("memory") * tokens / length
        )

    @cached_property
    def per_linear(self) -> tuple[Work, Work]:
        """(decomposing once, all that is done to store) over all linears that do not stay dense."""
        decomposing, storing = Work(), Work()
        kinds = Tally((x.m, x.n, choice) for unit, choice in self.low.items() for x in unit.linears)
        for (m, n, choice), count in kinds.items():
            one, other = self.trial(m, n, choice)
            if choice.form.size_of in COMPONENTS:
                decomposing += one * count
            storing += other * count
        return decomposing, storing

    def trial(
        self, m: int, n: int, choice: Choice, trials: Trials | None = None
    ) -> tuple[Work, Work]:
        """(decomposition, storing) of an m x n linear, as the core does both on a smaller one,
        scaled up; trials: storing is trying grids.
        """
        scale = max(1.0, max(m, n) / (SMALL if trials is None else TRIED))

        def stand_in(scale: float) -> tuple[Unit, Sequence[int]]:
            few = [x if scale == 1 else EVEN * max(1, round(x / scale / EVEN)) for x in (m, n)]
            unit = Unit("linear", "linear", (LinearSpec("linear", few[0], few[1], 0, 0, "linear"),))
            return unit, choice.form.sizes(unit)

        try:
            unit, sizes = stand_in(scale)
        except UserError:  # a pattern that only the real size is a multiple of
            unit, sizes = stand_in(scale := 1.0)
        (linear,) = unit.linears
        wanted = max(1, round(choice.size / scale))
        size = min(sizes, key=lambda x: abs(x - wanted)) if len(sizes) else wanted
        method = self.method
        needs = (
            method.whitening.needs
            | method.target.needs
            | method.compensation.needs
            | method.rounding.needs
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = self.observed(needs, [linear], 2 * max(linear.m, linear.n), "cpu")
            box = Box(nn.Linear(linear.n, linear.m), self.run.model.dtype)
        run = Run(**{**vars_of(self.run), "model": box})
        keep = kept_components(linear, complete=self.complete)
        with Counter() as decomposing:
            no_cache: Any = lambda x: stats_of(x, values, needs)  # noqa: E731
            evidence = LayerEvidence(
                run, spectra=no_cache, statistics=no_cache, whitening=values, compensation=values
            )
            spectrum = decompose(evidence.norm(linear), evidence.weight(linear), "linear", keep)
        evidence.hold(linear, spectrum)
        with Counter() as storing:
            if trials is None:
                store_unit(run, unit, Choice(choice.form, size), evidence)
            else:
                trials.once(unit, size, evidence)

        def scaled(found: Work) -> Work:
            return Work(
                {
                    key: amount * scale ** (2 if key[0] == "memory" else 3)
                    for key, amount in found.amounts.items()
                }
            )

        return scaled(decomposing.work), scaled(storing.work)

    # --- stages

    @cached_property
    def stages(self) -> list[Stage]:
        """In order, those of one name together."""
        reads, dense = bool(self.workloads), self.method.is_dense
        found = [
            Stage(
                name="load",
                detail=f"{self.size.model_params:,} parameters",
                work=work("disk", self.size.model_bytes),
                held=0,
            )
        ]
        first = [*(self.workloads.items() if self.reference else ()), *self.compared.items()]
        if first and not dense:
            found.append(self.evaluate("evaluate dense", self.size, first))
        make = {
            "calibrate": self.calibrate,
            "allocate": self.allocate,
            "train": self.train,
            "compress": self.compress,
        }
        found += [make[name]() for name in dict.fromkeys(self.route.stages)]
        if self.save and not dense:
            size = self.compressed.model_bytes
            found.append(Stage(name="save", detail="a folder", work=work("disk", size), held=size))
        last = self.size if dense else self.compressed
        return (
            [*found, self.evaluate("evaluate", last, [*self.workloads.items()])] if reads else found
        )

    def activations(self, sequences: int, length: int) -> float:
        """Bytes alive in a forward pass without gradients."""
        return (
            sequences
            * length
            * (ALIVE_HIDDEN * self.hidden + ALIVE_MLP * self.widest)
            * self.run.model.dtype.itemsize
        )

    @property
    def widest(self) -> int:
        """The largest width inside a decoder layer: that of the MLP."""
        return max(max(x.m, x.n) for x in self.layer)

    @property
    def kept(self) -> float:
        """Bytes that one decoder layer keeps of one sequence for its backward pass."""
        return (
            self.run.samples.length
            * (KEPT_HIDDEN * self.hidden + KEPT_MLP * self.widest)
            * self.run.model.dtype.itemsize
        )

    @property
    def workspace(self) -> float:
        """Bytes in flight around the largest linear: copies of its weight and its Gram, in float64
        where something is solved in it.
        """
        whole = any(
            v.ndim == 2
            for v in self.observed(self.method.whitening.needs, self.layer, 2, "meta").values()
        )
        wide = 2 if whole or self.method.compensation.active else 1
        sides = any(x.scope == "output" for x in self.method.rounding.needs)  # and theirs in turn
        return max(
            wide * FLOAT * (3 * x.params + min(x.m, x.n) ** 2 * 3 + x.n**2)
            + sides * FLOAT * (8 * x.m**2 + ROUNDED * x.params)
            for x in self.layer
        )

    def calibrate(self) -> Stage:
        """Passes, and what they add up."""
        run, total, held, told = self.run, Work(), 0.0, Tally[str]()
        for job in passes(run, self.route.dense):
            weights = (
                any(x.scope == "linear" for x in job.statistics)
                * sum(x.params for x in self.layer)
                * len(job.layers)
            )
            total += self.forward(
                self.tokens,
                run.samples.length,
                self.dtype,
                linears=self.size.linear_params,
                head=job.gradients,
                backward=job.gradients,
            )
            total += work("product", 2 * self.tokens * weights, self.dtype)
            per_layer = self.statistics_of(job.statistics)
            alive = self.activations(
                min(run.calibration.batch_size, run.samples.num_samples), run.samples.length
            )
            if job.gradients:
                alive = (
                    self.kept * self.num_layers
                    + ALIVE_LOGITS * run.samples.length * self.vocabulary * FLOAT
                )
            # one decoder layer's values are mirrored beside its sums
            held = max(held, per_layer * (len(job.layers) + 1) + alive)
            told[f"{self.tokens:,} tokens forward{' and backward' if job.gradients else ''}"] += 1
        total += self.accumulate(self.route.dense, run.samples.num_samples) + work(
            "disk", self.statistics_cached
        )
        detail = "; ".join(f"{count} x {what}" for what, count in told.items()) or "no statistics"
        return Stage(name="calibrate", detail=detail, work=total, held=held)

    def spectra(self) -> Work:
        """Decomposing the linears whose spectra are cached, and storing the components."""
        here = {(x.m, x.n) for x in self.decomposed}
        each = {sizes: self.trial(*sizes, Choice(DENSE, min(sizes)))[0] for sizes in here}
        total = work("disk", self.spectra_cached)
        for x in self.decomposed:
            total += each[x.m, x.n]
        return total

    @cached_property
    def tried(self) -> list[tuple[tuple[Gridded, Unit], int]]:
        """Forms that are tried on several grids, with a unit of each shape and how many there are
        of it.
        """
        run, found = self.run, dict[Any, list[Any]]()
        units = dict.fromkeys(run.units, run.forms) | run.wide_units
        for unit, forms in units.items():
            shape = tuple((x.m, x.n) for x in unit.linears)
            for form in forms:
                one = form.form if isinstance(form, Alike) else form
                if isinstance(one, Gridded) and not one.index:
                    parts = form.units if isinstance(form, Alike) else [unit]
                    found.setdefault((one.trials, shape), [one, parts[0], 0])[2] += len(parts)
        return [((form, unit), count) for form, unit, count in found.values()]

    def trying(self, form: Gridded, unit: Unit) -> Work:
        """All its sizes on all its grids; of a unit of several linears, shares of each in full."""
        total = Work()
        if len(unit.linears) == 1:
            (x,) = unit.linears
            for size in form.tried(unit):
                total += self.trial(x.m, x.n, Choice(form, size), form.trials)[1]
            return total
        full = Trials(WHOLE, form.trials.rules)
        whole = bits(WHOLE.parts(unit, 0), torch.float16)
        for size in form.tried(unit):
            share = bits(form.form.parts(unit, size), torch.float16) / whole
            for x in unit.linears:
                one = self.trial(x.m, x.n, Choice(WHOLE, min(x.m, x.n)), full)[1]
                total += one * share
        return total

    def allocate(self) -> Stage:
        """Nothing, where the allocation looks at no spectra."""
        if self.asked not in ("spectra", "trials"):
            return Stage(name="allocate", detail="", work=Work(), held=0)
        total, detail = self.spectra(), f"{len(self.decomposed)} eigenproblems"
        held = self.activations(1, self.run.samples.length) + self.workspace
        if self.ordered:
            last = [unit.linears[-1] for unit in self.ordered]
            total += sum((eliminating(x.m, x.n) for x in last), Work())
            total += work("disk", self.units_cached)
            held += max(8 * (4 * x.n**2 + 3 * x.m * x.n) for x in last)
            detail += f"; {len(last)} functional units put in order"
        if tried := self.tried:
            # rows, integers, and what is tried of a grid
            held += 3 * SWEPT_BYTES * workers(self.run)
            total += sum((self.trying(form, unit) * count for (form, unit), count in tried), Work())
            detail += f"; {sum(count for _, count in tried)} forms tried on several grids"
        trials = self.asked == "trials"
        return Stage(
            name="allocate",
            detail=f"{detail}; trials of {self.tokens:,} tokens each" * trials or detail,
            work=total,
            held=held,
            unknown=trials,
        )

    def compress(self) -> Stage:
        """Decomposing what is not decomposed yet, storing, and the hidden states that travel."""
        run, training = self.run, self.method.training
        decomposing, storing = self.per_linear
        tries = run.budget.tries if self.method.spends else 1
        total = storing * (1 + (training.chooses and self.method.repairs)) * tries
        if not self.route.caches_spectra:
            total += decomposing
        elif not (training.chooses and not self.method.repairs) and self.asked not in (
            "spectra",
            "trials",
        ):
            total += self.spectra()
        detail = f"{len(self.low)} linears"
        held = self.workspace + self.statistics_of(self.route.dense)
        if self.route.streams:
            tokens = self.route.stream_samples * run.samples.length
            total += self.stream(tokens) * tries
            carried = self.route.whitening.streamed | self.route.compensation.streamed
            held += (
                self.hidden_carried
                + self.activations(run.calibration.batch_size, run.samples.length)
                + 2 * self.statistics_of(carried)
            )
            detail += (
                f"; {tokens:,} tokens carried through every decoder layer {1 + self.route.streams}"
                " times"
            )
            if self.route.refines:
                detail += f"; {self.method.refinement.steps} steps each"
        if tries > 1:  # the dense model's states, its linears and those of the best stay beside it
            length, count = run.samples.length, run.budget.held_out * run.samples.length
            held += self.size.linear_bits // 8 + self.compressed.held_bytes
            held += count * self.hidden * run.model.dtype.itemsize
            macs = self.size.linear_params
            total += self.forward(count, length, self.dtype, linears=macs, head=True) * (tries + 1)
            detail += f"; at most {tries} times, measured on {count:,} tokens each"
        return Stage(name="compress", detail=detail, work=total, held=held)

    def stream(self, tokens: int) -> Work:
        """Each decoder layer once dense for each stream, observed, and once compressed."""
        run, total, small = self.run, Work(), self.compressed.linear_params
        for linears in (*[self.size.linear_params] * self.route.streams, small):
            total += self.forward(
                tokens, run.samples.length, self.dtype, linears=linears, head=False
            )
        # the loss before and after; its steps: forward and backward, gradients of weights too
        if self.route.refines:
            steps = self.method.refinement.steps * run.calibration.batch_size * run.samples.length
            total += self.forward(
                2 * tokens + 3 * steps, run.samples.length, self.dtype, linears=small, head=False
            )
        carried = self.route.whitening.streamed | self.route.compensation.streamed
        return total + self.accumulate(carried, self.route.stream_samples)

    def train(self) -> Stage:
        """The teacher once; every step forward and backward, through the components that exist in
        its phase or through what is stored.
        """
        run, settings, length = self.run, self.method.training.work, self.run.samples.length
        gated, dense = self.method.training.chooses, self.size.linear_params
        dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        everything = float(
            sum(min(x.m, x.n) * (x.m + x.n) for x in run.linears)
            if gated
            else self.compressed.linear_params
        )
        exist, steps = everything, 0
        total = self.spectra() if gated and not self.method.repairs else Work()
        total += self.forward(self.taught, length, self.dtype, linears=dense, head=False) + work(
            "disk", self.teacher_cached
        )
        for phase in settings.schedule.values():
            tokens = phase.steps * settings.batch_size * length
            total += self.forward(tokens, length, dtype, linears=exist, head=True, backward=True)
            total += work("product", 2 * tokens * self.head, dtype)  # the teacher's logits
            if settings.weighs:
                total += work("product", 2 * tokens * exist, dtype)
            again = 2 * settings.held_out * length + tokens * settings.activation_checkpointing
            total += self.forward(again, length, dtype, linears=exist, head=True)
            steps += phase.steps
            if phase.prune_margin is not None:
                exist = min(exist, phase.prune_margin * run.budget.share(run.model.dtype) * dense)
        layers = 1 if settings.activation_checkpointing else self.num_layers
        held = float(self.compressed.held_bytes - self.size.held_bytes)
        if gated:
            held = everything * dtype.itemsize - dense * run.model.dtype.itemsize
        if settings.weighs:  # codes stand in full while they train
            held = max(held, 0.0) + everything * dtype.itemsize
        held += (
            self.kept
            * settings.micro_batch_size
            * layers
            * (1 + dtype.itemsize / run.model.dtype.itemsize)
            / 2
        )
        held += 6 * settings.token_chunk * self.vocabulary * FLOAT + self.head * dtype.itemsize
        detail = f"{len(run.linears)} eigenproblems; " if gated else ""
        detail += (
            f"{self.taught:,} tokens of the teacher; {steps} steps,"
            f" {steps * settings.batch_size * length:,} tokens"
        )
        return Stage(name="train", detail=detail, work=total, held=held)

    def evaluate(
        self, name: str, size: Size, workloads: Sequence[tuple[str, Sequence[Workload]]]
    ) -> Stage:
        """Benchmarks, on a model of this size."""
        total, held, item = Work(), 0.0, self.run.model.dtype
        read = [x for _, part in workloads for x in part]
        for x in read:
            dtype = torch.bfloat16 if x.half and item == torch.float32 else item
            if x.tokens:  # a step of one token reads every weight once
                tokens = x.tokens - x.decoded * x.batch
                total += self.forward(
                    tokens, x.length, dtype, linears=size.macs_per_token - self.head, head=True
                )
                total += work("memory", x.decoded * size.held_bytes)
            longest = x.longest or x.length
            # Logits in the dtype of the products, and in a harness task all of them in float32
            # beside that.
            logits = (
                x.batch * longest * self.vocabulary * (dtype.itemsize + (FLOAT if x.longest else 0))
            )
            held = max(held, self.activations(x.batch, longest) + logits)
        sure = all(x.sure in ("", "at most") for x in read)
        unknown = [k for k, v in workloads if any(x.tokens is None for x in v)]
        detail = f"{'' if sure else 'about '}{sum(x.tokens or 0 for x in read):,} tokens" + (
            f"; unknown: {', '.join(unknown)}" if unknown else ""
        )
        held += size.held_bytes - self.size.held_bytes
        if self.method.training.active and name == "evaluate":
            # a process keeps the memory of its training: measured on SmolLM2
            held += self.train().held
        return Stage(
            name=name, detail=detail, work=total, held=held, sure=sure, unknown=bool(unknown)
        )


class Box(nn.Module):
    """A model of one linear."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear.to(dtype).requires_grad_(False)
        self.dtype = dtype
        self.device = torch.device("cpu")


def vars_of(run: Run) -> dict[str, Any]:
    """What a run was made of."""
    return {name: getattr(run, name) for name in Run.__dataclass_fields__}


def counted(
    config: PreTrainedConfig, dtype: torch.dtype, length: int, head: bool, backward: bool
) -> tuple[Work, Work]:
    """Work of one sequence: outside the decoder layers, and of one decoder layer, as torch counts
    models of one and of two.
    """
    key = (config.to_json_string(), dtype, length, head, backward)
    if key not in _COUNTED:
        one, two = (_pass(config, dtype, length, layers, head, backward) for layers in (1, 2))
        _COUNTED[key] = one * 2 - two, two - one
    return _COUNTED[key]


_COUNTED: dict[tuple[Any, ...], tuple[Work, Work]] = {}


def _pass(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    length: int,
    layers: int,
    head: bool,
    backward: bool,
) -> Work:
    few = copy.deepcopy(config)
    few.num_hidden_layers = layers
    if few.to_dict().get("layer_types"):
        few.layer_types = list(config.layer_types)[:layers]
    model = skeleton(few, str(dtype).removeprefix("torch.")).requires_grad_(False)
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # gradients end at the first linear that is looked at, not at the embeddings: that little is
    # left in
    if backward:
        model.get_input_embeddings().register_forward_hook(lambda *x: x[2].requires_grad_(True))
    run = model if head or backward else family_of(config).decoder(model)
    with Counter() as counter, nullcontext() if backward else torch.no_grad():
        # With a cache of keys and values nothing asks the ids for packed sequences, which have no
        # content here.
        out = run(input_ids=ids, use_cache=True, **({"labels": ids} if backward else {}))
        if backward:
            out.loss.backward()
    return counter.work


def plan(
    model: PreTrainedModel | PreTrainedConfig,
    method: str | Method = "adasvd",
    ratio: float | str | Budget = 0.4,
    *,
    num_samples: int = 256,
    length: int = 2048,
    calibration: Any = None,
    quantizer: Any = None,
    dtype: str | None = None,
) -> Plan:
    """What `compress` would take with so many samples, from a model or its config alone. Raises
    UserError as compress does.
    """
    from specomp import api

    config = model.config if isinstance(model, PreTrainedModel) else model
    budget, settings = api.budget_of(ratio), api.calibration_of(calibration)
    chosen = api.method_of(method, quantizer, budget)
    kind = dtype or str(
        model.dtype if isinstance(model, PreTrainedModel) else config.dtype or torch.float32
    ).removeprefix("torch.")
    if chosen.spends:  # as compress holds some out
        given = CalibrationSet.of_shape(num_samples, length, settings.batch_size)
        num_samples = apart(given, budget)[0].num_samples
    return planned(config, kind, chosen, budget, settings, num_samples, length)


def planned(
    config: PreTrainedConfig,
    dtype: str,
    method: Method,
    budget: Budget,
    calibration: Any,
    num_samples: int,
    length: int,
    **more: Any,
) -> Plan:
    """The same, of choices that are made. Raises UserError for an unsupported architecture, and for
    what a run would refuse.
    """
    from specomp.compression.checks import check_budget, check_method

    family, model = family_of(config), skeleton(config, dtype)
    check_method(method, budget, calibration.upstream, num_samples, more.pop("processes", 1), dtype)
    if not method.is_dense:
        check_budget(model, family, method, budget)
    samples = CalibrationSet.of_shape(num_samples, length, calibration.batch_size)
    run = Run(
        model=model,
        family=family,
        method=method,
        budget=budget,
        calibration=calibration,
        samples=samples,
        training_samples=samples,
        cache=Cache("unused"),
        model_key="plan",
    )
    return Plan(run, **more)
