"""python -m specomp.tables.dashboard EXPERIMENT [overrides ...]: the sweep on W&B, beside the runs of its records.

One more run of the sweep's group with the HTML report (shown, and as an artifact), its points as a table and every metric against
retention and bytes; and a saved view of the project (wandb-workspaces) with panels for the sweep. `tracking.*` overrides say where;
with tracking.mode=offline or without a server the run waits for `wandb sync`, and the view is written as a file only.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate

from specomp.cache import atomic_path, digest
from specomp.errors import UserError
from specomp.experiment.record import stored, stores
from specomp.experiment.tracking import BYTES, LINEARS, POINTS, REPORT, RETENTION, SweepReport, WandbTracking
from specomp.rows import CONF
from specomp.tables.charts import STAGES, series
from specomp.tables.report import report
from specomp.tables.sweep import LEDGER, Column, Sweep, load_sweep

AXES = {RETENTION: "retention", BYTES: "bytes"}
TRAINING = ("train/kl", "train/soft", "train/hard")  # as training/distill.py logs them


def sweep_report(name: str, sweep: Sweep, html: str) -> SweepReport:
    """What a run shows of a whole sweep. Its id is the sweep's, so that a later call continues the same run."""
    points: list[dict[str, Any]] = [
        {"series": series(point), **point.keys, "record": point.done[0].key[:12]}
        | {RETENTION: fmean(r.counted.measured_retention for r in point.done)}
        | {BYTES: fmean(r.counted.compressed.model_bytes for r in point.done)}
        | {c.label: mean(point.values(c)) for c in sweep.columns}
        for point in sweep.points
        if point.done
    ]
    drawn = {c.label: sum(p[c.label] is not None for p in points) for c in sweep.columns}
    curves = {chart(c, x): (x, c.label) for c in sweep.columns if drawn[c.label] > 1 for x in AXES}
    key = "sweep-" + digest([name, [p.commands for p in sweep.points]])[:12]
    return SweepReport(key=key, name=name, caption=sweep.caption, html=html, points=points, curves=curves)


def mean(values: Sequence[float]) -> float | None:
    """Over the seeds that have run."""
    return fmean(values) if values else None


def chart(column: Column, axis: str) -> str:
    """The name under which a curve is logged."""
    return f"curves/{column.label} against {AXES[axis]}"


def metric_key(column: Column, sweep: Sweep) -> str | None:
    """What a column is called in the summary of a run; None while no record has it, for a benchmark's id ends with the hash of its text."""
    if column.protocol == LEDGER:
        return column.metric
    return next((f"{x}/{column.metric}" for r in sweep.records for x in r.metrics if column.matches(x)), None)


