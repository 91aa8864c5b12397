"""Token ids: from text, and from files that somebody else made (safetensors, NumPy, torch). Nothing
is unpickled.
"""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from specomp.cache import digest
from specomp.errors import UserError

NAMES = ("input_ids", "tokens")  # looked for in files with several tensors
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> LongTensor:
    """Ids (tokens) of the whole text, with the special tokens the tokenizer adds (LLaMA: BOS at the
    start).
    """
    # not verbose: a text is longer than the model's context on purpose, windows are cut from it
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)  # type: ignore[return-value]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Class, size and sha256 of what decides its ids; the folder or repository it came from plays
    no part.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # left behind by earlier calls, not part of the tokenizer
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "special": tokenizer.special_tokens_map,
        }
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "sha256": digest(content),
    }


def read_token_ids(path: Path) -> LongTensor:
    """Ids (samples, length) of a .safetensors, .npy or .pt file: a single tensor, or the one called
    input_ids or tokens.

    Raises UserError for a missing or unreadable file, pickled content, another dtype or shape,
    negative ids.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(
            f"Token file {path} does not exist; set the path to a .safetensors, .npy or .pt file of"
            " token ids."
        )
    tensor = _pick(_load(path), path)
    if tensor.dtype not in INTEGERS:
        raise UserError(
            f"Token file {path}: dtype {tensor.dtype} is not an integer type; save token ids as"
            " int64."
        )
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise UserError(
            f"Token file {path}: shape {tuple(tensor.shape)} is not (samples, length) with at least"
            " one token."
        )
    if int(tensor.min()) < 0:
        raise UserError(
            f"Token file {path}: smallest id is {int(tensor.min())}; ids start at 0, and padding is"
            " not supported."
        )
    return tensor.to(torch.int64)  # type: ignore[return-value]


def check_vocabulary(tokens: Tensor, vocabulary: int, path: Path) -> None:
    """Raises UserError when an id has no embedding: ids must be below `vocabulary`."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise UserError(
            f"Token file {path}: id {largest} is outside the vocabulary of {vocabulary}; use the"
            " tokens of this model's tokenizer."
        )


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            # torch cannot compare unsigned types wider than a byte
            return torch.from_numpy(
                array.astype(np.int64) if array.dtype.kind == "u" else np.ascontiguousarray(array)
            )
        if path.suffix == ".pt":
            with warnings.catch_warnings():
                # other pickle protocols load or are refused below; the advice to file an issue
                # helps nobody here
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        # the loaders refuse pickled objects with the same exceptions as damaged files
        raise UserError(
            f"Token file {path}: cannot be read as a plain tensor ({type(error).__name__}); it is"
            " damaged or holds pickled objects, which are never loaded. Save an int64 tensor"
            " (samples, length) as .safetensors."
        ) from error
    raise UserError(
        f"Token file {path}: unknown suffix {path.suffix!r}; use .safetensors, .npy or .pt."
    )


def _pick(content: Any, path: Path) -> Tensor:
    if isinstance(content, Tensor):
        return content
    tensors = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    for name in NAMES:
        if name in tensors:
            return tensors[name]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    found = ", ".join(map(str, tensors)) or "none"
    raise UserError(
        f"Token file {path}: needs a single tensor or one called {' or '.join(NAMES)} (tensors"
        f" found: {found})."
    )
