"""factorize(experiment, setup, record): the method itself, on a loaded model. Calibrate, allocate, compress, and train where it trains."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from specomp.budget import full_rank
from specomp.cache import digest
from specomp.experiment import Experiment
from specomp.methods.base import Quantizer
from specomp.methods.lora import LoRA
from specomp.methods.svd import Weight
from specomp.notes import note_factors
from specomp.quantization.none import NoQuantizer
from specomp.ratio import break_even_rank, is_low_rank
from specomp.results.figures import gate_profiles, training_figure
from specomp.results.record import Record
from specomp.stages.calibrate import DenseStatistics, dense_statistics
from specomp.stages.compress import LinearReport, compress, dense_needs
from specomp.stages.decompose import DenseSpectra, StoredSpectra, stored_numbers
from specomp.stages.probe import make_probe
from specomp.stages.prune import pack
from specomp.stages.recover import recover
from specomp.stages.setup import Setup
from specomp.stages.spectrum import train
from specomp.stages.teacher import TeacherStates

log = logging.getLogger(__name__)


def factorize(experiment: Experiment, setup: Setup, record: Record, finished: Callable[[int], None] | None = None) -> list[LinearReport]:
    """Calibrate, allocate, compress: the method itself."""
    method, upstream = experiment.method, experiment.calibration.upstream
    with record.stage("calibrate"):
        dense = dense_statistics(setup, dense_needs(method, upstream, experiment.quantizer))
    # An allocation may ask for dense spectra although the whitening will see compressed inputs: made when asked for.
    spectra_statistics = dense if upstream == "dense" else DenseStatistics(setup, method.whitening.needs)
    trains = method.training.trains == "spectrum"
    # Another packing than two factors may store components beyond their break-even rank.
    complete = trains or any(is_low_rank(x.m, x.n, math.ceil(break_even_rank(x.m, x.n)), method.packing.stored) for x in setup.linears)
    # In the dense model a linear's outputs are those of its weight, whatever the target makes of compressed inputs.
    target = method.target if upstream == "dense" else Weight()
    spectra = DenseSpectra(setup, target, method.whitening, spectra_statistics, complete=complete)
    with record.stage("allocate"):
        ranks = method.allocation(
            *(setup.linears, experiment.ratio, dense, spectra, method.packing.stored), make_probe(setup, spectra, method.packing)
        )
        ranks = {x.name: min(ranks[x.name], full_rank(x)) for x in setup.linears}
    to_train, teacher = replace(setup, samples=experiment.training_samples), None
    if method.training.trains != "nothing":
        with record.stage("train"):
            teacher = TeacherStates(to_train)  # while the model is dense

    def compressed(quantizer: Quantizer) -> list[LinearReport]:
        with record.stage("compress"):
            return compress(setup, method, quantizer, ranks, spectra, dense, finished)

    if not trains:
        reports = compressed(experiment.quantizer)
        if teacher is not None:
            train_stored(experiment, to_train, record, teacher)
    else:
        assert teacher is not None
        components, gains = spectra, {}
        if method.repairs:
            for linear in setup.linears:
                spectra(linear.name)  # while the model is dense
            # What is trained is rounded afterwards.
            gains = {x.name: x.compensation_gain for x in compressed(cast(Quantizer, NoQuantizer()))}
            components = StoredSpectra(setup, method.whitening, dense)
        reports = train_spectrum(experiment, to_train, record, teacher, ranks, components, dense, spectra)
        reports = [replace(x, compensation_gain=gains.get(x.name)) for x in reports]
    note_factors(record, reports, method, experiment.quantizer, setup.model.dtype)
    return reports


def train_spectrum(
    experiment: Experiment,
    setup: Setup,
    record: Record,
    teacher: TeacherStates,
    ranks: dict[str, int],
    spectra: DenseSpectra,
    dense: DenseStatistics,
    before: DenseSpectra,
) -> list[LinearReport]:
    """Train the spectrum, prune and pack it. spectra: what is trained; before: of the dense model, which errors are measured against."""
    method, ratio = experiment.method, experiment.ratio
    with record.stage("train"):
        trained = train(
            *(setup, method, ratio, ranks, spectra, teacher),
            seed=experiment.options.seed,
            curve_file=experiment.records.companion(record.key, "training.csv"),
            logger=lambda: experiment.tracking.training_logger(record),
        )
    with record.stage("compress"):
        reports, chosen, account = pack(setup, method, experiment.quantizer, ratio, trained, spectra, dense, before)
    profiles = gate_profiles(setup.linears, trained.gates, trained.alive, chosen)
    record.training = {name: value for name, value in trained.report.items() if name != "curve"} | {
        "samples": setup.samples.num_samples,
        "samples_hash": setup.samples.hash,
        "pruning": account,
        "profiles": profiles,
    }
    figure = experiment.records.companion(record.key, "training.png")
    training_figure(figure, setup.linears, trained.gates, chosen, record.training | {"curve": trained.report["curve"]})
    log.info("Figure of the training: %s", figure)
    return reports


def train_stored(experiment: Experiment, setup: Setup, record: Record, teacher: TeacherStates) -> None:
    """Train what the compressed model stores, in place."""
    training = experiment.method.training
    assert isinstance(training, LoRA)
    with record.stage("train"):
        report = recover(
            *(setup, training, teacher, digest({"record": record.key, "stored": stored_numbers(setup)})),
            seed=experiment.options.seed,
            curve_file=experiment.records.companion(record.key, "training.csv"),
            logger=lambda: experiment.tracking.training_logger(record),
        )
    record.training = {name: value for name, value in report.items() if name != "curve"}
    record.training |= {"samples": setup.samples.num_samples, "samples_hash": setup.samples.hash}
