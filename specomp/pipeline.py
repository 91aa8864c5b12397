"""run(cfg): one experiment from top to bottom. READ THIS FIRST.

Build and check everything that is cheap; stop if the record says it is done; then load, calibrate, allocate, compress, save, evaluate.
"""

import logging
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig

from specomp.cache import digest, waiting
from specomp.checks import actionable, check_budget
from specomp.errors import UserError
from specomp.evaluation.suite import Benchmark
from specomp.experiment import Experiment, ask, build
from specomp.factorize import factorize
from specomp.ledger import Ledger, ledger, measure
from specomp.methods.base import describe
from specomp.models.export import exporting, remove_unfinished, save_compressed
from specomp.models.export import load as load_folder
from specomp.models.files import checked_folder, first_line
from specomp.models.load import LoadedModel, device_name
from specomp.notes import note_quantization
from specomp.planning.plan import plan
from specomp.planning.show import show as show_plan
from specomp.profiling import profiles
from specomp.ratio import Ratio
from specomp.results.record import Record, point_of, provenance, record_key
from specomp.results.summary import show
from specomp.stages.compress import LinearReport
from specomp.stages.setup import Setup

log = logging.getLogger(__name__)
UNCOMPRESSED = Ratio(compression=0)


def run(cfg: DictConfig) -> float | None:
    """One experiment. Returns the first benchmark's first metric, or None without benchmarks or with plan=true. Raises UserError."""
    if cfg.plan:
        show_plan(plan(ask(cfg)))
        return None
    experiment = build(cfg)
    key = record_key(experiment.identity())
    with waiting(experiment.records.lock(key), f"works on record {key[:12]}"):
        record = resume(experiment, key)
        if (point := point_of(experiment.config)) not in record.points:
            record.points.append(point)
        try:
            if experiment.options.profile:
                record.note("profile=true: seconds and peak memory are those of a run that torch's profiler watched")
            with profiles.into(experiment.outputs / "profiles" / key[:12] if experiment.options.profile else None):
                execute(experiment, record)
            record.status, record.error = "ok", None
        except KeyboardInterrupt:
            # Unfinished, which is not a failure of the experiment; anything else is, and the record says what.
            record.status, record.error = "running", "interrupted"
            raise
        except BaseException as error:
            record.status, record.error = "failed", f"{type(error).__name__}: {first_line(error)}"
            remedy = actionable(error)
            if remedy is not None:
                raise remedy from error
            raise
        finally:
            experiment.records.save(record)
    show(record)
    return next((value for values in record.metrics.values() for value in values.values()), None)


def resume(experiment: Experiment, key: str) -> Record:
    """The stored record of these weights if it can be built on, else a fresh one."""
    record = experiment.records.load(key)
    if record is not None and not experiment.options.redo:
        if record.status == "failed" and not experiment.options.retry:
            raise UserError(f"Record {key[:12]} failed before ({record.error}) and options.retry=false.")
        if record.ledger:
            log.info("Record %s exists: running only what is missing.", key[:12])
            return record
    return Record(
        key=key,
        identity=experiment.identity(),
        choices=experiment.choices,
        config=experiment.config,
        calibration=experiment.samples.description | {"hash": experiment.samples.hash},
        provenance=provenance(),
    )


