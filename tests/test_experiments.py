"""Every paper table: its sweep composes for every model, its published cells belong to it, and a
small one runs from sweep to table.
"""

import csv
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from command import typed as typed_in_this_process
from hydra import compose, initialize_config_dir
from running import CONF, ROOT, compose_config, store

from specomp.errors import UserError
from specomp.experiment.making import make
from specomp.experiment.pipeline import run
from specomp.experiment.record import COMMITTED, RecordStore, companions, point_of, publish, stored
from specomp.settings import choices
from specomp.tables.paper import grid, paper_table, write
from specomp.tables.render import render
from specomp.tables.report import main as report
from specomp.tables.report import write as report_files
from specomp.tables.sweep import Sweep, _axes, configured, load_sweep
from specomp.tables.table import main

EXPERIMENTS = choices("experiment")
PAPER_MODELS = ("llama2_7b", "opt_6_7b", "mistral_7b", "vicuna_7b")
TINY = ["debug=tiny", "ratio=cr40", "benchmark=tiny", "save=false"]


def test_there_is_an_experiment_for_every_table():
    assert {f"adasvd_table{x}" for x in ("1", "2", "3a", "3b", "3c", "3d")} | {
        "soco_table",
        "soco_ablation",
    } <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_opens_with_what_it_is(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    head = "\n".join(lines[: lines.index("defaults:")])
    assert all(x.startswith("# ") for x in lines[1 : lines.index("defaults:")])
    assert f"python run.py -m experiment={name} " in head and f"specomp table {name} " in head
    assert "# Expect: " in head


def axes_of(name: str) -> dict[str, list[str]]:
    """What an experiment sweeps: key -> values."""
    asked = f"experiment={name}"
    with configured(asked):
        return _axes([asked], [])[1]


def valid(name: str, points: Sequence[Mapping[str, str]]) -> None:
    """Method, ratio, quantizer and benchmark of every point pass their own checks, and no two
    points are the same.
    """
    marks = set()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for keys in points:
            typed = [f"experiment={name}", *(f"{k}={v}" for k, v in keys.items())]
            cfg = compose("config", overrides=typed)
            make(cfg, "method", rounding=cfg.quantizer)
            for group in ("ratio", "quantizer", "benchmark"):
                make(cfg, group)
            marks.add(point_of({key: str(value) for key, value in cfg.items()}))
    assert len(marks) == len(points)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_point_is_a_valid_experiment_of_its_own(name):
    sweep = load_sweep([name], [])
    valid(name, [point.keys for point in sweep.points])
    assert len(sweep.points) == len(sweep.missing()), "nothing has run"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_swept_value_makes_a_valid_experiment(name):
    axes = axes_of(name)
    longest = max(map(len, axes.values()))
    valid(name, [{k: v[i % len(v)] for k, v in axes.items()} for i in range(longest)])


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"model={x}"] for x in PAPER_MODELS[1:]),
        ["model=smollm2_135m", "budget=cpu"],
        ["model=smollm2_135m", "budget=cpu_bf16"],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_for_every_model(name, overrides):
    """One point of it."""
    axes = {k: v for k, v in axes_of(name).items() if k != "model"}
    last = [f"{key}={values[-1]}" for key, values in axes.items()]
    (point,) = load_sweep([name, *overrides, *last], []).points
    assert point.models == overrides[0].removeprefix("model=")


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.csv")), ids=lambda p: p.stem)
def test_published_cells_belong_to_the_sweep(path):
    sweep = load_sweep([path.stem], [])
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    keys = [x for x in header if x not in {"model", "metric", "value", "source", "note"}]
    assert set(keys) <= set(sweep.keys)
    labels = {c.label for c in sweep.columns}
    for quote in sweep.quotes:
        assert quote.metric in labels
        assert re.match(r"arXiv:\d{4}\.\d{5} Table \d", quote.source)
        assert quote.value > 0 if quote.metric.endswith("ppl") else 0 < quote.value < 1
    used = [
        q
        for p in sweep.points
        for c in sweep.columns
        if (q := sweep.quote(p, c)) is not None and q.model == p.models
    ]
    assert {id(q) for q in used} == {id(q) for q in sweep.quotes}, (
        "every quoted cell has a place in the table, and one only"
    )
    assert len(used) == len(sweep.quotes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """adasvd_table3a at debug=tiny, both points run."""
    folder = tmp_path_factory.mktemp("experiment")
    for choice in ("none", "adacomp"):
        assert (
            run(
                compose_config(
                    folder, "experiment=adasvd_table3a", *TINY, f"method/compensation={choice}"
                )
            )
            is not None
        )
    return folder


def swept(folder: Path, *overrides: str) -> Sweep:
    return load_sweep(["adasvd_table3a", *TINY, *overrides], store(folder).all())


def test_a_sweep_becomes_a_table(folder):
    sweep = swept(folder)
    assert not sweep.missing()
    header, body = grid(sweep)
    assert header == ["ratio", "method/compensation", "", "retention", "pydocs ppl"]
    assert body[0][0] == "dense"
    assert [line[1] for line in body[1:]] == ["none", "adacomp"]
    values = [point.values(sweep.columns[0])[0] for point in sweep.points]
    shown = [line[-1] for line in body[1:]]
    assert all(f"{v:.2f}" in x for v, x in zip(values, shown, strict=True))
    text = paper_table(sweep, "markdown")
    assert "Missing" not in text
    assert "predicted tokens in windows of 32" in text
    assert "devices" not in text, "all the same"


def test_a_table_says_where_its_numbers_come_from_several_devices(folder):
    sweep = swept(folder)
    first, *rest = sweep.points
    record = replace(first.records[0], provenance={"device": "NVIDIA H200"})
    mixed = replace(sweep, points=[replace(first, records=(record,)), *rest])
    assert "- devices: NVIDIA H200 (1 runs), cpu (1 runs)" in paper_table(mixed, "markdown")


def test_what_is_missing_is_a_command_that_fills_it(folder, tmp_path):
    sweep = swept(folder, "ratio=cr40,cr60")
    missing = sweep.missing()
    assert len(missing) == 2
    assert all("ratio=cr60" in x for x in missing)
    run(compose_config(tmp_path, *shlex.split(missing[0])[2:]))
    after = load_sweep(
        ["adasvd_table3a", *TINY, "ratio=cr40,cr60"],
        [*store(folder).all(), *store(tmp_path).all()],
    )
    assert after.missing() == missing[1:]


def test_a_point_is_found_again_elsewhere(folder):
    """Device, batch sizes and data roots are not part of what was asked for."""
    sweep = swept(folder, "model.device=cpu", "calibration.batch_size=3")
    assert not sweep.missing()
    assert swept(folder, "calibration.num_samples=3").missing()


def test_one_record_answers_to_every_command_that_asks_for_it(folder):
    """Spelled differently, the same weights: the record learns the second name."""
    before = len(store(folder).all())
    run(compose_config(folder, *TINY, "method=adasvd", "seed=0"))
    records = store(folder).all()
    assert len(records) == before
    assert not swept(folder).missing()


def test_seeds_become_mean_and_deviation(folder):
    sweep = swept(folder, "seed=0,1")
    assert sweep.keys == ["ratio", "method/compensation"]
    assert [len(p.commands) for p in sweep.points] == [2, 2]
    first = sweep.points[0].records[0]
    other = replace(
        first,
        key="f" * 64,
        metrics={k: {**v, "ppl": v["ppl"] + 1} for k, v in first.metrics.items()},
    )
    both = replace(sweep, points=[replace(sweep.points[0], records=(first, other))])
    assert "± 0.71 (2)" in paper_table(both, "markdown")
    one = replace(sweep, points=[replace(sweep.points[0], records=(first, None))])
    assert "(1 of 2)" in paper_table(one, "markdown")


def test_two_records_in_one_cell_are_refused(folder):
    records = store(folder).all()
    twin = replace(
        next(r for r in records if r.points and r.choices["method"] != "dense"), key="e" * 64
    )
    with pytest.raises(UserError, match="answer to the same command"):
        load_sweep(["adasvd_table3a", *TINY], [*records, twin])


def test_published_records_give_the_same_table(folder, tmp_path):
    sweep = swept(folder)
    paths = publish(sweep.records, [store(folder)], tmp_path / "records")
    assert len(paths) == 2
    for path in paths:
        text = path.read_text()
        assert str(folder) not in text
        assert json.loads(text)["model_folder"] is None
        assert path.with_suffix(".linears.csv").exists()
    again = load_sweep(["adasvd_table3a", *TINY], RecordStore(tmp_path / "records").all())
    for form in ("markdown", "csv", "latex"):
        assert paper_table(again, form) == paper_table(sweep, form)
    assert {p.name for p in write(again, tmp_path / "table")} == {
        "table.md",
        "table.csv",
        "table.tex",
    }


def test_a_file_that_a_run_in_progress_wrote_is_no_part_of_a_record(folder, tmp_path):
    record, other = swept(folder).records[0], RecordStore(tmp_path)
    other.companion(record.key, "linears.csv").write_text("unfinished")
    assert companions([other, store(folder)], record, "linears.csv") == [
        store(folder).companion(record.key, "linears.csv")
    ]


def test_command_line(folder, tmp_path, capsys):
    records = ["--records", str(folder / "outputs" / "records")]
    assert main(["adasvd_table3a", *TINY, *records]) == 0
    assert "# AdaSVD Table 3a" in capsys.readouterr().out
    assert main(["adasvd_table3a", *TINY, "ratio=cr60", "--missing", *records]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (
        main(
            [
                "adasvd_table3a",
                *TINY,
                "--publish",
                str(tmp_path / "x"),
                "--write",
                str(tmp_path / "y"),
                *records,
            ]
        )
        == 0
    )
    assert (tmp_path / "y" / "table.md").exists()
    assert main(["adasvd_table3a", "no_such_key=1"]) == 1


def test_a_sweep_in_a_process_of_its_own(folder):
    """`python run.py -m experiment=...`: nothing is left to do."""
    environment = {
        "SPECOMP_OUTPUTS": str(folder / "outputs"),
        "SPECOMP_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, str(ROOT / "run.py"), "-m", "experiment=adasvd_table3a", *TINY]
    done = subprocess.run(
        line, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is complete.") == 2


def test_bold_and_escapes():
    body = [["a_b", "**1.0**"], ["c ± d", "2"]]
    markdown = render(["x", "y"], body, "markdown")
    assert markdown.startswith("| x     | y       |\n|-------|---------|\n| a_b   | **1.0** |\n")
    latex = render(["x", "y"], body, "latex")
    assert r"a\_b & \textbf{1.0}" in latex
    assert r"$\pm$" in latex
    assert render(["x", "y"], body[1:], "csv") == "x,y\nc ± d,2\n"


def browser() -> str | None:
    return next(
        (
            path
            for x in ("chromium", "chromium-browser", "google-chrome")
            if (path := shutil.which(x))
        ),
        None,
    )


def test_the_report_is_one_file_with_everything_in_it(folder, tmp_path):
    for ratio in ("cr40", "cr60"):
        for choice in ("none", "adacomp"):
            run(
                compose_config(
                    folder,
                    "experiment=adasvd_table3a",
                    *TINY,
                    f"ratio={ratio}",
                    f"method/compensation={choice}",
                )
            )
    typed = [
        "adasvd_table3a",
        *TINY,
        "ratio=cr40,cr60",
        "--records",
        str(folder / "outputs" / "records"),
    ]
    assert report(typed + ["--output", str(tmp_path / "report.html")]) == 0
    assert report(typed + ["--write", str(tmp_path / "written")]) == 0
    assert (tmp_path / "written" / "report.html").read_text() == (
        tmp_path / "report.html"
    ).read_text()
    drawn = sorted(x.name for x in (tmp_path / "written").glob("*.svg"))
    assert drawn == [
        "pydocs-ppl-against-bytes-of-the-model.svg",
        "pydocs-ppl-against-retention.svg",
    ]
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(https?:)?//', page), "nothing is loaded from a network"
    assert (
        page.count("<svg") == page.count("</svg>") == 2 + 2 + 4 + 1 + 1
    )  # curves, profiles, maps, spectra (of one norm), times
    assert "<table>" in page
    assert "Missing" not in page
    assert page.count(' id="') == len(set(re.findall(r' id="([^"]+)"', page))), (
        "figures share one page and must not share ids"
    )


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_in_a_browser(folder, tmp_path, width):
    """Tables and figures are there, and at the width of a phone nothing but a table's own box
    scrolls sideways.
    """
    path = tmp_path / "report.html"
    assert (
        report(
            [
                "adasvd_table3a",
                *TINY,
                "--records",
                str(folder / "outputs" / "records"),
                "--output",
                str(path),
            ]
        )
        == 0
    )
    measure = """<script>document.title = JSON.stringify({
      page: document.documentElement.scrollWidth, window: window.innerWidth,
      tables: document.querySelectorAll("table tbody tr").length,
      drawn: [...document.querySelectorAll("figure svg")].filter(
        x => x.closest("details") || x.getBoundingClientRect().height > 50).length,
      figures: document.querySelectorAll("figure").length})</script>"""
    path.write_text(path.read_text().replace("</body>", measure + "</body>"))
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-sync",
        "--no-first-run",
    ]
    line = [
        str(browser()),
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
        path.as_uri(),
    ]
    page = subprocess.run(line, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.findall("<title>(.*?)</title>", page)[0]))
    assert found["page"] <= found["window"]
    assert found["tables"] >= 3
    assert found["drawn"] == found["figures"] > 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*/table.csv")), ids=lambda p: p.parent.name
)
def test_committed_tables_and_reports_come_from_committed_records(path, tmp_path):
    """The command in each table's own text makes it again, to the letter, from
    experiments/records.
    """
    words = shlex.split(
        re.findall(r"made by `python run\.py -m ([^`]+)`", path.with_suffix(".md").read_text())[0]
    )
    sweep = load_sweep(words, stored([COMMITTED]))
    for suffix, form in ((".md", "markdown"), (".csv", "csv"), (".tex", "latex")):
        assert path.with_suffix(suffix).read_text() == paper_table(sweep, form), (
            f"made again by --write {path.parent}"
        )
    if path.with_name("report.html").exists():
        made = report_files(sweep, [RecordStore(COMMITTED)], tmp_path)
        assert len(made) > 1
        for file in made:
            assert path.with_name(file.name).read_text() == file.read_text(), (
                f"made again by report --write {path.parent}"
            )


def test_a_sweep_of_yamls_of_ones_own_has_its_table(tmp_path, capsys):
    """Its points are composed again, with the same folder beside ours."""
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "mine.yaml").write_text("defaults: [svd, _self_]\nname: mine\n")
    beside = ["--config-dir", str(tmp_path / "own")]
    done = typed_in_this_process(
        tmp_path, *beside, "-m", "debug=tiny", "method=mine,svd", "ratio=cr40"
    )
    assert done.returncode == 0 and "| mine " in done.stdout
    again = re.search(r"This table again: specomp (table .*)", done.stdout).group(1)
    assert again.endswith(shlex.join(beside)) or f" {shlex.join(beside)} " in again
    done = typed_in_this_process(tmp_path, *shlex.split(again))
    assert done.returncode == 0 and "| mine " in done.stdout
