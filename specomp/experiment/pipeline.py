"""run(cfg): one experiment from top to bottom.

Build and check everything that is cheap; stop if the record says it is done; then load, compress
through the same functions as the library (api.py), save, evaluate, and write down what happened.
"""

import json
import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from specomp.cache import digest, waiting
from specomp.compression.checks import check_budget
from specomp.compression.ledger import Size, ledger, measure
from specomp.compression.module import CalibrationOnlyModule
from specomp.compression.report import LinearReport
from specomp.compression.run import Progress, Run
from specomp.errors import UserError, first_line
from specomp.evaluation.divergence import ComparesDense
from specomp.evaluation.metric import is_detail
from specomp.evaluation.probes import Writes
from specomp.evaluation.suite import Benchmark
from specomp.experiment.checks import actionable
from specomp.experiment.config import Experiment, ask, build
from specomp.experiment.environment import hidden
from specomp.experiment.label import folder_name
from specomp.experiment.names import MACHINE
from specomp.experiment.plan import show_plan
from specomp.experiment.record import Record, point_of, provenance, record_key
from specomp.experiment.summary import show
from specomp.models.card import Measured, write_card
from specomp.models.gguf_export import TYPES
from specomp.models.load import LoadedModel, device_name
from specomp.models.save import (
    INFO_FILE,
    Export,
    checked_export,
    exporting,
    refresh,
    save_compressed,
)
from specomp.models.save import load as load_folder
from specomp.profiling import profiles

log = logging.getLogger(__name__)
KEPT_TEXTS = 4  # of what a benchmark has a model write, in a record
# A path of this machine, where a value or a part of one begins.
A_PATH = re.compile(r"(^|[\s\[{:,'\"])[~/][^\s,\]}'\"]*")


