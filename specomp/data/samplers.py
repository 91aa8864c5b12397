"""How samples of `length` tokens are taken from a text. All return ids (samples, length)."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from specomp.data.token_ids import tokenize
from specomp.errors import UserError
from specomp.settings import configurable

log = logging.getLogger(__name__)
REMEDY = "lower calibration.num_samples / calibration.length or choose a bigger corpus"
CHARACTERS_PER_TOKEN = 10  # SVD-LLM tokenizes this many characters for each token it wants to keep


@runtime_checkable
class Sampler(Protocol):
    """Takes samples from a text."""

    def __call__(
        self, text: str, tokenizer: PreTrainedTokenizerBase, num_samples: int, length: int
    ) -> LongTensor:
        """Ids (samples, length), the same for the same arguments. Raises UserError when the text is
        too short.
        """
        ...

    def moved(self, by: int) -> "Sampler":
        """The same with `by` added to its seed: other samples of the same text."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able: name and seed."""
        ...


class Seeded:
    """What draws at random, from a seed of its own."""

    seed: int

    def moved(self, by: int) -> Self:
        """See Sampler."""
        return replace(self, seed=self.seed + by)  # type: ignore[type-var]


@configurable
class SvdLlmSampler(Seeded):
    """SVD-LLM's calibration reading (`get_calib_train_data`; its seed is 3 whatever the command
    line says).

    Random character offsets; samples overlap freely. A piece of text that gives fewer than `length`
    tokens is skipped and not replaced, so the result can have fewer samples than asked for.
    """

    seed: int

    def __call__(
        self, text: str, tokenizer: PreTrainedTokenizerBase, num_samples: int, length: int
    ) -> LongTensor:
        return svd_llm_windows(
            text, lambda piece: tokenize(piece, tokenizer), num_samples, length, self.seed
        )

    def describe(self) -> dict[str, Any]:
        return {"name": "svd_llm", "seed": self.seed}


@configurable
class TokenWindows(Seeded):
    """Random windows of the tokenized text (GPTQ's and SparseGPT's `get_loaders`): only the text's
    first token can be a BOS.
    """

    seed: int

    def __call__(
        self, text: str, tokenizer: PreTrainedTokenizerBase, num_samples: int, length: int
    ) -> LongTensor:
        log.info("Tokenizing %d characters.", len(text))
        return random_windows(tokenize(text, tokenizer), num_samples, length, self.seed)

    def describe(self) -> dict[str, Any]:
        return {"name": "token_windows", "seed": self.seed}


@configurable
class ContiguousWindows:
    """Windows side by side from the start of the text, as the perplexity protocol reads its test
    text.
    """

    def __call__(
        self, text: str, tokenizer: PreTrainedTokenizerBase, num_samples: int, length: int
    ) -> LongTensor:
        log.info("Tokenizing %d characters.", len(text))
        return contiguous_windows(tokenize(text, tokenizer), num_samples, length)

    def moved(self, by: int) -> "ContiguousWindows":
        """The same samples at every seed."""
        return self

    def describe(self) -> dict[str, Any]:
        return {"name": "contiguous", "seed": None}


def svd_llm_windows(
    text: str, encode: Callable[[str], Tensor], num_samples: int, length: int, seed: int
) -> LongTensor:
    """SVD-LLM's samples, draw by draw: num_samples + 1 offsets are drawn and the last sample that
    is long enough is dropped.

    The draw is over characters but leaves room for `length` of them only, as published: the last
    pieces of a text are short.
    """
    if len(text) < length + 1:
        raise UserError(
            f"The text has {len(text)} characters, needs more than {length} for a sample of"
            f" {length} tokens; {REMEDY}."
        )
    # the same numbers as random.seed(seed) without touching the global generator
    draw = random.Random(seed)
    samples, characters, tokens, short = [], 0, 0, 0
    for _ in range(num_samples + 1):
        start = draw.randint(0, len(text) - length - 1)
        piece = text[start : start + CHARACTERS_PER_TOKEN * length]
        ids = encode(piece)
        characters, tokens = characters + len(piece), tokens + len(ids)
        if len(ids) < length:
            short += 1
            continue
        samples.append(ids[:length])
    samples = samples[:-1]
    # an estimate: tokenizing all of a big text would take minutes
    text_tokens = len(text) * tokens // characters
    if not samples:
        raise UserError(
            f"{short} of {num_samples + 1} pieces of the text gave fewer than {length} tokens, none"
            f" is left: the text has about {text_tokens} tokens, needs"
            f" {CHARACTERS_PER_TOKEN * length} characters after each start; {REMEDY}."
        )
    if len(samples) < num_samples:
        log.warning(
            "%d samples instead of %d: %d pieces of text gave fewer than %d tokens.",
            len(samples),
            num_samples,
            short,
            length,
        )
    _warn_of_repeats(len(samples), length, text_tokens)
    return torch.stack(samples)  # type: ignore[return-value]


def random_windows(ids: Tensor, num_samples: int, length: int, seed: int) -> LongTensor:
    """num_samples windows of ids (tokens,) at random starts. Raises UserError when ids holds no
    more than `length`.
    """
    if len(ids) < length + 1:
        raise UserError(
            f"The text has {len(ids)} tokens, needs {length + 1} for random samples of {length};"
            f" {REMEDY}."
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(num_samples)]
    _warn_of_repeats(num_samples, length, len(ids))
    return torch.stack([ids[start : start + length] for start in starts])  # type: ignore[return-value]


def contiguous_windows(ids: Tensor, num_samples: int, length: int) -> LongTensor:
    """The first num_samples windows of ids (tokens,), none overlapping. Raises UserError when ids
    is too short.
    """
    needed = num_samples * length
    if len(ids) < needed:
        raise UserError(
            f"The text has {len(ids)} tokens, needs {needed} for {num_samples} samples of {length};"
            f" {REMEDY}."
        )
    return ids[:needed].reshape(num_samples, length)  # type: ignore[return-value]


def _warn_of_repeats(num_samples: int, length: int, text_tokens: int) -> None:
    if num_samples * length > text_tokens:
        log.warning(
            "%d samples of %d tokens from a text of about %d: samples repeat each other.",
            num_samples,
            length,
            text_tokens,
        )
