"""Calibration sets: which tokens the statistics are taken from, and how.

A spec (one yaml of conf/calibration) says where the tokens come from and builds a CalibrationSet
with a tokenizer.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from specomp.cache import digest
from specomp.data.samplers import Sampler
from specomp.data.text import TextSource
from specomp.data.token_ids import (
    Bos,
    begun,
    bos_id,
    check_rows,
    check_vocabulary,
    describe_tokenizer,
    read_token_ids,
    without_bos,
)
from specomp.errors import UserError
from specomp.numerics.statistics import Precision
from specomp.settings import configurable

log = logging.getLogger(__name__)
NumSamples = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]  # a sample of one token predicts nothing
Positive = Annotated[float, Field(gt=0)]


class CalibrationSet:
    """Samples of equal length in a fixed order.

    `hash` is made of the token ids and the tokenizer's content and of nothing else: two ways to the
    same tokens share their statistics. `description` is the JSON-able account for records:
    tokenizer, source with the hash of its text, sampler, seed, counts.
    """

    def __init__(self, tokens: LongTensor, *, description: dict[str, Any], batch_size: int) -> None:
        """tokens: (samples, length); description: at least {"tokenizer": describe_tokenizer(...)};
        batch_size: samples a batch.
        """
        self.tokens = tokens
        self.batch_size = batch_size
        self.num_samples, self.length = tokens.shape
        self.description = description | {
            "samples": self.num_samples,
            "length": self.length,
            "tokens": tokens.numel(),
        }
        ids = hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
        self.hash = digest(
            {
                "ids": ids,
                "shape": list(tokens.shape),
                "tokenizer": description["tokenizer"]["sha256"],
            }
        )

    @classmethod
    def of_shape(cls, num_samples: int, length: int, batch_size: int) -> "CalibrationSet":
        """One without content, for a plan."""
        tokens = cast(LongTensor, torch.zeros(num_samples, length, dtype=torch.int64))
        return cls(tokens, description={"tokenizer": {"sha256": ""}}, batch_size=batch_size)

    def batches(self) -> list[Tensor]:
        """Batches (batch, length) of int64 ids in order; the last one may be smaller."""
        return list(self.tokens.split(self.batch_size))

    def subset(self, num_samples: int) -> "CalibrationSet":
        """The first samples. Raises UserError when there are fewer."""
        if not 1 <= num_samples <= self.num_samples:
            raise UserError(
                f"A subset of {num_samples} samples was asked for, the calibration set has"
                f" {self.num_samples}."
            )
        tokens = cast(LongTensor, self.tokens[:num_samples].clone())
        return CalibrationSet(
            tokens,
            description=self.description | {"subset_of": self.num_samples},
            batch_size=self.batch_size,
        )


@configurable
class Calibration:
    """How tokens are read; the values live in conf/calibration/_base.yaml."""

    batch_size: Annotated[int, Field(ge=1)]  # samples a forward pass
    # what the activations passed through before a decoder layer
    upstream: Literal["dense", "compressed"]
    # decoder layers whose statistics are in memory at once; null: all
    layers_at_once: Annotated[int, Field(ge=1)] | None
    accumulate: Literal["float32", "float64"]  # dtype of the running sums
    # products of a float32 model's calibration passes; sums stay in `accumulate`
    precision: Literal["float32", "mixed", "bfloat16"]

    @property
    def statistics_precision(self) -> Precision:
        """Of the statistics: sums in `accumulate`, products in float32 unless less was asked for,
        or float64 sums were.
        """
        if self.accumulate == "float64":
            return Precision(torch.float64, torch.float64)
        return Precision(
            torch.float32, torch.float32 if self.precision == "float32" else torch.bfloat16
        )


@configurable
class CalibrationSpec(Calibration, ABC):
    """Which tokens, and how they are read."""

    num_samples: NumSamples | None  # null: all that there are (token files only)
    length: Length | None  # tokens a sample; null: as the file has (token files only)
    bos: Bos = "auto"  # every sample begins with BOS, which counts in its length

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        vocab_size: int | None = None,
        needs_bos: bool = False,
    ) -> CalibrationSet:
        """Draw the samples.

        max_length: tokens the model's context holds; vocab_size: rows of its embedding, None: as
        many as the tokenizer has tokens; needs_bos: what bos=auto means for it. Raises UserError
        when the text is too short, the samples too long, a file unfit, a token without a row, or
        BOS unknown.
        """
        self._check_length(self.length, max_length)
        first = self._first(tokenizer, needs_bos)
        rows = vocab_size or len(tokenizer)
        tokens, account = self.draw(tokenizer, rows)
        if first is not None:
            tokens, account = begun(tokens, first), account | {"bos": True}
        check_rows(tokens, rows, tokenizer, "Calibration")
        self._check_length(tokens.shape[1], max_length)
        if needs_bos and (bare := without_bos(tokens, tokenizer)):
            log.warning(
                "%d of %d calibration samples do not begin with BOS, which this model needs.",
                bare,
                len(tokens),
            )
        description = {
            "tokenizer": describe_tokenizer(tokenizer),
            **account,
            "samples_requested": self.num_samples,
        }
        calibration = CalibrationSet(tokens, description=description, batch_size=self.batch_size)
        log.info(
            "Calibration set: %d samples of %d tokens, %s.",
            calibration.num_samples,
            calibration.length,
            calibration.hash[:12],
        )
        return calibration

    def moved(self, by: int) -> "CalibrationSpec":
        """Samples of the same text, drawn with `by` added to the sampler's seed; the same where
        nothing is drawn.
        """
        return self

    @abstractmethod
    def draw(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> tuple[LongTensor, dict[str, Any]]:
        """Ids (samples, length) below `vocabulary`, and {"source": ..., "sampler": ...} for the
        description.
        """

    def _first(self, tokenizer: PreTrainedTokenizerBase, needs_bos: bool) -> int | None:
        """What every sample is to begin with."""
        wanted = needs_bos if self.bos == "auto" else self.bos
        return bos_id(tokenizer, "calibration.bos") if wanted else None

    @staticmethod
    def _check_length(length: int | None, max_length: int) -> None:
        if length == 1:  # of a token file
            raise UserError("Samples of 1 token predict nothing: give a file of longer ones.")
        if length is not None and length > max_length:
            raise UserError(
                f"Samples of {length} tokens do not fit the model's context of {max_length}: lower"
                " calibration.length."
            )


@configurable
class TextCalibration(CalibrationSpec):
    """Samples of one text."""

    num_samples: NumSamples
    length: Length
    corpus: TextSource
    sampler: Sampler

    def moved(self, by: int) -> "TextCalibration":
        return replace(self, sampler=self.sampler.moved(by))

    def draw(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> tuple[LongTensor, dict[str, Any]]:
        tokens = self.sampler(self.corpus.text(), tokenizer, self.num_samples, self.length)
        source = self.corpus.describe()
        log.info("Calibration text: %s.", source["fingerprint"])
        return tokens, {"source": source, "sampler": self.sampler.describe()}


@configurable
class Part:
    """One text of a mixture and its share, relative to the other weights."""

    corpus: TextSource
    weight: Positive


@configurable
class MixedCalibration(CalibrationSpec):
    """Samples of several texts, in proportion to their weights and evenly mixed, so that a subset
    keeps the proportions.
    """

    num_samples: NumSamples
    length: Length
    parts: Annotated[dict[str, Part], Field(min_length=1)]
    sampler: Sampler

    def moved(self, by: int) -> "MixedCalibration":
        return replace(self, sampler=self.sampler.moved(by))

    def draw(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> tuple[LongTensor, dict[str, Any]]:
        shares = allot([part.weight for part in self.parts.values()], self.num_samples)
        samples: list[Tensor] = []
        accounts: dict[str, dict[str, Any]] = {}
        for (name, part), share in zip(self.parts.items(), shares, strict=True):
            if share == 0:
                log.warning(
                    "Part %s of the mixture gets none of %d samples (weight %g).",
                    name,
                    self.num_samples,
                    part.weight,
                )
                accounts[name] = {"weight": part.weight, "samples": 0, "source": None}
                continue
            drawn = self.sampler(part.corpus.text(), tokenizer, share, self.length)
            source = part.corpus.describe()
            log.info("Calibration text, %d samples: %s.", len(drawn), source["fingerprint"])
            samples.append(drawn)
            accounts[name] = {"weight": part.weight, "samples": len(drawn), "source": source}
        order = interleave([len(drawn) for drawn in samples])
        tokens = cast(LongTensor, torch.stack([samples[part][index] for part, index in order]))
        return tokens, {
            "source": {"name": "mixture", "parts": accounts},
            "sampler": self.sampler.describe(),
        }


@configurable
class TokenFile(CalibrationSpec):
    """Samples made elsewhere, as a file of ids (samples, length); num_samples and length cut it,
    and nothing is put in front of them.
    """

    path: Path
    bos: Literal["auto", False] = "auto"

    def _first(self, tokenizer: PreTrainedTokenizerBase, needs_bos: bool) -> int | None:
        return None

    def draw(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> tuple[LongTensor, dict[str, Any]]:
        ids = read_token_ids(self.path)
        check_vocabulary(ids, vocabulary, self.path)
        samples, length = ids.shape
        num_samples, cut = self.num_samples or samples, self.length or length
        if num_samples > samples or cut > length:
            raise UserError(
                f"Token file {self.path} holds {samples} samples of {length} tokens, {num_samples}"
                f" of {cut} were asked for: lower calibration.num_samples / calibration.length or"
                " set them to null."
            )
        log.info(
            "Token file %s: taking the first %d tokens of the first %d samples (it has %d of %d).",
            self.path,
            cut,
            num_samples,
            samples,
            length,
        )
        source = {
            "name": "token_file",
            "origin": f"file {self.path.name}",
            "samples": samples,
            "length": length,
        }
        return cast(LongTensor, ids[:num_samples, :cut].contiguous()), {
            "source": source,
            "sampler": None,
        }


def allot(weights: Sequence[float], total: int) -> list[int]:
    """`total` items in proportion to the weights: whole parts first, the rest to the largest
    remainders (the earlier one on a tie).
    """
    exact = [Fraction(weight) for weight in weights]
    quotas = [weight * total / sum(exact) for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: shares[index] - quotas[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(part, index) of all items, each part spread evenly over the whole: any beginning holds about
    the proportions of the whole.
    """
    places = [
        (Fraction(2 * index + 1, 2 * count), part, index)
        for part, count in enumerate(counts)
        for index in range(count)
    ]
    return [(part, index) for _, part, index in sorted(places)]
