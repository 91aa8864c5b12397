"""Records: a round trip, damage, schema, what a key depends on, timings."""

import csv
import json
import logging
import math
import time

import pytest
from ledgers import HALF, SIZE, made_ledger

from specomp import checksums
from specomp.errors import UserError
from specomp.experiment.record import (
    SCHEMA,
    Record,
    RecordStore,
    companions,
    peak_memory,
    provenance,
    read_record,
    record_key,
)

KEY = record_key({"model": "m", "method": "svd"})


def full_record(**changes) -> Record:
    fields = {
        "key": KEY,
        "status": "ok",
        "choices": {"model": "tiny_llama", "method": "svd", "ratio": "cr40"},
        "identity": {"model": {"source": "random"}, "compression": 0.4},
        "config": {"overrides": ["method=svd"]},
        "calibration": {"hash": "h"},
        "ledger": made_ledger(measured_retention=0.5875, norm_error=1 / 3),
        "metrics": {"wikitext2@1": {"ppl": 14.75, "tokens": 100.0}, "piqa@1": {"acc": 1 / 3}},
        "dense_metrics": {"wikitext2@1": {"ppl": 7.0}},
        "seconds": {"compress": 1.5},
        "notes": ["ranks are whole, größer"],
        "model_folder": "models/x",
    }
    return Record(**(fields | changes))


@pytest.fixture
def store(tmp_path) -> RecordStore:
    return RecordStore(tmp_path / "records")


def test_round_trip_keeps_everything_to_the_last_bit(store):
    record = full_record()
    store.save(record)
    assert store.load(KEY) == record
    assert store.all() == [record]
    assert store.path(KEY).name == f"{KEY[:12]}.json"


def test_a_ledger_is_stored_as_names_and_numbers(store):
    """What is unknown is left out; a record without one has none, and says so where one is
    needed.
    """
    store.save(full_record())
    content = json.loads(store.path(KEY).read_text())["ledger"]
    assert content["dense"] == SIZE | {"linear_bits": 0}
    assert content["norm_error"] == 1 / 3
    assert not {"target_bits", "compensation_gain"} & set(content)
    store.save(full_record(ledger=None))
    assert json.loads(store.path(KEY).read_text())["ledger"] == {}
    assert store.load(KEY) == full_record(ledger=None)
    with pytest.raises(AssertionError, match=f"{KEY[:12]} has no ledger"):
        _ = store.load(KEY).counted


def test_a_ledger_of_the_first_records_is_read(store):
    """They did not tell what was held in memory from what a folder stores, nor count bits."""
    store.save(full_record())
    content = json.loads(store.path(KEY).read_text())
    del content["checksum"]
    for size in ("dense", "compressed"):
        del content["ledger"][size]["held_bytes"], content["ledger"][size]["linear_bits"]
    store.path(KEY).write_text(json.dumps(content))
    found = store.load(KEY).counted
    assert found.compressed.held_bytes == HALF["model_bytes"]
    assert found == made_ledger(measured_retention=0.5875, norm_error=1 / 3)


def test_a_perplexity_that_overflowed_survives_the_round_trip(store):
    store.save(full_record(metrics={"wikitext2@1": {"ppl": math.inf}}))
    assert store.load(KEY).metrics["wikitext2@1"]["ppl"] == math.inf


def test_saving_the_same_again_leaves_the_file_alone(store):
    record = full_record()
    store.save(record)
    before = store.path(KEY).stat()
    time.sleep(0.01)
    store.save(record)
    assert store.path(KEY).stat().st_mtime_ns == before.st_mtime_ns
    assert store.path(KEY).stat().st_ino == before.st_ino
    record.metrics["new@1"] = {"ppl": 1.0}
    store.save(record)
    assert store.path(KEY).stat().st_mtime_ns > before.st_mtime_ns
    assert store.load(KEY).metrics["new@1"] == {"ppl": 1.0}


def test_no_temporary_file_stays(store):
    store.save(full_record())
    store.save(full_record(status="failed", error="x"))
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY[:12]}.json"]


def test_absent_is_none(store):
    assert store.load(KEY) is None
    assert store.all() == []


@pytest.mark.parametrize(
    "content",
    ["", '{"schema": 1, "key": "abc', "[]", "null", '{"schema": 1}', '{"key": "x"}', "\x00\x01"],
)
def test_a_damaged_record_is_reported_and_made_again(store, caplog, content):
    store.save(full_record())
    store.path(KEY).write_text(content)
    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None
    assert "not a readable record" in caplog.text
    assert "made again" in caplog.text
    with pytest.raises(UserError, match="not a readable record"):
        read_record(store.path(KEY))


def test_a_damaged_record_does_not_hide_the_others(store, caplog):
    store.save(full_record())
    (store.folder / "broken.json").write_text("{")
    assert [record.key for record in store.all()] == [KEY]
    assert "broken.json" in caplog.text
    assert "Skipped" in caplog.text


def test_another_schema_is_not_read(store, caplog):
    store.save(full_record())
    content = json.loads(store.path(KEY).read_text())
    assert content["schema"] == SCHEMA
    store.path(KEY).write_text(json.dumps(content | {"schema": SCHEMA + 1}))
    assert store.load(KEY) is None
    assert f"schema {SCHEMA + 1}, expected {SCHEMA}" in caplog.text


