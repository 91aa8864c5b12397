"""Folders and files that appear whole or not at all, with the permissions that the umask gives, and
one line about a disk that is full or cannot be written. Imports no torch: a run makes its folders
before it loads anything.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from specomp.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.EBUSY,
)
PREVIOUS = "old"
# of a temporary name: machine, process, whether it is new or what was there before
MADE = re.compile(r"([0-9a-f]{12})-(\d+)-(new|old)[0-9a-f]{12}\.tmp")
ABANDONED = 7 * 24 * 3600  # seconds after which another machine's unfinished work is left over


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError where that is not possible."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> bool:
    """A file, folder or link, whatever it is. Whether nothing is there any more."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def lock_file(path: Path) -> FileLock:
    """The lock between processes that a file stands for; reentrant within this one. Raises
    UserError where the file cannot be one.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path} is a folder where a lock belongs: rm -r '{path}'.")
    if path.is_symlink() and not path.exists():  # it leads nowhere
        remove(path)
    with disk_errors(path):
        path.touch()  # with the permissions of any other file, so that whoever shares it can lock
    return FileLock(path, is_singleton=True)


class disk_errors:  # noqa: N801 (a context manager used like a function)
    """Turns a full disk, or a place that cannot be written, into one actionable line about
    `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        full = isinstance(error, OSError) and error.errno in _FULL
        # safetensors reports I/O errors as text
        full = full or (isinstance(error, SafetensorError) and "No space left" in str(error))
        if full:
            existing = next(folder for folder in self.path.absolute().parents if folder.exists())
            free = shutil.disk_usage(existing).free / 2**20
            raise UserError(
                f"No space left while writing {self.path} ({free:.0f} MiB free): free some, or"
                " point paths.cache / paths.outputs elsewhere."
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"Cannot write {self.path}: {reason}; point paths.cache / paths.outputs elsewhere."
            ) from error


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """`with atomic_path(final) as temporary:` write to temporary; it becomes final only if the
    block succeeds. Raises UserError where final is a folder.
    """
    make_folder(final.parent)
    if final.is_dir():
        raise UserError(f"{final} is a folder where a file belongs: rm -r '{final}'.")
    remove_left(final)
    with disk_errors(final), _temporary(final) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers make files that only their owner can read
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, final)


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """The same for a folder, which takes the place of an earlier one."""
    make_folder(final.parent)
    remove_left(final)
    with (
        disk_errors(final),
        _temporary(final) as temporary,
        _temporary(final, PREVIOUS) as previous,
    ):
        temporary.mkdir()
        yield temporary
        _open_up(temporary)
        if os.path.lexists(final):
            os.replace(final, previous)
        os.replace(temporary, final)


def remove_left(final: Path) -> None:
    """What killed processes left of writing `final`; a folder that one of them had just moved away
    comes back. What a process that lives is writing stays; of other machines, and of containers,
    that is what is younger than a week.
    """
    for left in final.parent.glob(f".{glob.escape(_short(final))}.*.tmp"):
        if (made := MADE.fullmatch(left.name.removeprefix(f".{_short(final)}."))) is None:
            continue
        place, pid, kind = made.groups()
        with contextlib.suppress(OSError):
            if place == _place():
                living = left in _living if pid == str(os.getpid()) else _lives(pid)
            else:
                living = time.time() - left.stat().st_mtime < ABANDONED
            if not living and kind == PREVIOUS and not os.path.lexists(final):
                os.replace(left, final)
            elif not living:
                remove(left)


_living: set[Path] = set()  # temporary paths of this process


@contextlib.contextmanager
def _temporary(final: Path, kind: str = "new") -> Iterator[Path]:
    """A path beside `final` that no other process uses, on whatever machine; nothing is there
    afterwards.
    """
    name = f".{_short(final)}.{_place()}-{os.getpid()}-{kind}{uuid.uuid4().hex[:12]}.tmp"
    path = final.with_name(name)
    _living.add(path)
    try:
        yield path
    finally:
        remove(path)
        _living.discard(path)


def _short(final: Path) -> str:
    """Its name, as long as there is room for more in a temporary one."""
    name = final.name.encode()
    return final.name if len(name) < 180 else hashlib.sha256(name).hexdigest()


@cache
def _place() -> str:
    """Where a process id means something: this boot of this machine, or of this container."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError):  # not on macOS
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _open_up(folder: Path) -> None:
    """Give every file the permissions of a new one: some writers make files that only their owner
    can read.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