def execute(experiment: Experiment, record: Record) -> None:
    """Bring a record up to what was asked: compressed, saved, evaluated; whatever it already has is not done again."""
    missing = [b for b in experiment.suite.benchmarks if b.id not in record.metrics]
    folder = model_folder(experiment, record)
    usable = folder is not None and _usable(folder)
    lost = experiment.options.save and folder is not None and not usable
    if record.ledger and not missing and not lost:
        log.info("Record %s is complete.", record.key[:12])
        return
    linears: list[dict[str, Any]] = []
    if record.ledger and folder is not None and usable:
        if experiment.options.reference and any(b.id not in _dense_metrics(experiment) for b in missing):
            setup = load_dense(experiment, record)
            with record.stage("evaluate dense"):
                reference(experiment, setup)
            del setup  # not both models in memory
        with record.stage("load"):
            model, tokenizer = reload(experiment, folder).model, experiment.tokenizer
    else:
        model, tokenizer, linears = produce(experiment, record)
        experiment.records.save(record)
    for benchmark in missing:
        with record.stage("evaluate"):
            evaluate(record.metrics, benchmark, model, tokenizer)
        record.dense_metrics |= {
            b: v for b, v in _dense_metrics(experiment).items() if b in record.metrics and b not in record.dense_metrics
        }
        experiment.records.save(record)
    for kind, counted in (("hits", experiment.cache.hits), ("misses", experiment.cache.misses)):
        before = record.cache.get(kind, {})  # of an earlier run that this one went on from
        record.cache[kind] = before | {name: before.get(name, 0) + count for name, count in counted.items()}
    experiment.tracking.publish(record, linears)


def load_dense(experiment: Experiment, record: Record) -> Setup:
    """The dense model with what the stages need around it."""
    with record.stage("load"):
        loaded = experiment.source.load(experiment.cache)
    record.provenance["device"] = device_name(loaded.model.device)
    return Setup(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        family=loaded.family,
        linears=loaded.family.linears(loaded.model),
        calibration=experiment.calibration,
        samples=experiment.samples,
        cache=experiment.cache,
        model_key=digest(experiment.source.fingerprint(experiment.cache)),
        trainer=experiment.trainer,
        processes=experiment.processes,
        store=loaded.store,
    )


def reload(experiment: Experiment, folder: Path) -> LoadedModel:
    """A compressed model from its folder, in the precision and the place of the dense one."""
    source = experiment.source
    return load_folder(folder, dtype=source.dtype, device=source.device, device_map=source.device_map, stream=source.stream)


def produce(experiment: Experiment, record: Record) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Load the dense model, evaluate it for reference, compress it in place, count and save it.

    A streamed model is saved while it is compressed, and then opened again.
    """
    setup = load_dense(experiment, record)
    folder = model_folder(experiment, record)
    info = {
        "method": experiment.method.name,
        "compression": experiment.ratio.compression,
        "record": record.key,
        "specomp": record.identity,
    }
    before = measure(setup.model, setup.linears)
    reports: list[LinearReport] = []
    target = UNCOMPRESSED if experiment.method.is_dense else experiment.ratio
    check_budget(setup.linears, target.retention, experiment.method.packing.stored)
    if not experiment.method.is_dense:
        if experiment.options.reference:
            with record.stage("evaluate dense"):
                record.dense_metrics |= reference(experiment, setup)
        if setup.store is None:
            reports = factorize(experiment, setup, record)
        else:
            assert folder is not None, "only the dense row has none"
            reports = factorize_to(folder, info, experiment, setup, record)
    after = measure(setup.model, setup.linears)
    note_quantization(record, reports, setup.model.dtype)
    balance = ledger(target.retention, before, after)
    record.ledger = counts(balance, target, setup, num_dense=sum(x.dense for x in reports)) | mean_errors(reports)
    record.ledger["packing"] = type(experiment.method.packing).__name__.lower()
    if abs(balance.deviation) > 1e-3:
        record.note(
            f"measured retention {balance.measured_retention:.4f}, target {target.retention:.4f} ({balance.deviation:+.2%}): "
            f"whole ranks, as {describe(experiment.method.allocation)} gives them"
            if experiment.method.training.trains != "spectrum"
            else f"whole components, chosen with {describe(experiment.method.training)['pruning']}"
        )
    linears = [report.as_dict() for report in reports]
    experiment.records.save_linears(record.key, linears)
    if folder is not None and setup.store is not None:
        record.model_folder = str(folder)
        return reload(experiment, folder).model, setup.tokenizer, linears
    if experiment.options.save and folder is not None:
        with record.stage("save"):
            save_compressed(setup.model, setup.tokenizer, folder, form=experiment.options.export, info=info)
        record.model_folder = str(folder)
    return setup.model, setup.tokenizer, linears


def factorize_to(folder: Path, info: dict[str, Any], experiment: Experiment, setup: Setup, record: Record) -> list[LinearReport]:
    """The same for a streamed model: every decoder layer is written as soon as it is compressed."""
    name = setup.family.decoder_layers
    remove_unfinished(folder)  # this process holds the lock of the record
    with exporting(folder, experiment.options.export) as export:
        reports = factorize(experiment, setup, record, lambda index: export.add(f"{name}.{index}", setup.layers[index]))
        with record.stage("save"):
            export.finish(setup.model, setup.tokenizer, info)
    return reports


def reference(experiment: Experiment, setup: Setup) -> dict[str, dict[str, float]]:
    """The dense model's metrics: from its own record where they are, measured now where not (timings always)."""
    key = record_key(experiment.identity(dense=True))
    with waiting(experiment.records.lock(key), "evaluates the dense model"):
        record = experiment.records.load(key)
        if record is None or not record.ledger:
            size = measure(setup.model, setup.linears)
            choices = experiment.choices | {"method": "dense", "ratio": "dense"}
            record = Record(
                key=key,
                status="ok",
                identity=experiment.identity(dense=True),
                choices=choices,
                config=experiment.config,
                ledger=counts(ledger(1.0, size, size), UNCOMPRESSED, setup, num_dense=len(setup.linears)),
                provenance=provenance() | {"device": device_name(setup.model.device)},
            )
        for benchmark in experiment.suite.benchmarks:
            if benchmark.id not in record.metrics or getattr(benchmark, "volatile", False):
                evaluate(record.metrics, benchmark, setup.model, setup.tokenizer)
                experiment.records.save(record)
    wanted = {benchmark.id for benchmark in experiment.suite.benchmarks}
    return {name: values for name, values in record.metrics.items() if name in wanted}


