"""The compression itself: allocate; decoder layer by decoder layer fit, repair, round, install,
refine; train where a method does.

Where a slot asks for inputs from the compressed model, the hidden states of the calibration set
travel along (stream.py).
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from specomp.compression.calibrate import Statistics
from specomp.compression.evidence import DenseEvidence, LayerEvidence, Values
from specomp.compression.ledger import Size, ledger, measure
from specomp.compression.probe import Probe
from specomp.compression.refine import refined, refinement_key
from specomp.compression.report import LinearReport, Report, errors_of, explained
from specomp.compression.run import Run
from specomp.compression.search import searched
from specomp.compression.spectra import Spectra, Weight
from specomp.compression.stream import HiddenStream
from specomp.compression.workers import by_layer, one_thread_each
from specomp.forms.menu import options, settled
from specomp.forms.options import DENSE
from specomp.forms.prices import Budget, numbers, parts_of
from specomp.models.family import Unit
from specomp.models.modules import replace_linear, weight_of
from specomp.numerics.statistics import Statistic
from specomp.progress import track
from specomp.slots import Choice, Trained

# What a report says of a linear that is smaller than it was (see forms/cut.py).
CUT = {"cut": 1.0}


def compress(run: Run, statistics: Statistics) -> Report:
    """Everything after calibration, in place."""
    method, progress = run.method, run.progress
    before = measure(run.model, run.linears)
    spectra = dense_spectra(run, statistics)
    with progress.stage("allocate"):
        evidence = DenseEvidence(run, spectra)
        menu = options(
            run.units,
            run.forms,
            run.budget,
            run.model.dtype,
            evidence,
            method.rounding.grid,
            run.wide_units,
            comparable=method.comparable,
            each=by_layer(run),
        )
        reads = Probe(run, statistics, evidence)

        def choose(share: float) -> dict[Unit, Choice]:
            return settled(method.allocation(menu, share, reads))

        choices = choose(run.budget.share(run.model.dtype)) if run.held_out is None else {}
    if run.held_out is not None:

        def store(choices: Mapping[Unit, Choice]) -> list[LinearReport]:
            return compress_layers(run, choices, statistics, spectra)

        with progress.stage("compress"):
            found, budget = searched(run, menu, choose, store)
        return reported(run, before, found.reports, budget, found.choices, kl=found.kl)
    prepared = method.training.before(run)
    trained = method.training.forms(run, prepared, choices, statistics, spectra)
    chosen = choices if trained is None else trained.choices
    with progress.stage("compress"):
        reports = compress_layers(run, chosen, statistics, spectra, trained)
    account = trained.account if trained is not None else method.training.after(run, prepared)
    return reported(run, before, reports, run.budget, chosen, trained, account)


def reported(
    run: Run,
    before: Size,
    reports: list[LinearReport],
    budget: Budget,
    chosen: Mapping[Unit, Choice],
    trained: Trained | None = None,
    account: Mapping[str, Any] | None = None,
    kl: float | None = None,
) -> Report:
    """What became of a model that had this size, at a budget that was met or found; kl: measured
    where that was asked for.
    """
    method, progress = run.method, run.progress
    rounds = bool(method.rounding.grids)
    after = measure(run.model, run.linears)
    searched_for = {} if kl is None else {"target_kl": run.budget.most, "measured_kl": kl}
    found = Report(
        linears=reports,
        ledger=ledger(budget if method.spends else None, before, after, **searched_for),
        training=dict(account or {}),
        seconds=progress.seconds,
        notes=progress.notes,
        made={
            "method": method.name,
            **({"grids": sorted({x.bits for x in method.rounding.grids})} if rounds else {}),
            **(run.budget.identity() if method.spends else {}),
            "calibration": run.samples.description | {"hash": run.samples.hash},
        },
    )
    return explained(run, found, chosen, trained)


def dense_spectra(run: Run, statistics: Statistics) -> Spectra:
    """Of the dense model: an allocation may ask for them although the norm will see compressed
    inputs.
    """
    method, dense = run.method, run.calibration.upstream == "dense"
    # In the dense model a linear's outputs are those of its weight, whatever the target makes of
    # compressed inputs.
    target = method.target if dense else Weight()
    tried = method.rounding.needs if method.chooses_grids else frozenset()
    read = statistics if dense else Statistics(run, method.whitening.needs | tried)
    return Spectra(run, target, method.whitening, read, complete=run.route.complete)


def compress_layers(
    run: Run,
    choices: Mapping[Unit, Choice],
    statistics: Statistics,
    spectra: Spectra,
    trained: Trained | None = None,
) -> list[LinearReport]:
    """Replace the model's units by the forms chosen for them; returns one report per linear."""
    # also where every statistic came from the cache and no calibration pass did it
    run.model.requires_grad_(False)
    streams = Streams(run) if trained is None else None
    key = refinement_key(run, choices) if run.route.refines and trained is None else None
    count, reports = len(run.layers), []
    for index in track(range(count), f"compress with {run.method.name}", count):
        with run.resident(index):
            here = {unit: choice for unit, choice in choices.items() if unit.decoder_layer == index}
            reports += _compress_layer(run, index, here, statistics, spectra, streams, trained, key)
            statistics.forget()  # before the next decoder layer comes in
            spectra.forget()
            if streams is not None:
                streams.advance(index)
            run.progress.layer(index)
    return reports