def view(sweep: Sweep, shown: SweepReport, *, project: str, entity: str, group: str) -> Any:
    """The saved view: a wandb_workspaces Workspace, made without a network; `save()` uploads it."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as spaces
    except ImportError as error:
        raise UserError(
            "The run of the sweep is there; its view needs wandb-workspaces: pip install -c constraints.txt -e '.[dashboard]'."
        ) from error
    keys = {c.label: key for c in sweep.columns if (key := metric_key(c, sweep)) is not None}
    lower = {c.label for c in sweep.columns if c.lower_is_better}

    def scatter(label: str, axis: str) -> Any:
        x, y = panels.SummaryMetric(axis), panels.SummaryMetric(keys[label])
        return panels.ScatterPlot(title=f"{label} against {AXES[axis]}", x=x, y=y, log_y=label in lower)

    def curve(name: str) -> Any:
        x, y = shown.curves[name]
        fields, strings = {"x": x, "y": y, "stroke": "series"}, {"title": name.removeprefix("curves/"), "xname": x, "yname": y}
        made = panels.CustomChart.from_table(f"{name}_table", chart_fields=fields, chart_strings=strings)
        made.chart_name = "wandb/line/v0"
        return made

    every = [panels.Config("method.name"), panels.SummaryMetric(RETENTION), *(panels.SummaryMetric(x) for x in keys.values())]
    sections = {
        "Curves": [curve(name) for name in shown.curves],
        "Quality by run": [scatter(label, axis) for label in keys for axis in AXES],
        "All at once": [panels.ParallelCoordinatesPlot(columns=[panels.ParallelCoordinatesPlotColumn(metric=x) for x in every])],
        "Where the parameters are": [panels.WeavePanelSummaryTable(table_name=LINEARS)],
        "Training": [panels.LinePlot(title=x, x="trainer/global_step", y=[x], log_y=x == TRAINING[0]) for x in TRAINING],
        "Cost": [panels.BarPlot(title=f"{x}: seconds", metrics=[f"seconds/{x}"]) for x in STAGES],
        "Report": [panels.MediaBrowser(media_keys=[REPORT]), panels.WeavePanelSummaryTable(table_name=POINTS)],
    }
    # A record that two tables share is one run, in the group of the table that made it: found here by its id.
    mine = [r.key[:12] for r in sweep.records]
    return spaces.Workspace(
        name=sweep.caption,
        entity=entity,
        project=project,
        sections=[
            spaces.Section(name=name, panels=found, is_open=name in {"Curves", "Report"}) for name, found in sections.items() if found
        ],
        runset_settings=spaces.RunsetSettings(
            filters=spaces.Or(spaces.Metric("Group") == group, spaces.Metric("ID").isin(mine)),
            pinned_columns=["run:displayName", "run:jobType", *(f"summary:{x}" for x in (RETENTION, BYTES, *keys.values()))],
        ),
    )


def about_tracking(override: str) -> bool:
    """Whether an override says where results are shown, which no point of a sweep depends on."""
    return override.lstrip("+").startswith(("tracking=", "tracking."))


def tracking_of(overrides: Sequence[str]) -> WandbTracking:
    """conf/tracking/wandb.yaml with what was typed about it and about paths. Raises UserError."""
    typed = [x for x in overrides if about_tracking(x) or x.startswith("paths.")]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            made = instantiate(compose("config", overrides=["tracking=wandb", *typed]).tracking)
    except HydraException as error:
        raise UserError(f"{' '.join(typed) or 'tracking=wandb'}: {str(error).splitlines()[0]}") from error
    if not isinstance(made, WandbTracking):
        raise UserError("tracking=none shows nothing anywhere: leave it away, or name another.")
    return made


def publish(name: str, overrides: Sequence[str], folders: Sequence[Path] | None) -> str:
    """Upload what can be, store the rest, and say what happened. Raises UserError."""
    tracking = tracking_of(overrides)
    sweep = load_sweep(name, [x for x in overrides if not about_tracking(x)], stored(folders))
    shown = sweep_report(name, sweep, report(sweep, stores(folders)))
    entity = tracking.publish_sweep(shown)
    made = view(sweep, shown, project=tracking.project, entity=entity or tracking.entity or "", group=tracking.group or sweep.caption)
    path = Path(tracking.folder).expanduser() / "wandb" / f"{name}-view.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(made._to_model().model_dump(by_alias=True, exclude_none=True), indent=1) + "\n")
    lines = [f"{len(shown.points)} of {len(sweep.points)} points, {len(shown.curves)} curves", f"view: {path}"]
    if entity is None:
        lines.append(
            f"Not uploaded: `wandb sync {tracking.folder}/wandb/offline-run-*-{shown.key}`, then this command online for the view."
        )
        return "".join(f"{line}\n" for line in lines)
    try:
        made.save()
    except Exception as error:  # W&B raises what its transport raises
        raise UserError(f"The run is uploaded, the view is not ({str(error).splitlines()[0] or repr(error)}): run this again.") from error
    return "".join(f"{line}\n" for line in [*lines, made.url])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m specomp.tables.dashboard", description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", help="what was typed after experiment=NAME, and tracking.KEY=VALUE")
    parser.add_argument("--records", nargs="*", type=Path, help="folders of records (default: yours and the committed ones)")
    options = parser.parse_intermixed_args(arguments)
    try:
        sys.stdout.write(publish(options.experiment, options.overrides, options.records))
    except UserError as error:
        logging.getLogger("specomp").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
