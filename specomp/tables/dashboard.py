"""specomp dashboard EXPERIMENT [overrides ...]: the sweep on W&B, beside the runs
of its records.

One more run of the sweep's group with the HTML report (shown, and as an artifact), its points as a
table and every metric against retention and bytes; and a saved view of the project
(wandb-workspaces) with panels for the sweep. `tracking.*` overrides say where; with
tracking.mode=offline or without a server the run waits for `wandb sync`, and the view is written as
a file only.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose

from specomp.cache import digest
from specomp.disk import atomic_path
from specomp.errors import UserError, needed
from specomp.experiment import tracking as logged
from specomp.experiment.completed import completed
from specomp.experiment.making import make
from specomp.experiment.record import stored, stores
from specomp.experiment.tracking import BYTES, RETENTION, SweepReport, WandbTracking
from specomp.tables.charts import STAGES
from specomp.tables.command import command, sweep_parser
from specomp.tables.report import report
from specomp.tables.sweep import LEDGER, Column, Sweep, configured, load_sweep

AXES = {RETENTION: "retention", BYTES: "bytes"}
TRAINING = ("train/kl", "train/soft", "train/hard")  # as training/distill.py logs them


def sweep_report(sweep: Sweep, html: str) -> SweepReport:
    """What a run shows of a whole sweep; its id is the sweep's: a later call continues the run."""
    points: list[dict[str, Any]] = [
        {"series": point.series(), **point.keys, "record": point.done[0].key[:12]}
        | {RETENTION: point.retention, BYTES: point.model_bytes}
        | {c.label: point.mean(c) for c in sweep.columns}
        for point in sweep.points
        if point.done
    ]
    curves = {
        f"curves/{against(c.label, axis)}": (axis, c.label)
        for c in sweep.columns
        for axis in AXES
        if sum(p[c.label] is not None for p in points) > 1
    }
    key = "sweep-" + digest([sweep.name, [p.commands for p in sweep.points]])[:12]
    return SweepReport(
        key=key, name=sweep.name, caption=sweep.caption, html=html, points=points, curves=curves
    )


def against(label: str, axis: str) -> str:
    """The title of a column drawn over an axis."""
    return f"{label} against {AXES[axis]}"


def metric_key(column: Column, sweep: Sweep) -> str | None:
    """What a column is called in the summary of a run; None while no record has it, for a
    benchmark's id ends with the hash of its text.
    """
    if column.protocol == LEDGER:
        return column.metric
    ids = (x for r in sweep.records for x in r.metrics if column.matches(x))
    return next((f"{x}/{column.metric}" for x in ids), None)