class RecordProgress(Progress):
    """What a run tells, written into its record."""

    def __init__(self, experiment: Experiment, record: Record) -> None:
        super().__init__()
        self.experiment, self.record = experiment, record
        self.layers: Any = None  # told of every decoder layer whose modules are final

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Its seconds and memory go into the record."""
        with super().stage(name), self.record.stage(name):
            yield

    def note(self, text: str) -> None:
        """In the record and in the log."""
        self.record.note(text)

    def layer(self, index: int) -> None:
        """A streamed model is written decoder layer by decoder layer."""
        if self.layers is not None:
            self.layers(index)

    def trained(self, account: dict[str, Any], figure: Any = None) -> None:
        """Draw what can be drawn of it."""
        if figure is not None and find_spec("matplotlib") is None:
            log.info("No figure of the training: pip install 'specomp[figures]' draws it.")
        elif figure is not None:
            from specomp.experiment.figures import training_figure  # an extra

            path = self.experiment.records.companion(self.record.key, "training.png")
            linears, gates, kept = figure
            training_figure(path, linears, gates, kept, account)
            log.info("Figure of the training: %s", path)

    @property
    def curve_file(self) -> Path:
        """Beside the record."""
        return self.experiment.records.companion(self.record.key, "training.csv")

    def training_logger(self) -> Any:
        """Where the record is shown too."""
        return self.experiment.tracking.training_logger(self.record)


def run(cfg: DictConfig) -> float | None:
    """One experiment. Returns the first benchmark's first metric, or None without benchmarks or
    with plan=true. Raises UserError.
    """
    if cfg.plan:
        show_plan(ask(cfg))
        return None
    experiment = build(cfg)
    key = record_key(experiment.identity())
    with waiting(experiment.records.lock(key), f"works on record {key[:12]}"):
        record = resume(experiment, key)
        if (point := point_of(experiment.config)) not in record.points:
            record.points.append(point)
        try:
            if experiment.options.profile:
                record.note(
                    "profile=true: seconds and peak memory are those of a run that torch's profiler"
                    " watched"
                )
            with profiles.into(
                experiment.outputs / "profiles" / key[:12] if experiment.options.profile else None
            ):
                done = execute(experiment, record)
            record.status, record.error = "ok", None
        except KeyboardInterrupt:
            # Unfinished, which is not a failure of the experiment; anything else is, and the record
            # says what.
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
    if done or HydraConfig.get().mode != RunMode.MULTIRUN:
        show(record)
    first = experiment.suite.benchmarks[:1]  # others may be in the record from earlier runs
    return next((value for x in first for value in record.metrics[x.id].values()), None)


def resume(experiment: Experiment, key: str) -> Record:
    """The stored record of these weights if it can be built on, else a fresh one."""
    record = experiment.records.load(key)
    if record is not None and not experiment.options.redo:
        if record.status == "failed" and not experiment.options.retry:
            raise UserError(
                f"Record {key[:12]} failed before ({record.error}) and options.retry=false."
            )
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


def execute(experiment: Experiment, record: Record) -> bool:
    """Bring a record up to what was asked: compressed, saved, evaluated; whatever it already has is
    not done again. Whether there was anything to do.
    """
    missing = [b for b in experiment.suite.benchmarks if b.id not in record.metrics]
    folder = model_folder(experiment, record)
    kept = folder is not None and _usable(folder)
    if folder is not None and kept:
        record.model_folder = str(folder)
        try:
            if changed := refresh(folder, experiment.tokenizer, side_files(experiment)):
                record.note(f"{', '.join(changed)} brought up to the source model's")
        except UserError as error:
            log.warning("%s Compressing again.", error)
            kept = False
    lost = experiment.options.save and folder is not None and not kept
    if record.ledger and not missing and not lost:
        log.info("Record %s is complete.", record.key[:12])
        return False
    model: Any = None
    tokenizer: Any = experiment.tokenizer
    linears: list[LinearReport] = []
    rounded = experiment.options.export in TYPES  # further than the model that is measured
    if record.ledger and folder is not None and kept and rounded:
        log.info("%s holds rounded weights: compressing again to measure.", folder.name)
    elif record.ledger and folder is not None and kept:
        unmeasured = experiment.options.reference and any(
            b.id not in _dense_metrics(experiment) for b in missing
        )
        comparing = [x for x in missing if isinstance(x, ComparesDense)]
        if unmeasured or not all(x.remembers(tokenizer) for x in comparing):
            loaded = load_dense(experiment, record)
            if unmeasured:
                with record.stage("evaluate dense"):
                    reference(experiment, loaded)
            del loaded  # not both models in memory
        try:
            with record.stage("load"):
                model = reload(experiment, folder).model
        except UserError as error:
            log.warning("%s Compressing again.", error)
    if model is None:
        model, tokenizer, linears = produce(experiment, record)
        experiment.records.save(record)
    for benchmark in missing:
        with record.stage("evaluate"):
            evaluate(record, benchmark, model, tokenizer)
        if (dense := _dense_record(experiment)) is not None:
            record.take_dense(dense)
        experiment.records.save(record)
    for kind, counted in (("hits", experiment.cache.hits), ("misses", experiment.cache.misses)):
        before = record.cache.get(kind, {})  # of an earlier run that this one went on from
        record.cache[kind] = before | {
            name: before.get(name, 0) + count for name, count in counted.items()
        }
    experiment.tracking.publish(record, [x.as_dict() for x in linears])
    if record.model_folder:
        bring_up_card(experiment, record, Path(record.model_folder))
    return True


def command(record: Record) -> str:
    """What was typed, without where it was done."""
    typed = []
    for override in record.config.get("overrides") or []:
        key, sign, value = override.partition("=")
        name = key.lstrip("+~")
        if name.startswith(("paths.", "hydra.", "tracking")) or name.rpartition(".")[2] in MACHINE:
            continue
        value = "PATH" if name.endswith(".path") else A_PATH.sub(r"\1PATH", value)
        typed.append(f"{key}{sign}{value}")
    return hidden(shlex.join(["specomp", *typed]))


def bring_up_card(experiment: Experiment, record: Record, folder: Path) -> None:
    """The folder's model card, with what was measured."""
    measured = [
        Measured(name, metric, record.dense_metrics.get(name, {}).get(metric), value)
        for name, values in record.metrics.items()
        for metric, value in values.items()
        if not is_detail(metric)
    ]
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        write_card(folder, info, name=folder.name, source=side_files(experiment), measured=measured)
    except Exception as error:  # the folder may be gone; a card costs no record
        log.warning("The card of %s is as it was: %s", folder, first_line(error))


