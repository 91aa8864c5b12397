"""Token ids: from text, and from files that somebody else made (safetensors, NumPy, torch; also as
SVD-LLM and GPTQ save theirs). Nothing is unpickled.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors.torch import load_file
from torch import LongTensor, Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from specomp.cache import digest
from specomp.errors import UserError

# BOS in front of every sequence; auto: where the model's family needs it (families.NEED_BOS)
Bos = Literal["auto", True, False]
NAMES = ("input_ids", "tokens")  # looked for in files with several tensors
MASK = "attention_mask"
LIMIT = 2**31  # more than any vocabulary has
REMEDY = "save an int64 tensor (samples, length) as .safetensors"


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, bare: bool = False) -> LongTensor:
    """Ids (tokens) of the whole text, with the special tokens the tokenizer adds (LLaMA: BOS at the
    start); bare: without.
    """
    options = {"add_special_tokens": False} if bare else {}
    # not verbose: a text is longer than the model's context on purpose, windows are cut from it
    ids = tokenizer(text, verbose=False, **options)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)  # type: ignore[return-value]


def bos_id(tokenizer: PreTrainedTokenizerBase, key: str) -> int:
    """The id of the BOS token. Raises UserError where there is none; key: the setting that asks for
    it.
    """
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"{key}: every sequence is to begin with BOS (this model's family needs it, or it was"
            f" asked for), but the tokenizer has no BOS token: give it one, or set {key}=false."
        )
    return int(tokenizer.bos_token_id)


def begun(tokens: Tensor, bos: int) -> LongTensor:
    """Samples (n, length) with BOS in front of each that does not begin with it; its last token
    makes room.
    """
    shifted = torch.cat([torch.full_like(tokens[:, :1], bos), tokens[:, :-1]], dim=1)
    return torch.where(tokens[:, :1] == bos, tokens, shifted)  # type: ignore[return-value]


def without_bos(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many samples (n, length) begin with another token."""
    return sum(first != tokenizer.bos_token_id for first in tokens[:, 0].tolist())


def embedding_rows(config: PreTrainedConfig) -> int:
    """How many token ids a model knows. Raises UserError where its own padding token is none."""
    text = config.get_text_config()
    rows, pad = int(text.vocab_size), getattr(text, "pad_token_id", None)
    if pad is not None and not -rows <= pad < rows:
        raise UserError(
            f"The model's config has pad_token_id={pad}, its embedding {rows} rows: set"
            f" pad_token_id to null or to a token below {rows}."
        )
    return rows


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Of all its tokens, whether a text has them or not."""
    return max(tokenizer.get_vocab().values())


def check_rows(ids: Tensor, rows: int, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raises UserError when a text has a token that the model's embedding has no row for; more rows
    than tokens are fine.
    """
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= rows:
        raise UserError(
            f"{what}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) has no row in"
            f" the model's embedding, which has {rows}; the tokenizer has {len(tokenizer)} tokens."
            " Use the tokenizer the model was trained with, or give the embedding a row for each:"
            f" model.resize_token_embeddings({max(len(tokenizer), largest_id(tokenizer) + 1)})."
        )


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
    """Ids (samples, length) of a .safetensors, .npy or .pt file: a single tensor, the one called
    input_ids or tokens, or a list of samples (1, length): tensors, dicts with input_ids (SVD-LLM),
    pairs of inputs and targets (GPTQ).

    Raises UserError for a missing or unreadable file, pickled content, another dtype or shape,
    samples of unequal lengths, padding, ids below 0 or from 2^31.
    """
    path = path.expanduser()
    try:
        path.open("rb").close()
    except OSError as error:
        known = {FileNotFoundError: "does not exist", IsADirectoryError: "is a folder"}
        what = known.get(type(error), f"cannot be read ({error.strerror})")
        raise UserError(
            f"Token file {path} {what}; set the path to a .safetensors, .npy or .pt file of token"
            " ids."
        ) from error
    array = _pick(_load(path), path)
    if array.ndim != 2 or array.size == 0:
        raise UserError(
            f"Token file {path}: shape {array.shape} is not (samples, length) with at least one"
            " token."
        )
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0:
        raise UserError(
            f"Token file {path}: smallest id is {smallest}; ids start at 0, and padding is not"
            " supported."
        )
    if largest >= LIMIT:
        raise UserError(
            f"Token file {path}: largest id is {largest}, which is no token of any vocabulary; was"
            " the file written with another dtype or byte order?"
        )
    return torch.from_numpy(array.astype(np.int64))  # type: ignore[return-value]