def test_fields_of_a_later_minor_version_are_ignored(store):
    store.save(full_record())
    content = json.loads(store.path(KEY).read_text()) | {"invented": 1}
    del content["checksum"]
    content["checksum"] = checksums.of_content(content)
    store.path(KEY).write_text(json.dumps(content))
    assert store.load(KEY) == full_record()


def test_a_file_of_another_key_is_not_taken_for_this_one(store):
    """Twelve characters name the file; the whole key decides."""
    other = KEY[:12] + "0" * (len(KEY) - 12)
    store.save(full_record(key=other))
    assert store.load(other) is not None
    assert store.load(KEY) is None


def test_records_come_oldest_first(store):
    for index in range(3):
        store.save(full_record(key=record_key({"index": index})))
        time.sleep(0.01)
    assert [record.key for record in store.all()] == [
        record_key({"index": index}) for index in range(3)
    ]


def test_key_depends_on_content_only():
    assert record_key({"a": 1, "b": {"c": 2, "d": 3}}) == record_key(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert record_key({"a": 1}) != record_key({"a": 2})
    assert len(record_key({})) == 64


def test_one_line_per_linear(store):
    reports = [{"name": "q", "rank": 3, "dense": False}, {"name": "k", "rank": 32, "dense": True}]
    store.save_linears(KEY, reports)
    with (store.folder / f"{KEY[:12]}.linears.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"name": "q", "rank": "3", "dense": "False"},
            {"name": "k", "rank": "32", "dense": "True"},
        ]


def test_no_linears_no_file(store):
    store.save_linears(KEY, [])
    assert not store.folder.exists()


def test_stage_times_add_up_and_survive_errors():
    record = full_record(seconds={})
    with record.stage("evaluate"):
        time.sleep(0.02)
    first = record.seconds["evaluate"]
    with pytest.raises(ValueError, match="boom"), record.stage("evaluate"):
        time.sleep(0.02)
        raise ValueError("boom")
    assert 0.02 <= first < record.seconds["evaluate"] < 5
    assert record.peak_memory_mib["evaluate"] > 50


def test_a_note_is_kept_once_and_logged(caplog):
    record = full_record(notes=[])
    record.note("three ranks cut")
    record.note("three ranks cut")
    assert record.notes == ["three ranks cut"]
    assert "three ranks cut" in caplog.text


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory() < 2**40


@pytest.mark.parametrize("allocated", [0, 3 * 2**40])
def test_peak_memory_beside_a_gpu_is_that_of_where_the_run_was(monkeypatch, allocated):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: allocated)
    assert peak_memory() == allocated if allocated else 50 * 2**20 < peak_memory() < 2**40


def test_provenance_names_what_could_change_the_numbers(monkeypatch):
    found = provenance()
    assert {"time", "git", "git_dirty", "python", "packages", "machine", "threads", "cpus"} <= set(
        found
    )
    assert all(found["packages"][name] for name in ("torch", "transformers", "lightning"))
    json.dumps(found)
    monkeypatch.setenv("PATH", "")  # no git
    assert provenance()["git"] is None


def test_two_processes_cannot_work_on_one_record(store):
    with store.lock(KEY):
        assert store.lock(KEY).is_locked
        with store.lock(record_key({"other": 1})):
            pass
    assert not store.lock(KEY).is_locked


def test_no_flipped_bit_of_a_record_gives_another_one(store):
    store.save(full_record())
    path = store.path(KEY)
    raw = path.read_bytes()
    for position in range(0, len(raw), 3):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        assert store.load(KEY) in (None, full_record()), position


@pytest.mark.parametrize("how", ["null", "[]", "{}", "", "\xff", "[" * 100_000, "folder", "link"])
def test_what_is_no_record_is_left_out_and_made_again(store, how, caplog):
    store.save(full_record())
    other = store.path("0" * 64)
    if how == "folder":
        other.mkdir()
    elif how == "link":
        other.symlink_to("/nowhere/at/all")
    else:
        other.write_text(how, encoding="latin-1")
    assert store.all() == [full_record()]
    assert f"{other} is not a readable record" in caplog.text and "Skipped" in caplog.text
    if how == "folder":  # before any work is done that could not be kept
        with pytest.raises(UserError, match="is a folder where a record belongs: rm -r"):
            store.load("0" * 64)
    else:
        assert store.load("0" * 64) is None


def test_files_beside_a_record_are_what_was_written(store, caplog):
    record = full_record()
    store.save_linears(KEY, [{"name": "x", "rank": 3}])
    store.seal(record)
    store.save(record)
    [found] = companions([store], record, "linears.csv")
    found.write_text(found.read_text().replace("3", "4"))
    assert companions([store], record, "linears.csv") == []
    assert "is not what was written" in caplog.text
    record.files = {}  # as of records from before
    assert companions([store], record, "linears.csv") == [found]


def test_older_records_are_said_to_have_no_checksum(store, caplog):
    store.save(full_record())
    with caplog.at_level(logging.INFO):
        store.all()
    assert not caplog.text
    content = json.loads(store.path(KEY).read_text())
    del content["checksum"]
    store.path(KEY).write_text(json.dumps(content))
    with caplog.at_level(logging.INFO):
        assert store.all() == [full_record()]
    assert "1 of 1 records are from before they had checksums" in caplog.text
