"""What the terminal shows at the end of a run."""

import io
import math

import pytest
from ledgers import made_ledger
from rich.console import Console

from specomp.evaluation.metric import is_detail
from specomp.experiment.record import Record
from specomp.experiment.summary import in_domain, label, rows, show


def record(**changes) -> Record:
    fields = {
        "key": "abcdef0123456789",
        "choices": {"model": "tiny_llama", "method": "svd"},
        "ledger": made_ledger(),
        "metrics": {"wikitext2@1": {"ppl": 14.756, "nll": 2.69, "tokens": 2048.0}},
        "dense_metrics": {"wikitext2@1": {"ppl": 7.378}},
        "seconds": {"load": 0.1, "compress": 12.4},
        "peak_memory_mib": {"load": 100.0, "compress": 512.3},
    }
    return Record(**(fields | changes))


def text(shown_record: Record, width: int = 160) -> str:
    out = io.StringIO()
    show(shown_record, console=Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def by_label(shown_record: Record) -> dict[str, tuple[str, str, str]]:
    return {row[0]: row[1:] for row in rows(shown_record)}


def test_dense_stands_beside_compressed():
    found = by_label(record())
    assert found["parameters of the 21 compressible linears"] == ("1,000", "588", "0.588")
    assert found["bytes in memory"] == ("8,000", "6,352", "0.794")
    assert found["retention of the linears (target)"] == ("(0.6000)", "0.5880", "-2.00%")
    assert found["wikitext2@1 perplexity (2,048 tokens)"] == ("7.38", "14.76", "2.000")


def test_the_console_shows_table_time_notes_and_folder():
    out = text(
        record(
            notes=["ranks [rounded] down"],
            model_folder="outputs/models/tiny_llama-svd-abcdef012345",
        )
    )
    assert "tiny_llama, svd, compression 40%" in out
    assert "14.76" in out
    assert "time: load 0.1 s, compress 12.4 s; peak memory 512 MiB" in out
    assert "load 0 s" not in out
    assert "note: ranks [rounded] down" in out, "brackets are text, not markup"
    assert "model folder: outputs/models/tiny_llama-svd-abcdef012345" in out
    assert "record: abcdef012345" in out


def test_collapse_is_said():
    found = by_label(
        record(metrics={"wikitext2@1": {"ppl": 60000.0, "tokens": 100.0, "collapsed": 1.0}})
    )
    assert "wikitext2@1 perplexity (100 tokens, collapsed)" in found
    assert label("ppl", {"tokens": 10, "collapsed": 0.0}) == "perplexity (10 tokens)"
    assert "collapsed" in text(record(metrics={"w@1": {"ppl": 60000.0, "collapsed": 1.0}}))


@pytest.mark.parametrize(
    "dense",
    [{}, {"wikitext2@1": {}}, {"wikitext2@1": {"ppl": math.inf}}, {"wikitext2@1": {"ppl": 0.0}}],
)
def test_without_a_usable_reference_there_is_no_quotient(dense):
    row = by_label(record(dense_metrics=dense))["wikitext2@1 perplexity (2,048 tokens)"]
    assert row[1:] == ("14.76", "--")
    assert text(record(dense_metrics=dense))


def test_an_infinite_perplexity_is_shown_as_such():
    row = by_label(record(metrics={"wikitext2@1": {"ppl": math.inf, "tokens": 5.0}}))[
        "wikitext2@1 perplexity (5 tokens)"
    ]
    assert row == ("7.38", "inf", "inf")


def test_accuracy_has_more_digits_than_perplexity():
    found = by_label(
        record(
            metrics={"piqa@1": {"acc": 0.61234, "acc_stderr": 0.01}},
            dense_metrics={"piqa@1": {"acc": 0.7}},
        )
    )
    assert found["piqa@1 acc"] == ("0.7000", "0.6123", "0.875")
    assert "piqa@1 acc_stderr" not in found


def test_the_record_holds_more_than_the_terminal():
    assert [
        x
        for x in (
            "ppl",
            "nll",
            "tokens",
            "acc",
            "acc_norm",
            "decode_tokens_per_s_b1",
            "nonfinite_windows",
        )
        if not is_detail(x)
    ] == [
        "ppl",
        "acc",
        "acc_norm",
        "decode_tokens_per_s_b1",
        "nonfinite_windows",
    ]


def test_a_run_without_benchmarks_shows_the_sizes():
    out = text(record(metrics={}, seconds={}, peak_memory_mib={}))
    assert "bytes in memory" in out
    assert "peak memory 0 MiB" in out


def test_text_of_the_calibrations_own_kind_is_called_so():
    out = text(record(calibration={"source": {"name": "wikitext2"}}))
    assert "wikitext2 is of the kind of text that this model was calibrated on" in out
    assert "benchmark=domains" in out
    mixed = {"code": {"source": {"name": "code"}}, "none": {"source": None}}
    assert in_domain(record(calibration={"source": {"name": "mixture", "parts": mixed}})) is None
    pydocs = record(calibration={"source": {"name": "pydocs"}}, metrics={"pydocs@1": {"ppl": 3.0}})
    assert "benchmark=wikitext2" in str(in_domain(pydocs))


def test_a_metric_of_ones_own_is_shown_and_details_are_not():
    metrics = {"mine@1": {"surprise": 0.25, "surprise_stderr": 0.1, "n": 12.0, "nll": 2.0}}
    assert [x for x in by_label(record(metrics=metrics)) if "mine" in x] == ["mine@1 surprise"]


def test_the_very_text_of_the_calibration_is_called_so():
    source = {"name": "wikitext2", "split": "test"}
    for split, said in (("test", "is the very text"), ("validation", "is of the kind of text")):
        parts = {"wikitext2": {"corpus": {"name": "wikitext2", "split": split}}, "own": {}}
        found = record(calibration={"source": source}, config={"benchmark": {"parts": parts}})
        assert said in str(in_domain(found))