def check_vocabulary(tokens: Tensor, vocabulary: int, path: Path) -> None:
    """Raises UserError when an id has no embedding: ids must be below `vocabulary`."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise UserError(
            f"Token file {path}: id {largest} is outside the vocabulary of {vocabulary}; use the"
            " tokens of this model's tokenizer."
        )


def _load(path: Path) -> Any:
    """What the file holds, tensors in it as tensors or arrays."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".pt":
            with warnings.catch_warnings():
                # other pickle protocols load or are refused below; the advice to file an issue
                # helps nobody here
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # the loaders refuse pickled objects with the same exceptions as damaged files, and damaged
        # ones with whatever their bytes happen to mean
        raise UserError(
            f"Token file {path}: cannot be read as a plain tensor ({type(error).__name__}); it is"
            f" damaged or holds pickled objects, which are never loaded; {REMEDY}."
        ) from error
    raise UserError(
        f"Token file {path}: unknown suffix {path.suffix!r}; use .safetensors, .npy or .pt."
    )


def _pick(content: Any, path: Path) -> np.ndarray:
    """The ids in what a file holds, as they stand there."""
    if isinstance(content, list | tuple):
        return _joined(content, path)
    if isinstance(content, Mapping) and not isinstance(content, NpzFile):
        named = {x: y for x, y in content.items() if isinstance(y, Tensor)}
        ids = [named[name] for name in NAMES if name in named]
        alone = [y for x, y in named.items() if x != MASK]
        if not ids and len(alone) != 1:
            found = ", ".join(map(str, named)) or "none"
            raise UserError(
                f"Token file {path}: needs a single tensor or one called {' or '.join(NAMES)}"
                f" (tensors found: {found})."
            )
        array = _integers((ids or alone)[0], path)
        _check_mask(named.get(MASK), array, path)
        return array
    if isinstance(content, Tensor | np.ndarray):
        return _integers(content, path)
    kind = "an .npz archive" if isinstance(content, NpzFile) else f"a {type(content).__name__}"
    raise UserError(f"Token file {path}: holds {kind}, not token ids; {REMEDY}.")


def _joined(samples: Sequence[Any], path: Path) -> np.ndarray:
    """Samples of a list one below the other."""
    rows: list[np.ndarray] = []
    for number, sample in enumerate(samples):
        # GPTQ's pairs of inputs and targets: the targets are the inputs again
        pair = isinstance(sample, list | tuple) and len(sample) == 2
        inputs = sample[0] if pair else sample
        if not isinstance(inputs, Tensor | Mapping):
            raise UserError(
                f"Token file {path}: sample {number} is a {type(inputs).__name__}, not a tensor of"
                f" token ids; {REMEDY}."
            )
        row = np.atleast_2d(_pick(inputs, path))
        if row.ndim != 2 or row.size == 0:
            raise UserError(
                f"Token file {path}: sample {number} has shape {row.shape}, needs (1, length) with"
                " at least one token."
            )
        if rows and row.shape[1] != rows[0].shape[1]:
            raise UserError(
                f"Token file {path}: sample 0 has {rows[0].shape[1]} tokens, sample {number} has"
                f" {row.shape[1]}; cut all to one length, padding is not supported."
            )
        rows.append(row)
    if not rows:
        raise UserError(f"Token file {path}: an empty list; {REMEDY}.")
    return np.concatenate(rows)


def _integers(ids: Tensor | np.ndarray, path: Path) -> np.ndarray:
    """The values of a tensor of integers, in the byte order of this machine."""
    if isinstance(ids, Tensor):
        plain = ids.layout is torch.strided and not ids.is_meta and not ids.is_quantized
        # bfloat16 has no name in NumPy; what is refused needs no values
        wrong = not plain or ids.dtype.is_floating_point or ids.dtype.is_complex
        array = np.empty(0, dtype=np.float32) if wrong else ids.numpy()
    else:
        array = ids
    if array.dtype.kind not in "iu":
        raise UserError(
            f"Token file {path}: dtype {ids.dtype} is not an integer type; save token ids as int64."
        )
    return array.astype(array.dtype.newbyteorder("="))


def _check_mask(mask: Tensor | None, ids: np.ndarray, path: Path) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != ids.shape:
        raise UserError(
            f"Token file {path}: {MASK} has shape {tuple(mask.shape)}, the ids have {ids.shape};"
            f" {REMEDY}."
        )
    if unread := int((mask == 0).sum()):
        raise UserError(
            f"Token file {path}: {MASK} is 0 at {unread} of {ids.size} tokens; padding is not"
            " supported, cut all samples to one length."
        )