def load_dense(experiment: Experiment, record: Record) -> LoadedModel:
    """The dense model, seen by those benchmarks that compare with it."""
    with record.stage("load"):
        loaded = experiment.source.load(experiment.cache)
    for benchmark in experiment.suite.benchmarks:
        if isinstance(benchmark, ComparesDense) and benchmark.id not in record.metrics:
            with record.stage("evaluate dense"):
                benchmark.remember(loaded.model, loaded.tokenizer)
    record.provenance["device"] = device_name(loaded.model.device)
    return loaded


def run_of(experiment: Experiment, loaded: LoadedModel, progress: Progress | None = None) -> Run:
    """What the library works on, of an experiment and its loaded model."""
    return Run(
        model=loaded.model,
        family=loaded.family,
        method=experiment.method,
        budget=experiment.ratio,
        calibration=experiment.calibration,
        samples=experiment.samples,
        training_samples=experiment.training_samples,
        held_out=experiment.held_out,
        cache=experiment.cache,
        model_key=digest(experiment.source.fingerprint(experiment.cache)),
        seed=experiment.options.seed,
        trainer=experiment.trainer,
        processes=experiment.processes,
        store=loaded.store,
        progress=progress or Progress(),
    )


def reload(experiment: Experiment, folder: Path) -> LoadedModel:
    """A compressed model from its folder, in the precision and the place of the dense one."""
    source = experiment.source
    return load_folder(
        folder,
        dtype=source.dtype,
        device=source.device,
        device_map=source.device_map,
        stream=source.stream,
    )


def produce(experiment: Experiment, record: Record) -> tuple[Any, Any, list[LinearReport]]:
    """Load the dense model, evaluate it for reference, compress it in place, count and save it.

    A streamed model is saved while it is compressed, and then opened again.
    """
    loaded = load_dense(experiment, record)
    if experiment.method.is_dense:
        size = measure(loaded.model, loaded.family.linears(loaded.model))
        record.ledger = dense_ledger(size, loaded)
        if experiment.ratio.counts_bits:
            log.info(
                "The dense model, as it is: %s is spent by another method, such as specomp, or met"
                " by a quantizer of as many bits, such as quantizer=gptq_int4.",
                experiment.ratio.setting,
            )
        return loaded.model, loaded.tokenizer, []
    progress = RecordProgress(experiment, record)
    run = run_of(experiment, loaded, progress)
    check_budget(run.model, run.family, run.method, run.budget)
    if experiment.options.reference:
        with record.stage("evaluate dense"):
            record.dense_metrics |= reference(experiment, loaded)
    folder = model_folder(experiment, record)
    assert folder is not None, "only the dense row has none"
    info = {
        "base_model": {"name": experiment.source.name, "source": record.identity["model"]},
        "changes": record.changes,
        "record": record.key,
        "command": command(record),
        "specomp": record.identity,
    }
    with ExitStack() as stack:
        export: Export | None = None
        if run.store is not None:  # every decoder layer is written as soon as it is compressed
            export = stack.enter_context(
                exporting(
                    folder,
                    experiment.options.export,
                    run.model,
                    run.cache,
                    side_files(experiment),
                    ours=True,
                )
            )
            progress.layers = export.add
        module = CalibrationOnlyModule(run)
        with record.stage("calibrate"):
            module.calibrate()
        report = module.finish()
        info |= report.made | {"ledger": report.ledger.as_dict()}
        record.ledger, record.training = report.ledger, report.training
        experiment.records.save_linears(record.key, [x.as_dict() for x in report.linears])
        experiment.records.seal(record)
        if export is not None:
            with record.stage("save"):
                export.finish(loaded.tokenizer, info)
    if run.store is not None:
        record.model_folder = str(folder)
        return reload(experiment, folder).model, loaded.tokenizer, report.linears
    if experiment.options.save:
        with record.stage("save"):
            save_compressed(
                run.model,
                loaded.tokenizer,
                folder,
                form=experiment.options.export,
                info=info,
                cache=run.cache,
                beside=side_files(experiment),
                ours=True,  # its name has the record's key
            )
        record.model_folder = str(folder)
    return run.model, loaded.tokenizer, report.linears