def view(sweep: Sweep, shown: SweepReport, *, project: str, entity: str, group: str) -> Any:
    """The saved view: a wandb_workspaces Workspace, made without a network; `save()` uploads it."""
    needed("wandb_workspaces", "dashboard", "The run of the sweep is there; its view")
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as spaces

    keys = {c: key for c in sweep.columns if (key := metric_key(c, sweep)) is not None}

    def scatter(column: Column, axis: str) -> Any:
        return panels.ScatterPlot(
            title=against(column.label, axis),
            x=panels.SummaryMetric(axis),
            y=panels.SummaryMetric(keys[column]),
            log_y=column.lower_is_better,
        )

    def curve(name: str) -> Any:
        x, y = shown.curves[name]
        made = panels.CustomChart.from_table(
            f"{name}_table",
            chart_fields={"x": x, "y": y, "stroke": "series"},
            chart_strings={"title": name.removeprefix("curves/"), "xname": x, "yname": y},
        )
        made.chart_name = "wandb/line/v0"
        return made

    def training(metric: str) -> Any:
        logarithmic = metric == TRAINING[0]
        return panels.LinePlot(title=metric, x="trainer/global_step", y=[metric], log_y=logarithmic)

    metrics = [panels.SummaryMetric(x) for x in (RETENTION, *keys.values())]
    axes = [panels.Config("method.name"), *metrics]
    every = [panels.ParallelCoordinatesPlotColumn(metric=x) for x in axes]
    stored_table = panels.WeavePanelSummaryTable
    sections = {
        "Curves": [curve(name) for name in shown.curves],
        "Quality by run": [scatter(column, axis) for column in keys for axis in AXES],
        "All at once": [panels.ParallelCoordinatesPlot(columns=every)],
        "Where the parameters are": [stored_table(table_name=logged.LINEARS)],
        "Training": [training(x) for x in TRAINING],
        "Cost": [panels.BarPlot(title=f"{x}: seconds", metrics=[f"seconds/{x}"]) for x in STAGES],
        "Report": [
            panels.MediaBrowser(media_keys=[logged.REPORT]),
            stored_table(table_name=logged.POINTS),
        ],
    }
    # A record that two tables share is one run, in the group of the table that made it: found here
    # by its id.
    mine = spaces.Metric("ID").isin([r.key[:12] for r in sweep.records])
    summaries = [f"summary:{x}" for x in (RETENTION, BYTES, *keys.values())]
    return spaces.Workspace(
        name=sweep.caption,
        entity=entity,
        project=project,
        sections=[
            spaces.Section(name=name, panels=found, is_open=name in {"Curves", "Report"})
            for name, found in sections.items()
            if found
        ],
        runset_settings=spaces.RunsetSettings(
            filters=spaces.Or(spaces.Metric("Group") == group, mine),
            pinned_columns=["run:displayName", "run:jobType", *summaries],
        ),
    )


def about_tracking(override: str) -> bool:
    """Whether an override says where results are shown, which no point of a sweep depends on."""
    return override.lstrip("+").startswith(("tracking=", "tracking."))


def tracking_of(overrides: Sequence[str]) -> WandbTracking:
    """conf/tracking/wandb.yaml with what was typed about it and about paths. Raises UserError."""
    typed = [x for x in overrides if about_tracking(x) or x.startswith("paths.")]
    with configured(" ".join(typed) or "tracking=wandb"):
        made = make(completed(compose("config", overrides=["tracking=wandb", *typed])), "tracking")
    if not isinstance(made, WandbTracking):
        raise UserError("tracking=none shows nothing anywhere: leave it away, or name another.")
    return made


def publish(options: Namespace) -> str:
    """Upload what can be, store the rest, and say what happened. Raises UserError."""
    overrides = [options.experiment, *options.overrides]
    tracking = tracking_of(overrides)
    about_points = [x for x in overrides if not about_tracking(x)]
    sweep = load_sweep(about_points, stored(options.records))
    if not sweep.records:
        raise UserError(f"No point of it has run, so there is nothing to show: `{sweep.command}`.")
    shown = sweep_report(sweep, report(sweep, stores(options.records)))
    entity = tracking.publish_sweep(shown)
    made = view(
        sweep,
        shown,
        project=tracking.project,
        entity=entity or tracking.entity or "",
        group=tracking.group or sweep.caption,
    )
    path = Path(tracking.folder).expanduser() / "wandb" / f"{sweep.name}-view.json"
    stored_view = made._to_model().model_dump(by_alias=True, exclude_none=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(stored_view, indent=1) + "\n")
    counts = f"{len(shown.points)} of {len(sweep.points)} points, {len(shown.curves)} curves"
    told = f"{counts}\nview: {path}\n"
    if entity is None:
        runs = f"{tracking.folder}/wandb/offline-run-*-{shown.key}"
        how = f"`wandb sync {runs}`, then this command online for the view."
        return f"{told}Not uploaded: {how}\n"
    try:
        made.save()
    except Exception as error:  # W&B raises what its transport raises
        why = str(error).splitlines()[0] or repr(error)
        raise UserError(f"The run is uploaded, the view is not ({why}): run this again.") from error
    return f"{told}{made.url}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = sweep_parser("dashboard", __doc__, also=", and tracking.KEY=VALUE")
    return command(parser, arguments, publish)
