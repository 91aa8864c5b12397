"""Temporary names, what killed processes leave, permissions, checksums of folders."""

import json
import os
import stat
import subprocess
import time

import pytest

from specomp import checksums, disk
from specomp.cache import Cache
from specomp.checksums import check, checking, reseal, seal
from specomp.disk import atomic_path, lock_file, remove_left, whole_folder
from specomp.errors import UserError

KEY = "ab" * 32


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_dead_process_left_is_removed_by_the_next(tmp_path, kind):
    final, here = tmp_path / "final", disk._place()
    end = f"new{'0' * 12}.tmp"
    names = {
        f".final.{here}-{dead_pid()}-{end}": True,
        f".final.{here}-{os.getppid()}-{end}": False,  # lives
        f".final.{'1' * 12}-{dead_pid()}-{end}": False,  # of another machine: not known
        f".final.{'2' * 12}-{dead_pid()}-{end}": True,  # of another machine, long ago
        f".final2.{here}-{dead_pid()}-{end}": False,  # of another file
        f".final.{here}-{os.getpid()}-{end}": True,  # another process had this number before
        ".final.mine.tmp": False,  # somebody's own
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
        age = 8 * 24 * 3600 if "2222" in name or "mine" in name else 0
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    if kind == "file":
        with atomic_path(final) as temporary:
            temporary.write_text("x")
    else:
        with whole_folder(final) as temporary:
            (temporary / "x").touch()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"final", *(name for name, gone in names.items() if not gone)}


def test_what_was_moved_away_by_a_process_that_died_comes_back(tmp_path):
    """Killed between the two renames: what was there before is still the last whole one."""
    final = tmp_path / "final"
    previous = tmp_path / f".final.{disk._place()}-{dead_pid()}-old{'0' * 12}.tmp"
    previous.mkdir()
    (previous / "weights").touch()
    with pytest.raises(KeyError), whole_folder(final):
        raise KeyError("the next one fails too")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (final / "weights").exists()


@pytest.mark.parametrize("name", ["n" * 240, "模型" * 40])
def test_long_names(tmp_path, name):
    with whole_folder(tmp_path / name) as temporary:
        (temporary / "x").touch()
    with atomic_path(tmp_path / name / "file") as temporary:
        temporary.touch()
    assert (tmp_path / name / "x").exists()
    with pytest.raises(UserError, match="file name too long"), whole_folder(tmp_path / ("n" * 300)):
        pass


def test_what_this_process_is_writing_stays(tmp_path):
    with atomic_path(tmp_path / "final") as outer:
        with atomic_path(tmp_path / "final") as inner:
            assert outer != inner
            inner.write_text("inner")
        outer.write_text("outer")
    assert (tmp_path / "final").read_text() == "outer"
    remove_left(tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_permissions_are_those_that_the_umask_gives(tmp_path, mask):
    """safetensors makes files that only their owner can read."""
    import torch

    before = os.umask(mask)
    try:
        cache = Cache(tmp_path / "cache")
        cache.save("spectra", KEY, "part", {"x": torch.ones(2)})
        cache.save_json("hashes/x.json", {"sha256": "y"})

        def build(folder):
            (folder / "file").touch(mode=0o600)
            (folder / "below").mkdir()
            (folder / "below" / "file").touch(mode=0o600)

        cache.folder("models", KEY, build)
        with cache.lock("spectra", KEY):
            pass
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").rglob("*")}
    assert len(modes) > 8
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_file_where_a_folder_is_wanted_and_the_other_way(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match="is a folder where a file belongs: rm -r"):
        atomic_path(tmp_path / "file").__enter__()
    with pytest.raises(UserError, match="is a folder where a lock belongs: rm -r"):
        lock_file(tmp_path / "file")
    (tmp_path / "folder").touch()
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "x").touch()
    assert (tmp_path / "folder" / "x").exists()
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    with whole_folder(tmp_path / "link") as temporary:
        (temporary / "x").touch()
    assert (tmp_path / "link" / "x").exists() and not (tmp_path / "link").is_symlink()


# ---- checksums


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    (folder / "below").mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(5000))
    (folder / "below" / "config.json").write_text('{"a": 1}')
    seal(folder)
    assert set(json.loads((folder / "checksums.json").read_text())) == {
        "weights",
        "below/config.json",
    }
    return folder


def test_every_flipped_bit_is_found_though_times_are_as_before(sealed):
    path = sealed / "weights"
    raw, times = path.read_bytes(), path.stat()
    for position in range(0, len(raw), 97):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(UserError, match="weights is not what it was when it was written"):
            check(sealed)
        path.write_bytes(raw)
        assert check(sealed)


def test_a_file_is_read_once_a_process(sealed, monkeypatch):
    read = []
    own = checksums.of_file
    monkeypatch.setattr(checksums, "of_file", lambda path: read.append(path.name) or own(path))
    for _ in range(3):
        assert check(sealed)
    assert sorted(read) == ["config.json", "weights"]


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '{"weights": 1}', "{}"])
def test_a_damaged_list_is_refused(sealed, damage):
    (sealed / "checksums.json").write_text(damage)
    with pytest.raises(UserError, match=r"checksums\.json is damaged"):
        check(sealed)


