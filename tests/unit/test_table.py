"""The table of records: rows, filters, three formats, and honest cells."""

import csv
import io
import math

import pytest
from command import typed
from ledgers import made_ledger

from specomp.errors import UserError
from specomp.experiment.record import Record, RecordStore, record_key
from specomp.tables.render import MISSING, render
from specomp.tables.table import (
    cell,
    columns_of,
    default_columns,
    flatten,
    listing,
    main,
    select,
)


def record(
    method="svd", compression=0.4, ppl=12.345, *, model="llama", overrides=(), status="ok", **values
) -> Record:
    metrics = {"wikitext2@1": {"ppl": ppl, **values}} if ppl is not None else {}
    return Record(
        key=record_key(
            {
                "model": model,
                "method": method,
                "compression": compression,
                "overrides": list(overrides),
            }
        ),
        status=status,
        choices={"model": model, "method": method, "calibration": "wikitext2"},
        config={"overrides": list(overrides)},
        ledger=made_ledger(
            target_retention=1 - compression,
            measured_retention=0.98 * (1 - compression),
            target_compression=compression,
            compressed={"model_bytes": 1000},
        ),
        metrics=metrics,
        seconds={
            "load": 100.0,
            "calibrate": 2.0,
            "allocate": 0.5,
            "compress": 3.0,
            "evaluate": 50.0,
        },
    )


@pytest.fixture
def folder(tmp_path):
    store = RecordStore(tmp_path / "records")
    failed = Record(
        key=record_key({"failed": 1}),
        status="failed",
        error="UserError: rank 0",
        choices={"model": "llama", "method": "asvd"},
    )
    rows = [
        record("svd_llm", 0.6, 20.5, acc=0.25),
        record("svd", 0.4, 11.25),
        record("svd", 0.6, 31.0),
        record("svd", 0.4, 9.0, model="bert_like"),
        failed,
    ]
    for row in rows:
        store.save(row)
    return store.folder


def run(capsys, *arguments):
    code = main([str(x) for x in arguments])
    return code, capsys.readouterr().out


def test_flatten_names_metrics_by_benchmark():
    row = flatten(record(acc=0.5))
    assert row["wikitext2@1 ppl"] == 12.345
    assert row["wikitext2@1 acc"] == 0.5
    assert row["wikitext2@1 collapsed"] is False
    assert row["compression"] == 0.4
    assert row["bytes"] == 1000
    assert row["seconds"] == 5.5, "what the method costs, without loading and evaluation"
    assert row["record"] == record(acc=0.5).key[:12]


def test_a_training_is_priced_even_where_it_came_from_the_cache():
    trained = record()
    trained.training = {"seconds": 600.0, "tokens": 1024}
    row = flatten(trained)
    assert (row["train seconds"], row["train tokens"]) == (600.0, 1024)
    assert "train seconds" in default_columns([row])
    assert "train seconds" not in default_columns([flatten(record())])


def test_packings_are_never_beside_each_other_without_a_label():
    pivoted = record("specomp")
    pivoted.ledger = made_ledger(packing="pivoted")
    rows = [flatten(record()), flatten(pivoted)]
    assert [cell(row, "packing") for row in rows] == ["factors", "pivoted"]
    assert "packing" in default_columns(rows)
    assert "packing" not in default_columns(rows[:1])


def test_what_differs_from_the_row_is_named():
    overrides = [
        "method=adasvd",
        "method.name=mine",
        "method.allocation.budget=raw",
        "+method/whitening=none",
        "ratio=cr40",
        "calibration.upstream=compressed",
    ]
    made = record(overrides=overrides)
    made.choices |= {"method": "adasvd", "method/whitening": "none", "method/packing": "factors"}
    whole = "method/whitening=none method.allocation.budget=raw calibration.upstream=compressed"
    assert " ".join(made.changes) == whole
    assert record().changes == []
    made.choices["method"] = "of_another"  # no row of ours: what was typed is all that is known
    assert made.changes[0] == "method/whitening=none"
    made.choices |= {"quantizer": "gptq_int4"}
    assert made.changes[0] == "quantizer=gptq_int4"


