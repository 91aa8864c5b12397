"""The store on disk: what is written is what is read, damage is noticed, an entry is made once, a
full disk is one line.
"""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import specomp.cache
from specomp import disk
from specomp.cache import Cache, digest
from specomp.disk import atomic_path, disk_errors
from specomp.errors import UserError
from specomp.models.load import torch_device

KEY = "ab" * 32
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def payload() -> dict[str, torch.Tensor]:
    return {"gram": torch.arange(12.0).view(3, 4), "count": torch.tensor(7)}


def files(root: Path) -> list[str]:
    """Everything on disk but the locks, hidden files included."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and "locks" not in path.parts
    )


@pytest.fixture
def entry(cache) -> Path:
    """A saved entry's file."""
    cache.save("spectra", KEY, "part", payload())
    return cache.path("spectra", KEY, "part")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_is_loaded(cache, dtype):
    saved = {
        "a": torch.arange(6).view(2, 3).to(dtype),
        "view": torch.arange(8).to(dtype)[::2],
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    cache.save("kind", KEY, "x", saved)
    loaded = cache.load("kind", KEY, "x")
    assert loaded is not None and loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_only_the_entry_is_left_on_disk(cache, entry):
    assert files(cache.root) == [str(entry.relative_to(cache.root))]


def test_absent_entries_load_as_none(cache, entry):
    assert cache.load("spectra", KEY, "other") is None
    assert cache.load("other", KEY, "part") is None
    assert cache.load("spectra", "cd" * 32, "part") is None
    assert cache.load("spectra", KEY, "part") is not None


def test_saving_again_replaces(cache, entry):
    cache.save("spectra", KEY, "part", {"gram": torch.ones(2)})
    assert cache.load("spectra", KEY, "part")["gram"].tolist() == [1, 1]


def damaged(raw: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "truncated":
        return raw[:-5]
    if how == "header only":
        return raw[:4]
    if how == "text":
        return b"not a tensor file, but long enough to be read as a header"
    return raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]


@pytest.mark.parametrize("how", ["empty", "truncated", "header only", "text", "flipped bit"])
def test_damage_is_logged_dropped_and_computed_again(cache, entry, how, caplog):
    entry.write_bytes(damaged(entry.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        assert cache.load("spectra", KEY, "part") is None
    assert not entry.exists()
    assert len(caplog.records) == 1
    assert f"Cache entry {entry} is damaged" in caplog.text
    cache.save("spectra", KEY, "part", payload())
    assert torch.equal(cache.load("spectra", KEY, "part")["gram"], payload()["gram"])


def test_no_flipped_bit_goes_unnoticed(cache, entry):
    raw = entry.read_bytes()
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        entry.write_bytes(flipped)
        assert cache.load("spectra", KEY, "part") is None, position


def test_an_entry_under_a_wrong_key_is_dropped(cache, entry, caplog):
    other = KEY[:24] + "0" * 40  # the same folder, another content
    assert cache.load("spectra", other, "part") is None
    assert "checksum mismatch" in caplog.text
    assert not entry.exists()


def test_a_failed_write_leaves_the_old_entry_and_no_temporary_file(cache, entry, monkeypatch):
    def crash(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise RuntimeError("crash")

    monkeypatch.setattr(specomp.cache, "save_file", crash)
    with pytest.raises(RuntimeError, match="crash"):
        cache.save("spectra", KEY, "part", {"gram": torch.zeros(2)})
    assert files(cache.root) == [str(entry.relative_to(cache.root))]
    assert torch.equal(cache.load("spectra", KEY, "part")["gram"], payload()["gram"])


def test_atomic_path_shows_nothing_before_the_block_ends(tmp_path):
    final = tmp_path / "deep" / "record.json"
    with atomic_path(final) as temporary:
        temporary.write_text("{}")
        assert not final.exists()
        assert temporary.parent == final.parent  # a rename within one file system
    assert final.read_text() == "{}"
    with pytest.raises(KeyError), atomic_path(final) as temporary:
        temporary.write_text("half")
        raise KeyError("x")
    assert final.read_text() == "{}"
    assert files(tmp_path) == ["deep/record.json"]


# Disk errors.


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
]
FULL += [
    safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
]
BLOCKED = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
]


def raising(error: Exception):
    def raise_it(*args, **options):
        raise error

    return raise_it


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_while_writing_is_one_line(cache, monkeypatch, error):
    monkeypatch.setattr(specomp.cache, "save_file", raising(error))
    with pytest.raises(
        UserError,
        match=r"No space left while writing .*part\.safetensors \(\d+ MiB free\).*paths\.cache",
    ) as caught:
        cache.save("spectra", KEY, "part", payload())
    one_line(caught)
    assert files(cache.root) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [(FULL[0], "No space left while writing"), (BLOCKED[0], "permission denied")],
)
def test_errors_of_the_last_rename_are_one_line_too(cache, monkeypatch, error, message):
    monkeypatch.setattr(os, "replace", raising(error))
    with pytest.raises(UserError, match=message) as caught:
        cache.save("spectra", KEY, "part", payload())
    one_line(caught)
    assert files(cache.root) == []
    with pytest.raises(UserError, match=message) as caught:
        cache.folder("tokens", KEY, lambda folder: None)
    one_line(caught)
    assert files(cache.root) == []
    assert list((cache.root / "tokens").iterdir()) == []


@pytest.mark.parametrize("error", BLOCKED, ids=str)
def test_a_folder_that_cannot_be_written_is_one_line(cache, monkeypatch, error):
    monkeypatch.setattr(Path, "mkdir", raising(error))
    for write in (
        lambda: cache.save("spectra", KEY, "part", payload()),
        lambda: cache.folder("tokens", KEY, lambda folder: None),
    ):
        with pytest.raises(
            UserError,
            match=r"Cannot write .*: (permission denied|read-only file system); point paths\.cache",
        ) as caught:
            write()
        one_line(caught)
    monkeypatch.undo()
    monkeypatch.setattr(disk.os, "replace", raising(error))
    with pytest.raises(UserError, match="Cannot write"):
        cache.folder("tokens", KEY, lambda folder: None)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_cache_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write") as caught:
        Cache(tmp_path / "file" / below).save("spectra", KEY, "part", payload())
    one_line(caught)


def test_a_full_disk_is_reported_where_no_folder_exists_yet(tmp_path):
    with pytest.raises(UserError, match="No space left"), disk_errors(tmp_path / "a" / "b" / "c"):
        raise FULL[0]


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), ValueError("other"), KeyboardInterrupt()], ids=repr
)
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path / "x"):
        raise error
    assert caught.value is error


