"""Files are what they were when they were written, or somebody is told: folders carry a list of
checksums, and small files their own.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from specomp.errors import UserError, first_line

log = logging.getLogger(__name__)
LIST = "checksums.json"
CHUNK = 2**22  # bytes
_whole: set[tuple[Any, ...]] = set()  # files that this process has checked, as they were then


def of_file(path: Path) -> str:
    """xxh3 (128 bits, hex) of a file's bytes."""
    state, buffer = xxhash.xxh3_128(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(memoryview(buffer)[:count])
    return state.hexdigest()


def of_text(text: str) -> str:
    """xxh3 (128 bits, hex) of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def of_content(content: Mapping[str, Any]) -> str:
    """xxh3 (128 bits, hex) of a JSON object, however it is laid out."""
    return of_text(json.dumps(content, sort_keys=True, default=str))


def seal(folder: Path, patterns: tuple[str, ...] = ("**/*",)) -> None:
    """Write the checksums of a folder's files into it; of those that match, where patterns are
    given.
    """
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    content = {name: of_file(folder / name) for name in names if name != LIST}
    (folder / LIST).write_text(json.dumps(content, indent=1) + "\n")


def reseal(folder: Path, names: Sequence[str]) -> None:
    """Write the checksums anew of those of these files that the list of a folder has."""
    listed = listed_in(folder)
    changed = {name: of_file(folder / name) for name in names if name in listed}
    if changed:
        (folder / LIST).write_text(json.dumps(listed | changed, indent=1) + "\n")


def check(folder: Path) -> bool:
    """Whether a folder has a list of checksums. Raises UserError naming a file that is not what it
    was; a file is read at most once a process.
    """
    for name, wanted in (listed := listed_in(folder)).items():
        path = folder / name
        try:
            stat = path.stat()
            state = (str(path), wanted, *stat[:4], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            if state not in _whole and of_file(path) != wanted:
                raise UserError(
                    f"{path} is not what it was when it was written (its checksum is another):"
                    " make the folder again; if it was changed on purpose, remove"
                    f" {folder / LIST}."
                )
            _whole.add(state)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({(error.strerror or str(error)).lower()}): make the"
                " folder again."
            ) from error
    return bool(listed)


def listed_in(folder: Path) -> dict[str, str]:
    """The list of a folder; empty where it has none. Raises UserError when it is damaged."""
    path = folder / LIST
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(path.read_text())
        if not content or not all(isinstance(x, str) for x in [*content, *content.values()]):
            raise ValueError("not a list of checksums")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): make the folder again."
        ) from error
    return dict(content)


@contextmanager
def checking(folder: Path) -> Iterator[None]:
    """Checks a folder while the block reads it. Raises UserError at its end, also in place of what
    a damaged file made the block raise.
    """
    found: list[UserError] = []
    told: list[bool] = []

    def work() -> None:
        try:
            told.append(check(folder))
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=work, name="checksums")
    thread.start()
    try:
        yield
    except Exception as error:
        thread.join()
        if found:
            raise found[0] from error
        raise
    finally:
        thread.join()
    if found:
        raise found[0]
    if told == [False]:
        log.info("%s has no checksums: whether it is what was written is not known.", folder)
