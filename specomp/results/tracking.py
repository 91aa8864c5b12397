"""Weights & Biases, the only file that knows it. A record is complete without it: losing the server loses nothing."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from specomp.results.record import Record
from specomp.settings import configurable

log = logging.getLogger(__name__)


class Tracking(Protocol):
    """Where a record is also shown."""

    def training_logger(self, record: Record) -> Any:
        """A Lightning logger for a training of this record, or None. Never raises for reasons of the network or the service."""

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
    """One W&B run per record: id = record key, job type = method; config, metrics and the table of linears."""

    project: str
    entity: str | None
    group: str | None
    mode: Literal["online", "offline", "disabled"]
    init_timeout: Annotated[float, Field(gt=0)]

    def training_logger(self, record: Record) -> Any:
        """Into the record's own run, which `publish` continues."""
        from lightning.pytorch.loggers import WandbLogger

        run = self._attempt(lambda mode: self._start(record, mode))
        return None if run is None else WandbLogger(experiment=run, project=self.project)

    def publish(self, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
        """Upload, or store for a later `wandb sync`; online falls back to offline when there is no key or no server."""
        self._attempt(lambda mode: self._publish(record, linears, mode))

    def _attempt(self, action: Callable[[str], Any]) -> Any:
        """The action in the wanted mode, else offline, else None."""
        for mode in [] if self.mode == "disabled" else dict.fromkeys((self.mode, "offline")):
            try:
                return action(mode)
            except Exception as error:
                log.warning(
                    "W&B (%s) failed: %s. The record itself is complete.", mode, str(error).splitlines()[0] if str(error) else repr(error)
                )
        return None

    def _start(self, record: Record, mode: str) -> Any:
        import wandb

        choice = record.choices
        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group or (record.config.get("table") or {}).get("caption") or choice.get("model"),
            job_type=choice.get("method"),
            name=f"{choice.get('method')} {choice.get('ratio')}",
            id=record.key[:12],
            resume="allow",
            config=record.config,
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(init_timeout=self.init_timeout, silent=True),
        )

    def _publish(self, record: Record, linears: Sequence[Mapping[str, Any]], mode: str) -> None:
        import wandb

        run = self._start(record, mode)
        try:
            summary: dict[str, Any] = {
                f"{name}/{metric}": value for name, values in record.metrics.items() for metric, value in values.items()
            }
            summary |= {f"seconds/{stage}": value for stage, value in record.seconds.items()}
            summary |= {name: value for name, value in record.ledger.items() if isinstance(value, float)}
            run.log(summary)
            for phase in record.training.get("phases", ()):
                for kind, counts in phase["histograms"].items():
                    edges = [record.training["histogram_top"] * i / len(counts) for i in range(len(counts) + 1)]
                    run.log({f"gates/{phase['phase']}/{kind}": wandb.Histogram(np_histogram=(counts, edges))})
            if linears:
                columns = list(linears[0])
                run.log({"linears": wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in linears])})
        finally:
            run.finish()
