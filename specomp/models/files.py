"""Model folders on disk: are they whole, and what is in them. Reads headers and hashes, never
weights.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from specomp.cache import Cache, digest
from specomp.errors import UserError, first_line, one_line

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKEN_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
GGUF = "model.gguf"  # the weights of a folder for llama.cpp
FLOATS = ("F64", "F32", "F16", "BF16")  # what a weight that acts as it is stored can be
NAMES_IN_MESSAGE = 3  # files or weights listed in an error before "and k more"


def model_folder(path: str) -> Path:
    """A folder with a config.json that is a JSON object. Raises UserError."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"Model folder {folder} does not exist{' (it is a file)' if folder.exists() else ''}:"
            " check model.path."
        )
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{folder} has no config.json: model.path must be a folder written by save_pretrained"
            " or downloaded from the hub."
        )
    try:
        if not isinstance(content := json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError(f"it holds {type(content).__name__} where an object belongs")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{config} cannot be read ({one_line(error)}): copy or download the folder again."
        ) from error
    return folder


def checked_folder(path: str) -> Path:
    """The same with whole safetensors files of numbers. Raises UserError naming what is absent,
    damaged or ambiguous; reads only headers.
    """
    folder = model_folder(path)
    where: dict[str, Path] = {}
    for shard in shards(folder):
        _check_shard(shard)
        for name, tensor in safetensors_header(shard)[1].items():
            if name == "__metadata__":
                continue
            if name in where:
                raise UserError(
                    f"{folder} has {name} twice, in {where[name].name} and {shard.name}: which of"
                    " them is meant cannot be told."
                )
            where[name] = shard
            if name.endswith(".weight") and tensor["dtype"] not in FLOATS:
                raise UserError(
                    f"{shard}: {name} is stored as {tensor['dtype']}, which are not the weights"
                    " themselves but integers or scaled numbers of a quantized model: start from"
                    " its float16 or bfloat16 release."
                )
    return folder


def weight_names(folder: Path) -> set[str]:
    """The names of the tensors in a checked folder."""
    headers = (safetensors_header(shard)[1] for shard in shards(folder))
    return {name for header in headers for name in header if name != "__metadata__"}


def content_hash(path: Path, cache: Cache) -> str:
    """sha256 of a file, remembered in the cache by its place, size, times and number on the disk: a
    13 GB file is read once. SPECOMP_REHASH=1 reads all files again, whatever these say.
    """
    real = path.resolve()
    stat = real.stat()
    state = [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    memo = f"hashes/{digest(state)[:24]}.json"
    again = os.environ.get("SPECOMP_REHASH") == "1" and memo not in _hashed
    if not again and (known := cache.load_json(memo)) is not None:
        return str(known["sha256"])
    with real.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    cache.save_json(memo, {"sha256": value})
    _hashed.add(memo)
    return value


_hashed: set[str] = set()  # by this process


def folder_hashes(folder: Path, cache: Cache, *, code: bool) -> dict[str, str]:
    """Hash of every file that determines weights or tokens, by its name in the folder; of the
    Python files too where they are run.
    """
    patterns = (*TOKEN_FILES, "config.json", *(("**/*.py",) if code else ()))
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in [*files, *shards(folder)]}
    return {name: content_hash(path, cache) for name, path in sorted(names.items())}


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def shards(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, the one rule for which they are. Raises
    UserError when there are none, when there are two sets of them, or when one that the index names
    is absent or outside the folder.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} has {adapter.name}, so transformers would load another model with this as"
            " an adapter: merge it first (merge_and_unload), or move the file away."
        )
    config = folder / "config.json"
    named = config.is_file() and json.loads(config.read_text()).get("transformers_weights")
    if named:
        raise UserError(
            f"{config} names its weights itself (transformers_weights={named}):"
            f" call that file {single.name}, and remove the field."
        )
    if index.exists():
        names = _names_in(index)
        if single.exists() and names != [single.name]:
            raise UserError(
                f"{folder} has two sets of weights, {single.name} and the {len(names)} files that"
                f" {index.name} names: move the set that is not meant away."
            )
        outside = [x for x in names if Path(x).is_absolute() or ".." in Path(x).parts]
        if outside:
            raise UserError(f"{index} names files outside its folder ({some(outside)}).")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(
                f"{folder} lacks {len(absent)} of {len(names)} weight files ({some(absent)}): copy"
                " or download it again."
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    if single.exists():
        raise UserError(f"{single} is a folder where the weights belong: copy the file again.")
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({some(pickled)}), which can run code when opened: "
            "save the model again with save_pretrained, which writes safetensors."
        )
    raise UserError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json: nothing to load."
    )


def _names_in(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        if not names:
            raise ValueError("it names no files")
        if not isinstance(content.get("metadata"), dict):
            raise ValueError('it has no "metadata": {}, which transformers asks for')
        return [str(x) for x in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{index} is damaged ({one_line(error)}): copy or download the folder again."
        ) from error


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
