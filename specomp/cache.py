"""Content-addressed store on disk: tokens -> statistics -> spectra, shared by sweep jobs and
processes.

An entry is named by what made it (`digest` of a description), so it is never stale, only missing.
Files appear by atomic rename under a lock; each carries a checksum, and an entry that does not
match it is reported, dropped and made again. What others made and only they can write is read; what
is missing there is kept in a folder of one's own.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specomp import checksums
from specomp.disk import atomic_path, lock_file, make_folder, remove, whole_folder
from specomp.errors import UserError, one_line

log = logging.getLogger(__name__)

POLL = 2.0  # seconds
_claimed: list[FileLock] = []


def digest(description: Any) -> str:
    """sha256 (hex) of a JSON-able description, independent of key order."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 (hex) of tensors on the CPU: names and bytes."""
    state = xxhash.xxh3_64()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return state.hexdigest()


class Cache:
    """Entries live at root/<kind>/<key>[/<part>.safetensors]; those that this user cannot write
    there, in a folder of their own.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.hits: dict[str, int] = {}
        self.misses: dict[str, int] = {}
        self._counting = threading.Lock()
        self._useless: set[Path] = set()  # damaged, and not ours to remove

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the same folder; what it finds there is counted there."""
        return Cache, (self.root,)

    def lock(self, kind: str, key: str) -> FileLock:
        """The inter-process lock of an entry; reentrant within this process."""
        return lock_file(self.writable(f"locks/{kind}-{key[:24]}.lock"))

    def count(self, kind: str, *, hit: bool) -> None:
        """Remember a hit or miss, for the record and the log."""
        counts = self.hits if hit else self.misses
        with self._counting:
            counts[kind] = counts.get(kind, 0) + 1

    @contextlib.contextmanager
    def counted_as(self, hits: Mapping[str, int], misses: Mapping[str, int]) -> Iterator[None]:
        """While it is open nothing is counted; afterwards these are, of a process that did it."""
        counts = self.hits, self.misses
        self.hits, self.misses = {}, {}
        try:
            yield
        finally:
            self.hits, self.misses = counts
            for mine, theirs in zip(counts, (hits, misses), strict=True):
                for kind, count in theirs.items():
                    mine[kind] = mine.get(kind, 0) + count

    def path(self, kind: str, key: str, part: str) -> Path:
        """Where a part of an entry is, or where it would be written."""
        return self.place(f"{kind}/{key[:24]}/{part}.safetensors")

    def place(self, name: str) -> Path:
        """Where a file or folder below the root is that this user can read, or where it would be
        written.
        """
        found = self._readable(name)
        return self.writable(name) if found is None else found

    def save(self, kind: str, key: str, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part atomically. Raises UserError when the disk is full."""
        payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(self.writable(f"{kind}/{key[:24]}/{part}.safetensors")) as temporary:
            save_file(payload, temporary, metadata={"key": key, "checksum": checksum(payload)})

    def has(self, kind: str, key: str, part: str) -> bool:
        """Whether a part is there and whole, by its header alone: finds truncation, not flipped
        bits, which `load` does.
        """
        path = self.path(kind, key, part)
        if not os.path.lexists(path):
            return False
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                return (file.metadata() or {}).get("key") == key
        except (SafetensorError, OSError) as error:
            self.drop(path, error)
            return False

    def load(self, kind: str, key: str, part: str) -> dict[str, Tensor] | None:
        """One part, or None when it is absent or damaged (which is logged, and the file
        removed).
        """
        path = self.path(kind, key, part)
        if not os.path.lexists(path):
            return None
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata.get("key") != key or metadata.get("checksum") != checksum(tensors):
                raise ValueError("checksum mismatch")
        except (SafetensorError, OSError, ValueError) as error:
            self.drop(path, error)
            return None
        return tensors

    def save_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a small file below the root atomically, with its checksum in it."""
        whole = {**content, "checksum": checksums.of_content(content)}
        with atomic_path(self.writable(name)) as temporary:
            temporary.write_text(json.dumps(whole), encoding="utf-8")

    def load_json(self, name: str, *, older: bool = False) -> dict[str, Any] | None:
        """What `save_json` wrote, or None when it is absent or damaged, as `load`. older: may also
        be from before these files had checksums.
        """
        path = self.place(name)
        if not os.path.lexists(path):
            return None
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
            known = content.pop("checksum", None)
            if known != checksums.of_content(content) and not (older and known is None):
                raise ValueError("checksum mismatch")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self.drop(path, error)
            return None
        return content

    def folder(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """A folder made once by `build(temporary_folder)`; readers only ever see it complete, and
        as it was made.
        """
        name = f"{kind}/{key[:24]}"
        if self._is_whole(final := self.place(name)):
            self.count(kind, hit=True)
            return final
        with self.lock(kind, key):
            if not self._is_whole(final := self.place(name)):
                self.count(kind, hit=False)
                final = self.writable(name)
                with whole_folder(final) as temporary:
                    build(temporary)
                    checksums.seal(temporary)
        return final

    def _is_whole(self, folder: Path) -> bool:
        if not os.path.lexists(folder):
            return False
        try:
            if checksums.check(folder):
                return True
            raise UserError(f"no {checksums.LIST}")
        except UserError as error:
            self.drop(folder, error)
            return False

    def drop(self, path: Path, why: BaseException) -> None:
        """Remove an entry that is damaged, so that it is made again. One that this user may not
        read or remove stays, and is not looked at any more.
        """
        closed = any(isinstance(x, PermissionError) for x in (why, why.__cause__))
        state, place = ("cannot be read", " elsewhere") if closed else ("is damaged", "")
        log.warning("Cache entry %s %s (%s): making it again%s.", path, state, one_line(why), place)
        if closed or not remove(path):  # what cannot be read may be whole
            self._useless.add(path)

    def _readable(self, name: str) -> Path | None:
        for path in (self._spare / name, self.root / name):
            # a link that leads nowhere is there, and in the way
            broken = os.path.islink(path) and not os.path.exists(path)
            if path not in self._useless and (broken or os.access(path, os.R_OK)):
                return path
        return None

    def writable(self, name: str) -> Path:
        """Where this user can write an entry: in the root, unless somebody else shut it."""
        path = self.root / name
        nearest = next(x for x in path.parents if os.path.isdir(x) or x == x.parent)
        locked = os.path.isfile(path) and not os.access(path, os.W_OK)
        open_to_us = os.access(nearest, os.W_OK | os.X_OK) and not locked
        useless = path in self._useless
        if self.root not in (nearest, *nearest.parents) or (open_to_us and not useless):
            return path
        _say_spare(self.root, self._spare)
        return self._spare / name

    @functools.cached_property
    def _spare(self) -> Path:
        """For what cannot be written to the root."""
        return own_temporary() / f"cache-{digest(str(self.root))[:12]}"


@functools.cache
def _say_spare(root: Path, spare: Path) -> None:
    log.warning(
        "The cache %s is not this user's to write: what it has is read, what is new goes to %s"
        " (paths.cache=FOLDER chooses another place).",
        root,
        spare,
    )


def waiting(lock: FileLock, what: str) -> AcquireReturnProxy:
    """Acquire a lock (use as `with waiting(...)`), saying so when another process holds it: waiting
    can take hours.
    """

    def say() -> bool:
        log.info("Waiting: another process %s.", what)
        return False

    return meanwhile(lock, say)


def meanwhile(lock: FileLock, work: Callable[[], bool]) -> AcquireReturnProxy:
    """Acquire a lock (use as `with meanwhile(...)`); while another process holds it do `work`,
    until that says that there is no more.
    """
    while True:
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            if not work():
                return lock.acquire()


@contextlib.contextmanager
def if_free(lock: FileLock) -> Iterator[bool]:
    """Holds a lock inside if nobody else does; whether that is so."""
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    with held:
        yield True


def own_temporary() -> Path:
    """A folder of this user for what outlives a process but not the machine. Raises UserError where
    somebody else took its name.
    """
    folder = Path(tempfile.gettempdir()) / f"specomp-{os.getuid()}"
    if os.path.lexists(folder) and folder.lstat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own.")
    return folder


@functools.cache
def claim(what: str, count: int) -> int:
    """Index of the first of `count` things (GPUs) that no other process of this machine and user
    holds; this one keeps it until it ends.

    Jobs of a sweep that run side by side so take one each, however they were started. Waits, saying
    so, when all are taken.
    """
    folder = own_temporary()
    make_folder(folder)
    told = False
    while True:
        for index in range(count):
            lock = FileLock(folder / f"{what}{index}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                _claimed.append(lock)  # a lock that is collected is released
                return index
        if not told:
            log.info("Waiting: other processes hold all %d of %s.", count, what)
        told = True
        time.sleep(POLL)
