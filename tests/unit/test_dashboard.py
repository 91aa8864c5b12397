"""A whole sweep on W&B: what is uploaded, and the saved view, built and checked without a
network.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ledgers import made_ledger
from wandb_server import Server

from specomp.errors import UserError
from specomp.evaluation.metric import FRACTION
from specomp.experiment.record import Record
from specomp.tables import dashboard
from specomp.tables.dashboard import main, metric_key, sweep_report, tracking_of, view
from specomp.tables.sweep import LEDGER, Column, Point, Sweep

PPL = Column(label="wikitext2 ppl", protocol="wikitext2@1:512x24:", metric="ppl")
PIQA = Column(label="piqa acc", protocol="piqa@1", metric="acc", better="higher", unit=FRACTION)
LOSS = Column(label="norm error", protocol=LEDGER, metric="norm_error")
PPL_KEY = "wikitext2@1:512x24:696cca6b/ppl"


def record(key: str, retention: float, ppl: float) -> Record:
    return Record(
        key=key * 16,
        status="ok",
        choices={"model": "tiny_llama", "method": "svd"},
        ledger=made_ledger(
            measured_retention=retention,
            norm_error=0.5,
            compressed={"model_bytes": int(1000 * retention)},
        ),
        metrics={"wikitext2@1:512x24:696cca6b": {"ppl": ppl, "tokens": 12264.0}},
    )


def point(ratio: str, method: str, *records: Record | None) -> Point:
    commands = tuple(
        f"python run.py ratio={ratio} method={method} seed={i}" for i in range(len(records))
    )
    return Point(
        keys={"ratio": ratio, "method": method},
        commands=commands,
        models="tiny_llama",
        columns=(PPL, PIQA, LOSS),
        records=records,
    )


@pytest.fixture
def sweep() -> Sweep:
    """Two methods, two ratios, two seeds of one point; one point has not run, and one benchmark
    nowhere.
    """
    points = [
        point("cr40", "svd", record("a", 0.6, 20.0), record("b", 0.6, 30.0)),
        point("cr60", "svd", record("c", 0.4, 50.0), None),
        point("cr40", "adasvd", record("d", 0.59, 15.0), record("e", 0.59, 17.0)),
        point("cr60", "adasvd", None, None),
    ]
    return Sweep(
        name="table1",
        caption="Table 1: a test",
        command="",
        asked="",
        keys=["ratio", "method"],
        columns=[PPL, PIQA, LOSS],
        points=points,
        quotes=[],
    )


def test_points_are_means_over_seeds(sweep):
    shown = sweep_report(sweep, "<p>")
    assert [
        (p["ratio"], p["series"], p["wikitext2 ppl"], p["measured_retention"]) for p in shown.points
    ] == [
        ("cr40", "svd", 25.0, 0.6),
        ("cr60", "svd", 50.0, 0.4),
        ("cr40", "adasvd", 16.0, 0.59),
    ]
    assert [p["model_bytes"] for p in shown.points] == [600, 400, 590]
    assert all(p["piqa acc"] is None for p in shown.points)
    assert shown.points[0]["record"] == "a" * 12


def test_every_measured_column_is_a_curve_against_retention_and_bytes(sweep):
    shown = sweep_report(sweep, "<p>")
    assert shown.curves == {
        "curves/wikitext2 ppl against retention": ("measured_retention", "wikitext2 ppl"),
        "curves/wikitext2 ppl against bytes": ("model_bytes", "wikitext2 ppl"),
        "curves/norm error against retention": ("measured_retention", "norm error"),
        "curves/norm error against bytes": ("model_bytes", "norm error"),
    }


def test_the_run_of_a_sweep_is_found_again(sweep):
    first = sweep_report(sweep, "<p>")
    later = Sweep(
        **vars(sweep)
        | {
            "points": [
                point(*p.keys.values(), *[record("f", 0.5, 1.0)] * len(p.commands))
                for p in sweep.points
            ]
        }
    )
    assert sweep_report(later, "<p>").key == first.key, "what has run since does not matter"
    assert sweep_report(replace(sweep, name="table2"), "<p>").key != first.key
    assert sweep_report(Sweep(**vars(sweep) | {"points": sweep.points[:2]}), "<p>").key != first.key


def test_an_empty_sweep_has_nothing_to_draw(sweep):
    empty = Sweep(**vars(sweep) | {"points": [point("cr40", "svd", None)]})
    shown = sweep_report(empty, "<p>")
    assert (list(shown.points), dict(shown.curves)) == ([], {})


def test_columns_are_called_as_runs_call_them(sweep):
    assert metric_key(PPL, sweep) == PPL_KEY
    assert metric_key(PIQA, sweep) is None
    assert metric_key(LOSS, sweep) == "norm_error"


@pytest.fixture
def made(sweep):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is the extra `dashboard`")
    return view(
        sweep,
        sweep_report(sweep, "<p>"),
        project="specomp",
        entity="someone",
        group="Table 1: a test",
    )


def panels(made, section: str) -> list[dict]:
    found = made._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]["section"][
        "panelBankConfig"
    ]["sections"]
    return next(x["panels"] for x in found if x["name"] == section)


def test_the_view_has_a_section_for_every_question(made):
    assert [(x.name, len(x.panels)) for x in made.sections] == [
        ("Curves", 4),
        ("Quality by run", 4),
        ("All at once", 1),
        ("Where the parameters are", 1),
        ("Training", 3),
        ("Cost", 5),
        ("Report", 2),
    ]
    assert (made.entity, made.project, made.name) == ("someone", "specomp", "Table 1: a test")


def test_curves_read_the_tables_that_the_run_of_the_sweep_logs(made):
    first = panels(made, "Curves")[0]["config"]
    assert first["panelDefId"] == "wandb/line/v0"
    assert first["fieldSettings"] == {
        "x": "measured_retention",
        "y": "wikitext2 ppl",
        "stroke": "series",
    }
    assert '"curves/wikitext2 ppl against retention_table"' in json.dumps(first)


def test_scatter_plots_read_the_summaries_of_the_runs(made):
    scatter = panels(made, "Quality by run")
    assert [(x["config"]["xAxis"], x["config"]["yAxis"]) for x in scatter] == [
        (f"summary:{axis}", f"summary:{key}")
        for key in (PPL_KEY, "norm_error")
        for axis in ("measured_retention", "model_bytes")
    ]
    assert all(x["config"]["yAxisLogScale"] for x in scatter), "smaller is better for both"


def test_the_view_shows_the_group_and_records_shared_with_other_tables(made):
    filters = json.dumps(
        made._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]["section"]["runSets"][
            0
        ]["filters"]
    )
    assert '"group"' in filters
    assert '"Table 1: a test"' in filters
    for key in "abcde":
        assert key * 12 in filters


def test_without_the_package_the_extra_is_named(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"\[dashboard\]"):
        view(sweep, sweep_report(sweep, "<p>"), project="p", entity="e", group="g")


def test_tracking_is_the_yaml_with_what_was_typed(tmp_path):
    made = tracking_of(
        [
            "ratio=cr40,cr60",
            "tracking.mode=offline",
            f"paths.outputs={tmp_path}",
            "tracking.group=mine",
        ]
    )
    assert (made.project, made.mode, made.folder, made.group) == (
        "specomp",
        "offline",
        str(tmp_path),
        "mine",
    )
    with pytest.raises(UserError, match="nonsense"):
        tracking_of(["tracking.nonsense=1"])
    with pytest.raises(UserError, match="tracking=none"):
        tracking_of(["tracking=none"])


def test_an_unknown_experiment_is_one_line(caplog):
    assert main(["no_such_table"]) == 1
    assert "No experiment no_such_table" in caplog.text


@pytest.mark.parametrize("place", [None, "someone"])
def test_the_command(sweep, tmp_path, monkeypatch, capsys, place):
    """Both ends by a stand-in: what is uploaded, and whether the view is saved or only written."""
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is the extra `dashboard`")
    import wandb_workspaces.workspaces as spaces

    seen, saved = [], []
    monkeypatch.setattr(
        dashboard, "load_sweep", lambda asked, records: (seen.append(asked), sweep)[1]
    )
    monkeypatch.setattr(
        dashboard.WandbTracking, "publish_sweep", lambda self, shown: (seen.append(shown), place)[1]
    )
    monkeypatch.setattr(spaces.Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(spaces.Workspace, "url", "https://example.org/view")
    assert (
        main(
            [
                "table1",
                "ratio=cr40,cr60",
                "tracking=wandb",
                "tracking.group=mine",
                f"paths.outputs={tmp_path}",
            ]
        )
        == 0
    )
    asked, shown = seen
    assert asked == ["table1", "ratio=cr40,cr60", f"paths.outputs={tmp_path}"], (
        "no point depends on where it is shown"
    )
    assert "<h1>Table 1: a test</h1>" in shown.html
    stored = json.loads((tmp_path / "wandb" / "table1-view.json").read_text())
    assert stored["displayName"] == "Table 1: a test"
    told = capsys.readouterr().out
    assert "3 of 4 points, 4 curves" in told
    assert len(saved) == (place is not None)
    if place is None:
        assert f"offline-run-*-{shown.key}`" in told
    else:
        assert saved[0].entity == "someone"
        assert '"mine"' in json.dumps(stored["spec"]["section"]["runSets"][0]["filters"])
        assert "https://example.org/view" in told


def test_with_the_real_package_and_a_server(tmp_path):
    """The command as it is typed, with nothing measured yet: a run, its report and a view
    arrive.
    """
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is the extra `dashboard`")
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("WANDB") and "proxy" not in k.lower()
    }
    with Server() as server:
        kept |= {
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "x" * 40,
            "HOME": str(tmp_path),
            "WANDB_SILENT": "true",
        }
        kept |= {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
            )
        }
        records = tmp_path / "records"
        records.mkdir()
        point = ["ratio=cr40", "method.compensation.iterations=1"]
        command = [
            sys.executable,
            "-m",
            "specomp",
            "dashboard",
            "adasvd_table3c",
            "debug=tiny",
            *point,
            f"paths.outputs={tmp_path}",
        ]
        done = subprocess.run(
            [*command, "--records", str(records)],
            env=kept,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        ((key, run),) = server.runs.items()
        assert key.startswith("sweep-")
        assert (run["groupName"], run["jobType"]) == ("AdaSVD Table 3c: iterations", "report")
        assert "adasvd_table3c-report" in json.dumps(server.artifacts)
        (saved,) = server.views
        assert (saved["entityName"], saved["projectName"], saved["displayName"]) == (
            "someone",
            "specomp",
            "AdaSVD Table 3c: iterations",
        )
        assert "Training" in saved["spec"]
