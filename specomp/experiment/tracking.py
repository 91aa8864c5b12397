"""Weights & Biases, the only file that knows it. A record is complete without it: losing the server
loses nothing.

Nothing here can stop a run or hold it up for long: every wait has a limit, and after one failure
online the process stays offline.
"""

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from specomp.disk import make_folder
from specomp.experiment.label import method_name, model_name, run_name
from specomp.experiment.record import Record
from specomp.settings import configurable

log = logging.getLogger(__name__)
# what curves are drawn against, in a run's summary and in a sweep's points
RETENTION = "measured_retention"
BYTES = "model_bytes"
# names of what is logged, which the dashboard's panels ask for
LINEARS = "linears"
POINTS = "points"
REPORT = "report"
LONGEST = 128  # characters of a name
# of this process: a sweep of many jobs waits for a dead server once, not once per job
_offline_from_now = threading.Event()


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """A whole sweep as W&B shows it beside its records: the report, its points as a table, and
    curves over them.
    """

    key: str
    name: str
    caption: str
    html: str
    # one per finished point: `series`, the swept keys, RETENTION, BYTES and the metrics by their
    # labels
    points: Sequence[Mapping[str, Any]]
    # chart -> columns of x and y; one line per value of `series`
    curves: Mapping[str, tuple[str, str]]


