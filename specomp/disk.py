"""Folders and files that appear whole or not at all, and one line about a disk that is full or
cannot be written. Imports no torch: a run makes its folders before it loads anything.
"""

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from specomp.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError where that is not possible."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


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


class atomic_path:  # noqa: N801
    """`with atomic_path(final) as temporary:` write to temporary; it becomes final only if the
    block succeeds.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        self.errors = disk_errors(final)

    def __enter__(self) -> Path:
        make_folder(self.final.parent)
        return self.temporary

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                with self.errors:
                    os.replace(self.temporary, self.final)
            else:
                self.errors.__exit__(kind, error, trace)
        finally:
            self.temporary.unlink(missing_ok=True)