def test_absent_files_and_older_folders(sealed):
    (sealed / "below" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read \(no such file"):
        check(sealed)
    (sealed / "checksums.json").unlink()
    assert check(sealed) is False, "it has none"


def test_what_was_changed_on_purpose_is_sealed_again(sealed):
    (sealed / "below" / "config.json").write_text('{"a": 2}')
    reseal(sealed, ["below/config.json", "of another list"])
    assert check(sealed)


def test_damage_is_told_in_place_of_what_it_made_the_reader_say(sealed):
    with checking(sealed):
        pass
    (sealed / "weights").write_bytes(b"")
    with pytest.raises(UserError, match="not what it was"), checking(sealed):
        raise KeyError("something of transformers")
    with pytest.raises(UserError, match="not what it was"), checking(sealed):
        pass


# ---- a cache


@pytest.mark.parametrize("how", ["folder", "dangling link", "text", "null", "empty"])
def test_whatever_stands_in_the_place_of_an_entry_is_replaced(cache, how):
    import torch

    places = [
        cache.path("spectra", KEY, "part"),
        cache.root / "hashes" / "x.json",
        cache.root / "models" / KEY[:24],
    ]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        if how == "folder":
            path.mkdir()
        elif how == "dangling link":
            path.symlink_to("/nowhere/at/all")
        else:
            path.write_text({"text": "x", "null": "null", "empty": ""}[how])
    assert cache.load("spectra", KEY, "part") is None
    assert not cache.has("spectra", KEY, "part")
    assert cache.load_json("hashes/x.json") is None
    cache.save("spectra", KEY, "part", {"x": torch.ones(2)})
    cache.save_json("hashes/x.json", {"sha256": "y"})
    made = cache.folder("models", KEY, lambda folder: (folder / "x").touch())
    assert cache.load("spectra", KEY, "part")["x"].tolist() == [1, 1]
    assert cache.load_json("hashes/x.json") == {"sha256": "y"}
    assert made == places[2] and (made / "x").exists()


def test_no_flipped_bit_of_a_small_file_gives_another_content(cache):
    content = {"sha256": "ab" * 32, "n": 3}
    cache.save_json("hashes/x.json", content)
    path = cache.root / "hashes" / "x.json"
    raw = path.read_bytes()
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        assert cache.load_json("hashes/x.json") in (None, content), position


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_of_somebody_else_is_read_and_left_alone(tmp_path, monkeypatch):
    shared_cache_of_another(tmp_path, monkeypatch)


def test_a_cache_that_access_says_is_closed_is_read_and_left_alone(tmp_path, monkeypatch):
    """The same for root, whom nothing is closed to: `os.access` is asked, and here it says no."""
    root = tmp_path / "cache"

    def closed(path, mode):
        inside = str(path).startswith(str(root))
        return os.path.exists(path) and not (inside and mode & os.W_OK)

    monkeypatch.setattr("specomp.cache.os.access", closed)
    shared_cache_of_another(tmp_path, monkeypatch)


def shared_cache_of_another(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("specomp.cache.tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    theirs = tmp_path / "cache" / "spectra" / KEY[:24]
    with monkeypatch.context() as patch:
        patch.setattr("specomp.cache.os.access", lambda *_: True)
        Cache(tmp_path / "cache").save("spectra", KEY, "part", {"x": torch.ones(2)})
    for path in (theirs, theirs.parent, tmp_path / "cache"):
        path.chmod(0o555)
    before = (theirs / "part.safetensors").read_bytes()
    cache = Cache(tmp_path / "cache")
    assert cache.load("spectra", KEY, "part")["x"].tolist() == [1, 1]
    with cache.lock("spectra", KEY):
        cache.save("spectra", KEY, "more", {"x": torch.zeros(2)})
    cache.save("spectra", KEY, "part", {"x": torch.zeros(2)})
    again = Cache(tmp_path / "cache")
    assert again.load("spectra", KEY, "more")["x"].tolist() == [0, 0]
    assert again.load("spectra", KEY, "part")["x"].tolist() == [0, 0], "one's own comes first"
    assert (theirs / "part.safetensors").read_bytes() == before
    assert [path.name for path in theirs.iterdir()] == ["part.safetensors"]


def test_what_cannot_be_read_is_not_damaged_and_stays(cache, caplog):
    import torch

    cache.save("spectra", KEY, "part", {"x": torch.ones(2)})
    path = cache.path("spectra", KEY, "part")
    cache.drop(path, PermissionError(13, "Permission denied"))
    assert path.exists() and "cannot be read" in caplog.text and "damaged" not in caplog.text
    assert cache.load("spectra", KEY, "part") is None, "nor looked at again by this process"