class Tracking(Protocol):
    """Where a record is also shown."""

    def training_logger(self, record: Record) -> Any:
        """A Lightning logger for a training of this record, or None. Never raises for reasons of
        the network or the service.
        """

    def publish(self, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
        """Show one record. Never raises for reasons of the network or the service."""


@configurable
class NoTracking:
    """Nowhere."""

    def training_logger(self, record: Record) -> None:
        """None."""

    def publish(self, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""


@configurable
class WandbTracking:
    """One W&B run per record: id = record key, group = sweep, job type = method; config, metrics
    and the table of linears.
    """

    project: str
    entity: str | None
    group: str | None
    mode: Literal["online", "offline", "disabled"]
    folder: str
    init_timeout: Annotated[float, Field(gt=0)]
    finish_timeout: Annotated[float, Field(gt=0)]

    def training_logger(self, record: Record) -> Any:
        """Into the record's own run, which `publish` continues."""
        from lightning.pytorch.loggers import WandbLogger

        run = self._attempt(lambda mode: self._start(mode, **self._of(record)))
        return None if run is None else WandbLogger(experiment=run, project=self.project)

    def publish(self, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
        """Upload, or store for a later `wandb sync`; online falls back to offline when there is no
        key or no server.
        """

        def show(mode: str) -> None:
            with self._run(mode, **self._of(record)) as run:
                _log_record(run, record, linears)

        self._attempt(show)

    def publish_sweep(self, sweep: SweepReport) -> str | None:
        """The same for a whole sweep, as one more run of its group. Returns the entity it is now
        shown under, None where it is not yet.
        """

        def show(mode: str) -> str | None:
            name, about = f"{REPORT} {sweep.name}", {"sweep": sweep.caption}
            with self._run(
                mode,
                id=sweep.key,
                group=self.group or sweep.caption,
                job_type=REPORT,
                name=name,
                config=about,
            ) as run:
                _log_sweep(run, sweep)
                return str(run.entity) if mode == "online" else None

        place: str | None = self._attempt(show)
        return place

    def _of(self, record: Record) -> dict[str, Any]:
        choice = record.choices
        return {
            "id": record.key[:12],
            "group": (
                self.group
                or (record.config.get("table") or {}).get("caption")
                or model_name(choice, record.config)
            ),
            "job_type": method_name(choice, record.config),
            "name": shown(run_name(choice, record.config)),
            "config": record.config,
        }

    def _attempt(self, action: Callable[[str], Any]) -> Any:
        """The action in the wanted mode, else offline, else None."""
        wanted = "offline" if _offline_from_now.is_set() and self.mode == "online" else self.mode
        for mode in [] if wanted == "disabled" else dict.fromkeys((wanted, "offline")):
            try:
                return action(mode)
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else repr(error)
                later = ""
                if mode == "online":
                    _offline_from_now.set()
                    _leave_service(self.finish_timeout)
                    later = (
                        f" From here on offline: `wandb sync {self.folder}/wandb/*run-*` uploads it"
                        " later."
                    )
                log.warning(
                    "W&B (%s) failed: %s. The record itself is complete.%s",
                    mode,
                    reason.rstrip("."),
                    later,
                )
        return None

    @contextlib.contextmanager
    def _run(self, mode: str, **about: Any) -> Iterator[Any]:
        run = self._start(mode, **about)
        try:
            yield run
        finally:
            run.finish()

    def _start(self, mode: str, **about: Any) -> Any:
        import wandb

        # Where W&B puts what an artifact or a table holds until it is uploaded; it has no other
        # name for this place than a variable.
        folder = Path(self.folder).expanduser().absolute()
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
        make_folder(folder)  # where there is none, W&B writes into the system's temporary folder
        open_run = wandb.run
        if (
            open_run is not None
            and open_run.id == about["id"]
            and open_run.offline == (mode == "offline")
        ):
            return open_run  # the training's
        # On a terminal wandb.init would ask for a key and wait.
        if mode == "online" and open_run is None and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("no API key: `wandb login` stores one, WANDB_API_KEY names one")
        return wandb.init(
            project=self.project,
            entity=self.entity,
            dir=folder,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                finish_timeout_raises=True,
                silent=True,
            ),
            **about,
        )


def shown(text: str) -> str:
    """A name as W&B takes one: one line of at most 128 characters, without control characters."""
    line = "".join(x if x.isprintable() else " " for x in text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _leave_service(limit: float) -> None:
    """End W&B's background process, which refuses the id of a run it could not start from then on;
    the next run starts another.
    """
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return

    def leave() -> None:
        with contextlib.suppress(Exception):  # it may have died by itself
            wandb.teardown()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(limit)


def summary(record: Record) -> dict[str, float]:
    """The numbers of a run: metrics as `<benchmark id>/<metric>`, sizes, seconds by stage."""
    numbers = {
        f"{name}/{metric}": value
        for name, values in record.metrics.items()
        for metric, value in values.items()
    }
    numbers |= {f"seconds/{stage}": value for stage, value in record.seconds.items()}
    if record.ledger is not None:
        numbers |= {
            name: value
            for name, value in record.ledger.as_dict().items()
            if isinstance(value, float)
        }
        numbers[BYTES] = record.ledger.compressed.model_bytes
    return numbers


def _log_record(run: Any, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
    import wandb

    run.log(summary(record))
    for phase in record.training.get("phases", ()):
        for kind, counts in phase.get("histograms", {}).items():
            edges = [
                record.training["histogram_top"] * i / len(counts) for i in range(len(counts) + 1)
            ]
            run.log(
                {f"gates/{phase['phase']}/{kind}": wandb.Histogram(np_histogram=(counts, edges))}
            )
    if linears:
        run.log({LINEARS: _table(linears)})


def _log_sweep(run: Any, sweep: SweepReport) -> None:
    import wandb

    run.log({REPORT: wandb.Html(sweep.html, inject=False, data_is_not_path=True)})
    if sweep.points:
        run.log({POINTS: _table(sweep.points)})
    for name, (x, y) in sweep.curves.items():
        drawn = [
            {"series": p["series"], x: p[x], y: p[y]} for p in sweep.points if p[y] is not None
        ]
        run.log({name: wandb.plot.line(_table(drawn), x, y, stroke="series", title=name)})
    name = re.sub(r"[^\w.-]+", "-", sweep.name)[:LONGEST]  # all that W&B takes for an artifact
    artifact = wandb.Artifact(f"{name}-{REPORT}", type=REPORT, description=sweep.caption)
    with artifact.new_file(f"{name}.html", encoding="utf-8") as file:
        file.write(sweep.html)
    run.log_artifact(artifact)


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