def counts(balance: Ledger, target: Ratio, setup: Setup, *, num_dense: int) -> dict[str, Any]:
    """What a record keeps of a ledger, the compression that was asked for, and how many linears it is about."""
    return balance.as_dict() | {
        "target_compression": target.compression,
        "num_linears": len(setup.linears),
        "num_dense": num_dense,
    }


def mean_errors(reports: list[LinearReport]) -> dict[str, float]:
    """Means over the factorized linears: relative error in the method's norm, and what compensation left of the loss."""
    low = [x for x in reports if not x.dense]
    gains = [x.compensation_gain for x in low if x.compensation_gain is not None]
    found = {"norm_error": fmean(x.norm_error for x in low)} if low else {}
    return found | ({"compensation_gain": fmean(gains)} if gains else {})


def evaluate(metrics: dict[str, dict[str, float]], benchmark: Benchmark, model: Any, tokenizer: Any) -> None:
    """One benchmark, stored under its id."""
    log.info("Evaluate %s.", benchmark.id)
    metrics[benchmark.id] = benchmark(model, tokenizer)


def _dense_metrics(experiment: Experiment) -> dict[str, dict[str, float]]:
    record = experiment.records.load(record_key(experiment.identity(dense=True)))
    return {} if record is None else record.metrics


def model_folder(experiment: Experiment, record: Record) -> Path | None:
    """Where the compressed model is kept; the dense row has no folder of its own."""
    if experiment.method.is_dense:
        return None
    suffix = "-dense" if experiment.options.export == "dense" else ""
    return experiment.outputs / "models" / f"{experiment.choices['model']}-{experiment.method.name}-{record.key[:12]}{suffix}"


def _usable(folder: Path) -> bool:
    """Whether a compressed model is there, and whole: reads headers only."""
    if not folder.exists():
        return False
    try:
        checked_folder(str(folder))
    except UserError as error:
        log.warning("%s Compressing again.", error)
        return False
    return True