# Folders and locks.


def test_a_folder_is_built_once(cache):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "ids.bin").write_bytes(b"12")

    first, second = cache.folder("tokens", KEY, build), cache.folder("tokens", KEY, build)
    assert first == second
    assert len(built) == 1
    assert (first / "ids.bin").read_bytes() == b"12"
    assert (cache.misses, cache.hits) == ({"tokens": 1}, {"tokens": 1})


def test_a_failed_build_leaves_nothing_and_can_be_repeated(cache):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        cache.folder("tokens", KEY, fail)
    assert list((cache.root / "tokens").iterdir()) == []
    assert (
        cache.folder("tokens", KEY, lambda folder: (folder / "whole").touch()) / "whole"
    ).exists()


def test_a_full_disk_while_building_is_one_line(cache):
    with pytest.raises(UserError, match="No space left while writing .*tokens"):
        cache.folder("tokens", KEY, raising(FULL[0]))
    assert list((cache.root / "tokens").iterdir()) == []


def test_two_threads_build_a_folder_once(cache):
    built, seen, start = [], [], threading.Barrier(2)

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "first").touch()
        time.sleep(0.2)
        (folder / "second").touch()

    def work() -> None:
        start.wait()
        seen.append(sorted(path.name for path in cache.folder("tokens", KEY, build).iterdir()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(built) == 1
    assert seen == [["checksums.json", "first", "second"]] * 2


def test_a_lock_keeps_other_processes_out(cache):
    code = (
        "import sys, filelock\ntry:\n    filelock.FileLock(sys.argv[1]).acquire(timeout=0)\nexcept"
        " filelock.Timeout:\n    sys.exit(3)\n"
    )
    with cache.lock("spectra", KEY) as lock, cache.lock("spectra", KEY):  # reentrant
        assert (
            subprocess.run([sys.executable, "-c", code, lock.lock_file], check=False).returncode
            == 3
        )
    assert subprocess.run([sys.executable, "-c", code, lock.lock_file], check=False).returncode == 0


# Keys.


def test_digest_ignores_the_order_of_keys_and_nothing_else():
    one = {"model": {"name": "a", "seed": 0}, "ranks": [1, 2]}
    assert digest(one) == digest({"ranks": [1, 2], "model": {"seed": 0, "name": "a"}})
    changed = [
        {"model": {"name": "a", "seed": 1}, "ranks": [1, 2]},
        {"model": {"name": "a", "seed": 0}, "ranks": [2, 1]},
        {},
        None,
    ]
    assert len({digest(x) for x in [one, *changed]}) == 5
    assert len(digest(one)) == 64


def test_digest_is_the_same_in_every_version():
    # sha256 of the text {"a":[true,null,0.5],"b":1}; a change here drops every cache there is.
    assert (
        digest({"b": 1, "a": [True, None, 0.5]})
        == "f93af7f23190b68f99e01d8388a571618e37d267046225998e3ab19a35905cf9"
    )


CLAIM = """
import sys, time
from specomp.cache import claim
print(claim("tried", 2), claim("tried", 2), flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_every_process_claims_one_of_its_own(tmp_path):
    """Two of two go to two processes, each for as long as it lives; a third waits for the first
    that ends.
    """
    environment = os.environ | {"TMPDIR": str(tmp_path)}

    def start(seconds: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(seconds)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def claimed(process: subprocess.Popen[str]) -> str:
        return process.stdout.readline().split()

    first = start(60)
    assert claimed(first) == ["0", "0"], "asked twice, the same one"
    second = start(0)
    assert claimed(second) == ["1", "1"]
    second.communicate(timeout=30)
    third = start(60)
    assert claimed(third) == ["1", "1"], "free again"
    fourth = start(0)
    first.kill()
    assert claimed(fourth) == ["0", "0"]
    third.kill()
    for process in (first, third, fourth):
        process.communicate(timeout=30)


def test_of_several_gpus_auto_is_one_that_is_free(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(
        "specomp.models.load.claim", lambda what, count: {("gpu", 4): 2}[what, count]
    )
    assert torch_device("auto", None) == torch.device("cuda", 2)
    assert torch_device("auto", "auto") == torch.device("cuda"), "spread over all of them"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert torch_device("auto", None) == torch.device("cuda")