class Streams:
    """The hidden states that travel, as the route says: of the compressed model, of the dense one
    beside it, or none.
    """

    def __init__(self, run: Run) -> None:
        """Embeds the calibration set if anything has to see compressed inputs."""
        route, samples = run.route, run.samples
        self.run, self.own, self.dense = run, None, None
        if route.stream_samples:
            few = (
                samples
                if route.stream_samples == samples.num_samples
                else samples.subset(route.stream_samples)
            )
            self.own = HiddenStream(run, few)
            self.dense = self.own.twin() if route.compares else None

    def observe(self, index: int) -> tuple[Values, Values]:
        """What the still dense decoder layer sees of compressed inputs: for the norm, and for the
        repair.
        """
        if self.own is None:
            return {}, {}
        route = self.run.route
        whitening = route.whitening.streamed
        repair = route.compensation.streamed
        limit = route.compensation.num_samples
        if limit is None:
            values = self._observe_all(index, whitening | repair)
            return values, values
        first = self._observe_all(index, whitening) if whitening or self.dense else {}
        return first, self.own.observe(index, repair, limit) if repair else {}

    def _observe_all(self, index: int, needs: frozenset[Statistic]) -> Values:
        assert self.own is not None
        if self.dense is None:
            return self.own.observe(index, needs)
        if not needs:
            return self.dense.advance(index)
        return self.own.observe_beside(index, needs, self.dense)

    def advance(self, index: int) -> None:
        """On to the next decoder layer."""
        if self.own is not None:
            self.own.advance(index)


def _compress_layer(
    run: Run,
    index: int,
    choices: Mapping[Unit, Choice],
    statistics: Statistics,
    spectra: Spectra,
    streams: Streams | None,
    trained: Trained | None,
    refinement: str | None,
) -> list[LinearReport]:
    whitening, repair = streams.observe(index) if streams is not None else ({}, {})
    sizes = {x.name: choice.size for unit, choice in choices.items() for x in unit.linears}
    evidence = LayerEvidence(run, spectra, statistics, whitening, repair, trained, sizes)
    with one_thread_each(list(choices), run.device(index)) as side_by_side:
        found = [
            x
            for part in side_by_side(
                lambda unit: store_unit(run, unit, choices[unit], evidence), list(choices)
            )
            for x in part
        ]
    place = {x.name: i for i, x in enumerate(run.linears)}
    found.sort(key=lambda x: place[x.name])
    if refinement is not None and not all(x.dense for x in found):
        assert streams is not None and streams.own is not None and streams.dense is not None
        gain = refined(run, refinement, index, streams.own, streams.dense)
        found = [x if x.dense else replace(x, compensation_gain=gain) for x in found]
    return found


@torch.no_grad()
def store_unit(run: Run, unit: Unit, choice: Choice, evidence: LayerEvidence) -> list[LinearReport]:
    """Fit one unit and put it in its place."""
    start, reports = time.perf_counter(), []
    modules = choice.form.fit(unit, choice.size, evidence)
    for linear in unit.linears:
        module = modules[linear.name]
        shape: Any = (module.out_features, module.in_features)
        stored, whole = numbers(parts_of(module)), shape == (linear.m, linear.n)
        report = LinearReport(
            name=linear.name,
            m=linear.m,
            n=linear.n,
            rank=choice.size,
            stored=stored,
            dense=choice.form == DENSE and whole and stored == linear.params,
        )
        if evidence.trained is not None:
            evidence.account(linear).compensation_gain = evidence.trained.gains.get(linear.name)
        if module is not run.model.get_submodule(linear.name):
            run.model.get_submodule(linear.name).requires_grad_(False)
            found = dict(vars(evidence.account(linear)))
            found["weight_error"] = None
            if whole and len(unit.linears) == 1:
                ranked = choice.form.size_of == "rank" or evidence.trained is not None
                spectrum = evidence.spectrum(linear) if ranked else None
                target, norm = evidence.weight(linear).float(), evidence.norm(linear)
                found |= errors_of(weight_of(module), target, norm, spectrum, choice.size)
            replace_linear(run.model, linear.name, module.requires_grad_(False))
            report = replace(
                report,
                facts=dict(choice.form.facts(module)) if whole or choice.form != DENSE else CUT,
                seconds=time.perf_counter() - start,
                **found,
            )
        evidence.forget(linear)
        reports.append(report)
    return reports