def test_models_and_methods_are_called_what_their_names_say():
    made = record()
    made.config |= {"model": {"name": "mine"}, "method": {"name": "ours"}}
    assert (flatten(made)["model"], flatten(made)["method"]) == ("mine", "ours")


def test_rows_are_sorted_by_model_compression_and_method(folder):
    rows = select([flatten(x) for x in RecordStore(folder).all()], {})
    assert [(row["model"], row["compression"], row["method"]) for row in rows] == [
        ("bert_like", 0.4, "svd"),
        ("llama", None, "asvd"),
        ("llama", 0.4, "svd"),
        ("llama", 0.6, "svd"),
        ("llama", 0.6, "svd_llm"),
    ]


def test_markdown(folder, capsys):
    code, out = run(capsys, folder, "--where", "model=llama", "compression=0.6")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 4
    assert [x.strip() for x in lines[0].strip("|").split("|")][:3] == [
        "model",
        "method",
        "compression",
    ]
    assert set(lines[1]) <= set("|-")
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert "31.00" in lines[2]
    assert "20.50" in lines[3]
    assert "0.2500" in lines[3]
    assert MISSING in lines[2], "svd has no accuracy"


def test_csv_reads_back(folder, capsys):
    code, out = run(
        capsys,
        folder,
        "--format",
        "csv",
        "--columns",
        "method",
        "compression",
        "wikitext2@1 ppl",
        "status",
    )
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 5
    assert {
        "method": "svd_llm",
        "compression": "60%",
        "wikitext2@1 ppl": "20.50",
        "status": "ok",
    } in rows
    assert {
        "method": "asvd",
        "compression": MISSING,
        "wikitext2@1 ppl": MISSING,
        "status": "failed",
    } in rows


def test_latex_escapes_and_has_rules(folder, capsys):
    code, out = run(
        capsys, folder, "--format", "latex", "--columns", "model", "method", "compression"
    )
    assert code == 0
    head = "\\begin{tabular}{llr}\n\\toprule\nmodel & method & compression \\\\\n\\midrule\n"
    assert head in out, "numbers stand under each other"
    assert "\\resizebox{\\ifdim\\width>\\linewidth" in out, "a wide table fits the page"
    assert out.endswith("\\bottomrule\n\\end{tabular}\n}\n")
    assert "llama & svd\\_llm & 60\\% \\\\" in out
    assert "svd_llm" not in out.replace("svd\\_llm", "")


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("a_b 5% & #1 {x} $", r"a\_b 5\% \& \#1 \{x\} \$"),
        ("x^2 ~ y < z > \\ |", r"x\textasciicircum{}2 \textasciitilde{} y \textless{} z"),
        ("**14.76**", r"\textbf{14.76}"),
        ("**1.5 ± 0.2 (3)**", r"\textbf{1.5 $\pm$ 0.2 (3)}"),
        ("40043808 *collapsed*", r"40043808 \emph{collapsed}"),
    ],
)
def test_latex_of_any_text(cell, says):
    assert says in render(["a"], [[cell]], "latex")


def test_a_failed_run_is_a_row_without_numbers(folder, capsys):
    _, out = run(capsys, folder, "--where", "status=failed")
    assert "asvd" in out
    assert "failed" in out
    assert "nan" not in out


def test_where_values_are_texts_and_filters_combine(folder, capsys):
    _, out = run(capsys, folder, "--where", "method=svd", "model=bert_like")
    assert len(out.splitlines()) == 3
    assert "9.00" in out


@pytest.mark.parametrize(
    ("where", "message"),
    [("rank=3", "no such column; there are model, method"), ("model", "expected COLUMN=VALUE")],
)
def test_where_errors_are_one_line_and_exit_1(folder, capsys, caplog, where, message):
    code, out = run(capsys, folder, "--where", where)
    assert code == 1
    assert out == ""
    assert message in caplog.text
    assert "\n" not in caplog.records[-1].getMessage()


