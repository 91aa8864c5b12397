"""Model folders on disk: are they whole, and what is in them. Reads headers and hashes, never
weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from specomp.cache import Cache, digest
from specomp.disk import atomic_path
from specomp.errors import UserError, first_line

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONTENT_FILES = (
    "*.safetensors",
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
NAMES_IN_MESSAGE = 3  # files or weights listed in an error before "and k more"


def checked_folder(path: str) -> Path:
    """A folder with a config.json and whole safetensors files. Raises UserError naming what is
    absent or damaged; reads only headers.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"Model folder {folder} does not exist{' (it is a file)' if folder.exists() else ''}:"
            " check model.path."
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json: model.path must be a folder written by save_pretrained"
            " or downloaded from the hub."
        )
    for shard in shards(folder):
        _check_shard(shard)
    return folder


def content_hash(path: Path, cache: Cache) -> str:
    """sha256 of a file, remembered in the cache by (real path, size, modification time): a 13 GB
    file is read once.
    """
    real = path.resolve()
    stat = real.stat()
    memo = cache.root / "hashes" / digest([str(real), stat.st_size, stat.st_mtime_ns])[:24]
    if memo.exists() and len(known := memo.read_text()) == 64:
        return known
    with real.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    with atomic_path(memo) as temporary:
        temporary.write_text(value)
    return value


def folder_hashes(folder: Path, cache: Cache) -> dict[str, str]:
    """Hash of every file that determines weights or tokens, by file name."""
    files = {path for pattern in CONTENT_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: content_hash(path, cache) for path in sorted(files)}


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError when there are none, or one that the
    index names is absent.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{index} is damaged ({first_line(error)}): copy or download the folder again."
            ) from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(
                f"{folder} lacks {len(absent)} of {len(names)} weight files ({some(absent)}): copy"
                " or download it again."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({some(pickled)}), which can run code when opened: "
            "save the model again with save_pretrained, which writes safetensors."
        )
    raise UserError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json: nothing to load."
    )


def _check_shard(path: Path) -> None:
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file size
            pass
    except (SafetensorError, OSError) as error:
        expected = _size_in_header(path)
        sizes = f"{size} bytes" + (
            f" where its header says {expected}" if expected not in (None, size) else ""
        )
        raise UserError(
            f"{path} is damaged or truncated ({sizes}; {first_line(error)}): copy or download it"
            " again."
        ) from error


def safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file start, and what its header says of each: dtype, shape,
    data_offsets.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(min(length, path.stat().st_size)))


def _size_in_header(path: Path) -> int | None:
    """Bytes a safetensors file should have: 8 for the header's length, the header, the tensors.
    None when the header is unreadable.
    """
    try:
        start, header = safetensors_header(path)
        return start + max(
            int(tensor["data_offsets"][1])
            for name, tensor in header.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
