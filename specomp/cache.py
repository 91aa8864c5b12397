"""Content-addressed store on disk: tokens -> statistics -> spectra, shared by sweep jobs and
processes.

An entry is named by what made it (`digest` of a description), so it is never stale, only missing.
Files appear by atomic rename under a lock; each carries a checksum, and an entry that does not
match it is reported, dropped and made again.
"""

import contextlib
import functools
import getpass
import hashlib
import json
import logging
import os
import shutil
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

from specomp.disk import atomic_path, disk_errors, make_folder

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
    """Entries live at root/<kind>/<key>[/<part>.safetensors]."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.hits: dict[str, int] = {}
        self.misses: dict[str, int] = {}
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the same folder; what it finds there is counted there."""
        return Cache, (self.root,)

    def lock(self, kind: str, key: str) -> FileLock:
        """The inter-process lock of an entry; reentrant within this process."""
        folder = self.root / "locks"
        make_folder(folder)
        return FileLock(folder / f"{kind}-{key[:24]}.lock", is_singleton=True)

    def count(self, kind: str, *, hit: bool) -> None:
        """Remember a hit or miss, for the record and the log."""
        counts = self.hits if hit else self.misses
        with self._counting:
            counts[kind] = counts.get(kind, 0) + 1

    def path(self, kind: str, key: str, part: str) -> Path:
        """Where a part of an entry is or would be."""
        return self.root / kind / key[:24] / f"{part}.safetensors"

    def save(self, kind: str, key: str, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part atomically. Raises UserError when the disk is full."""
        path = self.path(kind, key, part)
        make_folder(path.parent)
        payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(path) as temporary:
            save_file(payload, temporary, metadata={"key": key, "checksum": checksum(payload)})

    def has(self, kind: str, key: str, part: str) -> bool:
        """Whether a part is there and whole, by its header alone: finds truncation, not flipped
        bits, which `load` does.
        """
        path = self.path(kind, key, part)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                return (file.metadata() or {}).get("key") == key
        except (SafetensorError, OSError) as error:
            log.warning("Cache entry %s is damaged (%s): computing it again.", path, error)
            return False

    def load(self, kind: str, key: str, part: str) -> dict[str, Tensor] | None:
        """One part, or None when it is absent or damaged (which is logged, and the file
        removed).
        """
        path = self.path(kind, key, part)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata.get("key") != key or metadata.get("checksum") != checksum(tensors):
                raise ValueError("checksum mismatch")
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("Cache entry %s is damaged (%s): dropped, computing it again.", path, error)
            path.unlink(missing_ok=True)
            return None
        return tensors

    def folder(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """A folder made once by `build(temporary_folder)`; readers only ever see it complete."""
        final = self.root / kind / key[:24]
        if not final.exists():
            with disk_errors(final), self.lock(kind, key):
                if not final.exists():
                    self.count(kind, hit=False)
                    make_folder(final.parent)
                    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=".making-"))
                    try:
                        build(temporary)
                        os.replace(temporary, final)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
                    return final
        self.count(kind, hit=True)
        return final


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


@functools.cache
def claim(what: str, count: int) -> int:
    """Index of the first of `count` things (GPUs) that no other process of this machine and user
    holds; this one keeps it until it ends.

    Jobs of a sweep that run side by side so take one each, however they were started. Waits, saying
    so, when all are taken.
    """
    folder = Path(tempfile.gettempdir()) / f"specomp-{getpass.getuser()}"
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
