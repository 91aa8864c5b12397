"""What perplexity hides of a model's own text: whether it repeats itself, and what it refuses.

repeated_4grams    share of the 4-grams of tokens, of greedy text, that were there before in the
                   same text
refused_harmful    share of requests that a chat model refuses, by words near the beginning of its
refused_harmless   greedy answer: of those that it should, and of those that it should not

Small probes, that show a change between the dense and a compressed model. None of them is an
evaluation of safety.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import Field, PositiveInt, StringConstraints
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.data.token_ids import check_rows
from specomp.errors import UserError, one_line
from specomp.evaluation.greedy import Written, written
from specomp.evaluation.metric import SHARE, Metric
from specomp.evaluation.perplexity import (
    Perplexity,
    cut_windows,
    evaluating,
)
from specomp.evaluation.workload import Workload
from specomp.progress import track
from specomp.settings import configurable

log = logging.getLogger(__name__)
GRAM = 4
Word = Annotated[str, StringConstraints(min_length=1)]
Text = dict[str, str]  # prompt, text


@runtime_checkable
class Writes(Protocol):
    """A benchmark that has a model write. Optional: a record keeps some of the texts, and a report
    shows them beside the dense model's.
    """

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What the model writes: what `judge` and `texts` are about."""

    def judge(self, answers: Any) -> dict[str, float]:
        """The numbers."""

    def texts(self, answers: Any, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
        """Every prompt and what follows it."""


@configurable
class Repetition(Perplexity):
    """Greedy text after `max_windows` pieces, of `window` tokens each, from all over a corpus."""

    metric: ClassVar[str] = "repeated_4grams"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "repeated_4grams": Metric(SHARE, "lower"),
        "nonfinite_texts": Metric("texts", "lower"),
    }
    setting: ClassVar[str] = "benchmark.prompt_tokens"
    max_windows: PositiveInt
    new_tokens: Annotated[int, Field(ge=GRAM)]

    @property
    def shape(self) -> str:
        """Prompts, and what is written after each: 32x16+128."""
        return f"{self.window}x{self.max_windows}+{self.new_tokens}"

    def workload(self) -> list[Workload]:
        """A prefill a batch, and a step a token."""
        batches = -(-self.max_windows // self.batch_size)
        return [
            Workload(
                tokens=self.max_windows * (self.window + self.new_tokens),
                length=self.window,
                batch=self.batch_size,
                sure="at most",
                half=self.precision == "bfloat16",
                decoded=batches * self.new_tokens,
            )
        ]

    def validate(self, max_length: int) -> None:
        """Raises UserError when prompt and text do not fit a context of `max_length` tokens, or the
        corpus cannot be had.
        """
        if self.window + self.new_tokens > max_length:
            raise UserError(
                f"{self.name}: {self.window} + {self.new_tokens} new tokens do not fit the model's"
                f" context of {max_length}: lower benchmark.prompt_tokens or benchmark.new_tokens."
            )
        self.corpus.describe()

    def cut(self, ids: Tensor, window: int) -> Tensor:
        """Spread evenly over the text."""
        every = cut_windows(ids, window, None)
        return every[:: max(1, len(every) // self.max_windows)][: self.max_windows]

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[list[int], Written]]:
        """Ids of every prompt, and what follows them."""
        prompts = self.for_model(model.config).windows(tokenizer)
        check_rows(prompts, model.config.get_text_config().vocab_size, tokenizer, self.name)
        batches = prompts.split(self.batch_size)  # type: ignore[no-untyped-call]
        found: list[Written] = []
        with evaluating(model, self.precision):
            for batch in track(batches, self.id, len(batches)):
                found += written(model, tokenizer, batch, self.new_tokens)
        return list(zip(prompts.tolist(), found, strict=True))

    def judge(self, answers: Sequence[tuple[list[int], Written]]) -> dict[str, float]:
        """repeated_4grams, texts, tokens (written), nonfinite_texts. Of texts shorter than four
        tokens none repeats.
        """
        count = distinct = 0
        for _, answer in answers:
            grams = list(zip(*(answer.ids[i:] for i in range(GRAM)), strict=False))
            count, distinct = count + len(grams), distinct + len(set(grams))
        return {
            "repeated_4grams": 1 - distinct / count if count else 0.0,
            "tokens": float(sum(len(answer.ids) for _, answer in answers)),
            **_counts(self.name, [answer for _, answer in answers]),
        }

    def texts(
        self,
        answers: Sequence[tuple[list[int], Written]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Text]:
        """See Writes."""
        return [
            {"prompt": _decoded(tokenizer, prompt), "text": _decoded(tokenizer, answer.ids)}
            for prompt, answer in answers
        ]

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """See `judge`."""
        return self.judge(self.write(model, tokenizer))


@configurable
class Refusals:
    """Greedy answers to lists of requests in the tokenizer's chat template. An answer that has one
    of `words` in its first `near` characters is a refusal.
    """

    volatile: ClassVar[bool] = False
    metric: ClassVar[str] = "refused_harmful"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "refused_harmful": Metric(SHARE, "higher"),
        "refused_harmless": Metric(SHARE, "lower", column=True),
        "nonfinite_texts": Metric("texts", "lower"),
    }
    name: str
    version: PositiveInt
    harmful: Annotated[tuple[str, ...], Field(min_length=1)]
    harmless: Annotated[tuple[str, ...], Field(min_length=1)]
    words: Annotated[tuple[Word, ...], Field(min_length=1)]
    near: PositiveInt  # characters
    new_tokens: PositiveInt

    @property
    def id(self) -> str:
        """For example refusals@1:16+16x48:3f2a91c0; the last part is from the hash of the lists."""
        lists = [self.harmful, self.harmless, self.words, self.near]
        content = sha256(json.dumps(lists, ensure_ascii=False).encode()).hexdigest()[:8]
        shape = f"{len(self.harmful)}+{len(self.harmless)}x{self.new_tokens}"
        head = f"{self.name}@{self.version}"
        return ":".join([head, shape, content])

    @property
    def protocol(self) -> str:
        """The id: other lists are another probe."""
        return self.id

    def workload(self) -> list[Workload]:
        """One request at a time; of some fifty tokens with its template."""
        requests = len(self.harmful) + len(self.harmless)
        return [
            Workload(
                tokens=requests * (50 + self.new_tokens),
                length=50,
                batch=1,
                sure="estimate",
                decoded=requests * self.new_tokens,
            )
        ]

    def validate(self, max_length: int) -> None:
        """Raises UserError where the answers alone do not fit a context of `max_length` tokens."""
        if self.new_tokens >= max_length:
            raise UserError(
                f"{self.name}: {self.new_tokens} new tokens do not fit the model's context of"
                f" {max_length}: lower benchmark.new_tokens."
            )

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Raises UserError where the tokenizer has no chat template, or a request a token without
        a row in the embedding.
        """
        for request in (*self.harmful, *self.harmless):
            check_rows(self._prompt(tokenizer, request), rows, tokenizer, self.name)

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[bool, str, Written, str]]:
        """Whether a request is harmful, the request, its answer, and the answer as text."""
        requests = [(True, x) for x in self.harmful] + [(False, x) for x in self.harmless]
        found = []
        with evaluating(model):
            for harmful, request in track(requests, self.id, len(requests)):
                prompt = self._prompt(tokenizer, request)
                (answer,) = written(model, tokenizer, prompt, self.new_tokens)
                found.append((harmful, request, answer, _decoded(tokenizer, answer.ids)))
        return found

    def judge(self, answers: Sequence[tuple[bool, str, Written, str]]) -> dict[str, float]:
        """refused_harmful, refused_harmless, texts, nonfinite_texts."""
        refused: dict[bool, list[bool]] = {True: [], False: []}
        for harmful, _, _, text in answers:
            refused[harmful].append(self.refuses(text))
        return {
            "refused_harmful": sum(refused[True]) / len(refused[True]),
            "refused_harmless": sum(refused[False]) / len(refused[False]),
            **_counts(self.name, [answer for *_, answer, _ in answers]),
        }

    def refuses(self, text: str) -> bool:
        """Whether an answer is a refusal."""
        beginning = _plain(text)[: self.near]
        return any(_plain(x) in beginning for x in self.words)

    def texts(
        self,
        answers: Sequence[tuple[bool, str, Written, str]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Text]:
        """See Writes; harmless ones alone: what a model says to the others nobody needs to read."""
        return [
            {"prompt": request, "text": text}
            for harmful, request, _, text in answers
            if not harmful
        ]

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """See `judge`."""
        return self.judge(self.write(model, tokenizer))

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, request: str) -> Tensor:
        """(1, tokens) in the chat template."""
        try:
            ids: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": request}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except ValueError as error:  # none, or several and no default
            raise UserError(
                f"{self.name}: the tokenizer has no chat template of its own, and only a model that"
                " was tuned on conversations refuses: take this part out of the benchmark."
            ) from error
        except Exception as error:  # whatever a template raises
            raise UserError(
                f"{self.name}: the tokenizer's chat template refuses a request"
                f" ({one_line(error)}): take this part out of the benchmark."
            ) from error
        if not ids:
            raise UserError(
                f"{self.name}: the tokenizer's chat template makes nothing of {request!r}: take"
                " this part out of the benchmark."
            )
        return torch.tensor([ids])


def _counts(name: str, answers: Sequence[Written]) -> dict[str, float]:
    """texts, and nonfinite_texts, of which the log is told."""
    nonfinite = sum(not answer.finite for answer in answers)
    if nonfinite:
        log.warning(
            "%s: %d of %d texts from logits that are no numbers.", name, nonfinite, len(answers)
        )
    return {"texts": float(len(answers)), "nonfinite_texts": float(nonfinite)}


def _plain(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=True)
    return str(text)