def test_where_that_keeps_nothing_prints_an_empty_table(folder, capsys):
    code, out = run(capsys, folder, "--where", "method=never")
    assert code == 0
    assert len(out.splitlines()) == 2


def test_unknown_columns_are_refused(folder, capsys, caplog):
    code, out = run(capsys, folder, "--columns", "model", "pplx")
    assert code == 1
    assert out == ""
    assert "--columns pplx: no such column" in caplog.text


@pytest.mark.parametrize("exists", [True, False])
def test_no_records_is_said(tmp_path, capsys, caplog, exists):
    folder = tmp_path / "records"
    if exists:
        folder.mkdir()
    code, out = run(capsys, folder)
    assert code == 1
    assert out == ""
    assert "run `python run.py` first" in caplog.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"x ppl": 1234.5, "x collapsed": True}, "1.23e+03 (collapsed)"),
        ({"x ppl": math.inf}, "inf (collapsed)"),
        ({"x ppl": math.nan}, "nan (collapsed)"),
        ({"x ppl": 14.756, "x collapsed": False}, "14.76"),
        ({}, MISSING),
    ],
)
def test_a_collapsed_perplexity_is_labelled(row, expected):
    assert cell(row, "x ppl") == expected


def test_cells_have_the_digits_their_column_needs():
    row = {
        "compression": 0.4,
        "measured": 0.58754,
        "piqa@1 acc": 0.33333,
        "seconds": 3.14159,
        "method": "svd",
        "zero": 0.0,
    }
    assert [cell(row, x) for x in row] == ["40%", "0.5875", "0.3333", "3.14", "svd", "0.00"]


def test_the_variant_column_appears_only_when_there_is_one():
    plain = flatten(record())
    changed = flatten(record(overrides=["method.allocation.exact_budget=true"]))
    assert "variant" not in default_columns([plain])
    assert "variant" in default_columns([plain, changed])


def test_default_columns_hold_perplexity_and_accuracy_only():
    row = flatten(record(acc=0.5, acc_norm=0.6, tokens=10.0))
    assert [x for x in default_columns([row]) if x.startswith("wikitext2")] == [
        "wikitext2@1 ppl",
        "wikitext2@1 acc",
    ]
    assert "wikitext2@1 acc_norm" in columns_of([row])


def test_select_refuses_a_column_by_name():
    with pytest.raises(UserError, match="--where nonsense"):
        select([flatten(record())], {"nonsense": "1"})


def test_render_of_nothing_has_a_header():
    assert (
        listing([], ["model", "method"], "markdown") == "| model | method |\n|-------|--------|\n"
    )


def test_as_a_command(folder, tmp_path):
    done = typed(tmp_path, "table", str(folder), "--format", "csv", "--columns", "model")
    assert done.returncode == 0
    assert done.stdout.split() == ["model", "bert_like", "llama", "llama", "llama", "llama"]
    failed = typed(tmp_path, "table", str(folder / "no"))
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert typed(tmp_path, "tabel").stderr.startswith("specomp: no command tabel; did you mean ta")


def test_budgets_of_bits_and_of_kl_have_columns(folder):
    """Where any row has them; of numbers alone nothing changes."""
    plain = record()
    assert not {"bits", "target bits", "measured KL"} & {*flatten(plain)}
    found = record("specomp", 0.0)
    sizes = {"linear_bits": 300, "linear_params": 100}
    asked = {"target_kl": 0.1, "measured_kl": 0.09512, "target_bits": 4.0}
    found.ledger = made_ledger(
        target_retention=1.0,
        measured_retention=1.0,
        dense={"linear_bits": 3200, "linear_params": 100},
        compressed=sizes,
        **asked,
    )
    rows = [flatten(x) for x in (plain, found)]
    columns = default_columns(rows)
    assert [x for x in columns if "KL" in x or "bits" in x] == ["target KL", "measured KL", "bits"]
    assert [cell(rows[1], x) for x in ("bits", "measured KL")] == ["3.00", "0.0951"]
    assert cell(rows[0], "bits") == MISSING
    assert not {"bits", "target KL"} & {*default_columns([flatten(plain)])}
