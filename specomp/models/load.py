"""From a config and a folder (or hub repository) to a model that is ready to use: what all model sources share.

Order of the checks: architecture from the config, then the files, then the weights; nothing large is read before the small can fail.
"""

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from specomp.cache import Cache, atomic_path, digest
from specomp.errors import UserError
from specomp.models.families import COMPRESSED_PREFIX, family_of
from specomp.models.family import ModelFamily
from specomp.models.registration import register

log = logging.getLogger(__name__)

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONTENT_FILES = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
NAMES_IN_MESSAGE = 3  # weights listed in an error before "and k more"


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, with what is needed to feed it and to find its linears."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: ModelFamily


def open_model(
    where: Path | str, config: PreTrainedConfig, *, dtype: str, device: str, device_map: str | None, **options: Any
) -> PreTrainedModel:
    """The causal LM of `config` with the weights at `where` (a checked folder or a hub repository), in eval mode.

    `dtype` may be "auto" (as saved). `options` go to from_pretrained. Raises UserError when a weight is absent or has another shape.
    """
    register()
    target = torch_device(device, device_map)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map=device_map,
                output_loading_info=True,
                **options,
            )
    except RuntimeError as error:  # transformers: weights of another shape than the config says
        raise UserError(f"Weights of {where} do not fit its config.json: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only warns, and leaves random weights
        raise UserError(f"{where} lacks {len(missing)} weights that its config.json asks for ({_some(missing)}): the folder is incomplete.")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        log.warning("%s: %d weights are not used by %s (%s)", where, len(unexpected), type(model).__name__, _some(unexpected))
    if device_map is None:
        model = model.to(target)
    return model.eval()  # type: ignore[no-any-return]


def read_config(where: Path | str, **options: Any) -> PreTrainedConfig:
    """The config of a folder or hub repository, compressed folders included. OSError or ValueError as transformers raises them."""
    register()
    with quiet():
        return AutoConfig.from_pretrained(where, **options)


def dense_family(config: PreTrainedConfig, where: Path | str) -> ModelFamily:
    """The family of a model that is to be compressed. Raises UserError when it is unsupported, compressed already or quantized."""
    family = family_of(config)
    if config.model_type.startswith(COMPRESSED_PREFIX):
        raise UserError(f"{where} is compressed already ({config.model_type}): compress its dense original, or open it with specomp.load.")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise UserError(f"{where} is quantized ({_quantization_name(quantization)}): start from the float16 or bfloat16 release.")
    return family


def context_length(config: PreTrainedConfig) -> int:
    """Tokens the model can attend to. Raises UserError when the config does not say."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UserError(f"The config of this {config.model_type} model has no max_position_embeddings: set it in its config.json.")
    return length


def torch_device(device: str, device_map: str | None) -> torch.device:
    """Resolve "auto" (CUDA, else MPS, else CPU) and check that the device exists. Raises UserError when it does not."""
    if device_map is not None and device != "auto":
        raise UserError(f"model.device={device} and model.device_map={device_map} contradict each other: leave one of them unset.")
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    target = torch.device(device)
    if (target.type == "cuda" and (target.index or 0) >= cuda) or (target.type == "mps" and not mps):
        raise UserError(
            f"model.device={device} is not on this machine ({cuda} CUDA devices, MPS {'yes' if mps else 'no'}): use model.device=auto."
        )
    return target


def checked_folder(path: str) -> Path:
    """A folder with a config.json and whole safetensors files. Raises UserError naming what is absent or damaged; reads only headers."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"Model folder {folder} does not exist{' (it is a file)' if folder.exists() else ''}: check model.path.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: model.path must be a folder written by save_pretrained or downloaded from the hub.")
    for shard in _shards(folder):
        _check_shard(shard)
    return folder


def content_hash(path: Path, cache: Cache) -> str:
    """sha256 of a file, remembered in the cache by (real path, size, modification time): a 13 GB file is read once."""
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


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast parameters in place. Unlike model.to(dtype), leaves rotary frequencies in float32, as from_pretrained does: no reload
    would reproduce rounded ones."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, advice or warnings from transformers; errors still raise."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged ({_first_line(error)}): copy or download the folder again.") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of {len(names)} weight files ({_some(absent)}): copy or download it again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({_some(pickled)}), which can run code when opened: "
            "save the model again with save_pretrained, which writes safetensors."
        )
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json: nothing to load.")


def _check_shard(path: Path) -> None:
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt"):  # type: ignore[no-untyped-call]  # checks the header against the file size
            pass
    except (SafetensorError, OSError) as error:
        expected = _size_in_header(path)
        sizes = f"{size} bytes" + (f" where its header says {expected}" if expected not in (None, size) else "")
        raise UserError(f"{path} is damaged or truncated ({sizes}; {_first_line(error)}): copy or download it again.") from error


def _size_in_header(path: Path) -> int | None:
    """Bytes a safetensors file should have: 8 for the header's length, the header, the tensors. None when the header is unreadable."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return 8 + length + max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _quantization_name(quantization: Any) -> str:
    settings = quantization if isinstance(quantization, dict) else vars(quantization)
    return str(settings.get("quant_method", "unknown method"))


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
