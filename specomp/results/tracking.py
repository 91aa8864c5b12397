"""Weights & Biases, the only file that knows it. A record is complete without it: losing the server loses nothing."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from specomp.results.record import Record
from specomp.settings import configurable

log = logging.getLogger(__name__)


class Tracking(Protocol):
    """Where a finished record is also shown."""

    def publish(self, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
        """Show one record. Never raises for reasons of the network or the service."""


@configurable
class NoTracking:
    """Nowhere."""

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

    def publish(self, record: Record, linears: Sequence[Mapping[str, Any]]) -> None:
        """Upload, or store for a later `wandb sync`; online falls back to offline when there is no key or no server."""
        if self.mode == "disabled":
            return
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                self._publish(record, linears, mode)
                return
            except Exception as error:
                log.warning(
                    "W&B (%s) failed: %s. The record itself is complete.", mode, str(error).splitlines()[0] if str(error) else repr(error)
                )

    def _publish(self, record: Record, linears: Sequence[Mapping[str, Any]], mode: str) -> None:
        import wandb

        choice = record.choices
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group or choice.get("model"),
            job_type=choice.get("method"),
            name=f"{choice.get('method')} {choice.get('ratio')}",
            id=record.key[:12],
            resume="allow",
            config=record.config,
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(init_timeout=self.init_timeout, silent=True),
        )
        try:
            summary: dict[str, Any] = {
                f"{name}/{metric}": value for name, values in record.metrics.items() for metric, value in values.items()
            }
            summary |= {f"seconds/{stage}": value for stage, value in record.seconds.items()}
            summary |= {name: value for name, value in record.ledger.items() if isinstance(value, float)}
            run.log(summary)
            if linears:
                columns = list(linears[0])
                run.log({"linears": wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in linears])})
        finally:
            run.finish()