def dense_ledger(size: Size, loaded: LoadedModel) -> Any:
    """Of a model of which nothing is compressed here: its file may have rounded it before."""
    count, found = len(loaded.family.linears(loaded.model)), ledger(None, size, size)
    if loaded.stored is not None:
        linear_bits, model_bytes = loaded.stored
        found = ledger(None, size, replace(size, linear_bits=linear_bits, model_bytes=model_bytes))
    return replace(found, num_linears=count, num_dense=count)


def reference(experiment: Experiment, loaded: LoadedModel) -> dict[str, dict[str, float]]:
    """The dense model's metrics: from its own record where they are, measured now where not
    (timings always).
    """
    key = record_key(experiment.identity(dense=True))
    with waiting(experiment.records.lock(key), "evaluates the dense model"):
        record = experiment.records.load(key)
        if record is None or not record.ledger:
            record = Record(
                key=key,
                status="ok",
                identity=experiment.identity(dense=True),
                choices=experiment.choices
                | {"method": "dense", "ratio": "dense", "quantizer": "none"},
                config=experiment.config,
                ledger=dense_ledger(
                    measure(loaded.model, loaded.family.linears(loaded.model)), loaded
                ),
                provenance=provenance() | {"device": device_name(loaded.model.device)},
            )
        for benchmark in experiment.suite.benchmarks:
            if benchmark.id not in record.metrics or benchmark.volatile:
                if isinstance(benchmark, ComparesDense):
                    benchmark.remember(loaded.model, loaded.tokenizer)
                evaluate(record, benchmark, loaded.model, loaded.tokenizer)
                experiment.records.save(record)
    wanted = {benchmark.id for benchmark in experiment.suite.benchmarks}
    return {name: values for name, values in record.metrics.items() if name in wanted}


def evaluate(record: Record, benchmark: Benchmark, model: Any, tokenizer: Any) -> None:
    """One benchmark, stored under its id; some of what it had a model write is kept too."""
    name = benchmark.id
    log.info("Evaluate %s.", name)
    if isinstance(benchmark, Writes):
        answers = benchmark.write(model, tokenizer)
        record.texts[name] = benchmark.texts(answers, tokenizer)[:KEPT_TEXTS]
        record.metrics[name] = benchmark.judge(answers)
    else:
        record.metrics[name] = benchmark(model, tokenizer)


def _dense_record(experiment: Experiment) -> Record | None:
    return experiment.records.load(record_key(experiment.identity(dense=True)))


def _dense_metrics(experiment: Experiment) -> dict[str, dict[str, float]]:
    record = _dense_record(experiment)
    return {} if record is None else record.metrics


def model_folder(experiment: Experiment, record: Record) -> Path | None:
    """Where the compressed model is kept; the dense row has no folder of its own. One that has
    another name from an earlier run keeps it.
    """
    if experiment.method.is_dense:
        return None
    form = experiment.options.export
    suffix = "" if form == "factors" else f"-{form}"
    end = f"{record.key[:12]}{suffix}"
    models = experiment.outputs / "models"
    known = [x for x in models.glob(f"*-{end}") if x.is_dir() and not x.name.startswith(".")]
    named = folder_name(record.choices, record.config)
    return known[0] if known else models / f"{named}-{end}"


def side_files(experiment: Experiment) -> Path | None:
    """Where what goes with the source model lies."""
    return experiment.source.side_files(experiment.cache)


def _usable(folder: Path) -> bool:
    """Whether a compressed model is there, and whole: reads headers only."""
    if not folder.exists():
        return False
    try:
        checked_export(folder)
    except UserError as error:
        log.warning("%s Compressing again.", error)
        return False
    return True
