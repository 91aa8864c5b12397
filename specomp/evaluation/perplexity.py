"""Token-level perplexity over fixed windows: the protocol of SVD-LLM's `ppl_eval` (methods.md 3.4),
which is that of GPTQ.

Text joined and tokenised once (special tokens as the tokenizer adds them, so at most one BOS), cut
into non-overlapping windows, remainder dropped, window - 1 predictions per window, exp of the mean
NLL over all predictions. Differs from the reference: a window whose NLL is not finite counts and is
reported; there it is left out without a word. With bos, every window is BOS and window - 1 tokens
of text, each of which is predicted: the first from BOS alone.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from specomp.data.text import TextSource
from specomp.data.token_ids import (
    Bos,
    bos_id,
    check_rows,
    check_vocabulary,
    largest_id,
    read_token_ids,
    tokenize,
    without_bos,
)
from specomp.errors import UserError
from specomp.evaluation.metric import Metric
from specomp.evaluation.workload import Workload, text_tokens
from specomp.models.families import needs_bos
from specomp.progress import track
from specomp.settings import configurable

log = logging.getLogger(__name__)
# positions of one sequence whose float32 logits and log-softmax exist at a time: 50 MB at a
# vocabulary of 49152
CHUNK = 128
MIN_WINDOW = 2  # one token to read, one to predict
MOST_CHARACTERS = 32  # a token, on average over a text: a longer one fills a window for sure
ForwardPrecision = Literal["float32", "bfloat16"]


METRICS = {"ppl": Metric("", "lower"), "nonfinite_windows": Metric("windows", "lower")}


@dataclass(frozen=True)
class WindowLoss:
    """Summed NLL of every window, in nats: `per_window` (w,) float64, each over `predictions`
    tokens.
    """

    per_window: Tensor
    predictions: int

    @property
    def finite(self) -> Tensor:
        """(w,) bool: windows whose NLL is a number."""
        return torch.isfinite(self.per_window)

    @property
    def tokens(self) -> int:
        """Predictions counted, non-finite windows included."""
        return self.per_window.numel() * self.predictions

    def mean(self, *, finite_only: bool = False) -> float:
        """Mean NLL per prediction in nats; nan when no window is left."""
        kept = self.per_window[self.finite] if finite_only else self.per_window
        return float(kept.mean() / self.predictions)


@contextmanager
def evaluating(model: nn.Module, precision: ForwardPrecision = "float32") -> Iterator[None]:
    """Eval mode without gradients; the mode of every submodule is put back afterwards. bfloat16: a
    float32 model multiplies in bfloat16.

    no_grad and not inference_mode: buffers a model makes while it runs must stay usable in later
    training.
    """
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters())
    half = precision == "bfloat16" and parameter.dtype == torch.float32
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(parameter.device.type, torch.bfloat16) if half else nullcontext(),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def cut_windows(ids: Tensor, window: int, max_windows: int | None) -> Tensor:
    """int64 (tokens,) -> (w, window): consecutive, non-overlapping, remainder dropped, the first
    `max_windows` kept (None = all).
    """
    count = ids.numel() // window
    if max_windows is not None:
        count = min(count, max_windows)
    return ids[: count * window].view(count, window)


def precision_mark(precision: ForwardPrecision) -> list[str]:
    """What the precision adds to a benchmark's id: nothing for float32."""
    return [] if precision == "float32" else ["bf16"]


def window_nll(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    *,
    precision: ForwardPrecision = "float32",
    description: str = "perplexity",
) -> WindowLoss:
    """NLL in nats of every window, int64 (w, tokens), in float32, summed in float64; nothing is
    left out.

    Equivalent to w * (tokens - 1) * the loss of `model(windows, labels=windows)`, without a float32
    copy of all logits.
    """
    batches = windows.split(batch_size)  # type: ignore[no-untyped-call]
    sums: list[Tensor] = []
    with evaluating(model, precision):
        for batch in track(batches, description, len(batches)):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            sums.append(_summed_nll(logits, ids[:, 1:].to(logits.device)).cpu())
    return WindowLoss(torch.cat(sums), windows.shape[1] - 1)


def _summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (batch, positions, vocabulary), targets (batch, positions) -> (batch,) float64."""
    total = torch.zeros(len(targets), dtype=torch.float64)
    for start in range(0, targets.shape[1], CHUNK):
        part, wanted = logits[:, start : start + CHUNK], targets[:, start : start + CHUNK]
        # Sequence by sequence and flat: several at once would have to be transposed, which takes
        # another copy of their logits.
        for i, (rows, ids) in enumerate(zip(part, wanted, strict=True)):
            total[i] += F.cross_entropy(rows.float(), ids, reduction="none").double().sum().cpu()
    return total


def summarize(loss: WindowLoss, *, name: str, window: int, vocabulary: int) -> dict[str, float]:
    """The metrics of one perplexity. `ppl` is inf or nan when a window is; `collapsed` is 1 when it
    is worse than guessing uniformly.
    """
    nll = loss.mean()
    ppl = _exp(nll)
    nonfinite = int((~loss.finite).sum())
    ppl_finite = _exp(loss.mean(finite_only=True))
    if nonfinite:
        log.warning(
            "%s: NLL not finite in %d of %d windows: ppl %s, over the finite ones %.4f.",
            name,
            nonfinite,
            len(loss.finite),
            ppl,
            ppl_finite,
        )
    return {
        "ppl": ppl,
        "nll": nll,
        "ppl_finite": ppl_finite,
        "tokens": float(loss.tokens),
        "windows": float(len(loss.per_window)),
        "window": float(window),
        "nonfinite_windows": float(nonfinite),
        "collapsed": 0.0 if ppl <= vocabulary else 1.0,  # written so that nan counts as collapsed
    }


def mean_perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int) -> float:
    """Of windows of token ids, int64 (windows, length). Raises UserError for another shape; says so
    where a window's is not finite.
    """
    if (
        windows.ndim != 2
        or windows.shape[0] < 1
        or windows.shape[1] < MIN_WINDOW
        or windows.dtype != torch.int64
    ):
        raise UserError(
            "tokens must be int64 ids (windows, length) of two or more; this is"
            f" {tuple(windows.shape)} of {windows.dtype}."
        )
    vocabulary, smallest, largest = _vocabulary(model), int(windows.min()), int(windows.max())
    if smallest < 0 or largest >= vocabulary:
        raise UserError(
            f"tokens go from {smallest} to {largest}, the model's embedding has rows 0 to"
            f" {vocabulary - 1}."
        )
    found = summarize(
        window_nll(model, windows, batch_size),
        name="perplexity",
        window=windows.shape[1],
        vocabulary=vocabulary,
    )
    return found["ppl"]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # a finite NLL above 709 nats
        return math.inf


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


@configurable
class Perplexity:
    """Perplexity of a text corpus. `window` is in tokens; `max_windows` None means the
    whole text. bos: every window begins with BOS; "auto", where the model needs it.
    """

    metric: ClassVar[str] = "ppl"
    metrics: ClassVar[Mapping[str, Metric]] = METRICS
    volatile: ClassVar[bool] = False
    setting: ClassVar[str] = "benchmark.window"  # that says how long a window is
    name: str
    version: PositiveInt
    corpus: TextSource
    window: Annotated[int, Field(ge=MIN_WINDOW)]
    max_windows: PositiveInt | None
    batch_size: PositiveInt
    precision: ForwardPrecision
    bos: Bos = "auto"

    @property
    def id(self) -> str:
        """For example wikitext2@1:512x24:5d1f0c92, or wikitext2@1:512x24:bf16:bos:5d1f0c92. The
        last part is from the hash of the text: a local part of a corpus, or another Python's
        documentation, is another benchmark. Reads the text. bos=auto is in it once it is settled:
        `for_model`.
        """
        return self.protocol + self.corpus.describe()["sha256"][:8]

    @property
    def protocol(self) -> str:
        """The id without the text, up to and with its colon."""
        return ":".join(
            [
                f"{self.name}@{self.version}",
                self.shape,
                *precision_mark(self.precision),
                *(["bos"] if self.bos is True else []),
                "",
            ]
        )

    @property
    def shape(self) -> str:
        """Windows in an id: 512x24, 512xall."""
        return f"{self.window}x{self.max_windows or 'all'}"

    def for_model(self, config: PreTrainedConfig) -> "Perplexity":
        """The same, with what bos=auto means for a model."""
        return replace(self, bos=needs_bos(config)) if self.bos == "auto" else self

    def workload(self) -> list[Workload]:
        """Windows of the text."""
        tokens, sure = text_tokens(self.corpus, self.window, self.max_windows)
        return [
            Workload(
                tokens=tokens,
                length=self.window,
                batch=self.batch_size,
                sure=sure,
                half=self.precision == "bfloat16",
            )
        ]

    def validate(self, max_length: int) -> None:
        """Raises UserError when a window does not fit a context of `max_length` tokens, or the text
        cannot be had.
        """
        if self.window > max_length:
            raise UserError(
                f"{self.name}: windows of {self.window} tokens do not fit the model's context of"
                f" {max_length}: set benchmark.window to {max_length} or less."
            )
        self.corpus.describe()

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Raises UserError when the text is shorter than one window, has a token without a row in
        the embedding, or the tokenizer has no BOS where one is wanted; loads no model. A text that
        can be neither is not tokenized.
        """
        if self.bos is True:
            bos_id(tokenizer, "benchmark.bos")
        short = len(self.corpus.text()) < MOST_CHARACTERS * self.window
        if short or largest_id(tokenizer) >= rows:
            check_rows(self.windows(tokenizer), rows, tokenizer, self.name)

    def cut(self, ids: Tensor, window: int) -> Tensor:
        """(windows, window) out of a text's ids (tokens,)."""
        return cut_windows(ids, window, self.max_windows)

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """int64 ids (windows, window). Raises UserError when the text is shorter than one."""
        bos = bos_id(tokenizer, "benchmark.bos") if self.bos is True else None
        ids = tokenize(self.corpus.text(), tokenizer, bare=bos is not None)
        taken = 0 if bos is None else 1
        windows = self.cut(ids, self.window - taken)
        if len(windows) == 0:
            longest = ids.numel() + taken
            remedy = f"set {self.setting} to {longest} or less, or " * (longest >= MIN_WINDOW)
            raise UserError(
                f"{self.name}: the text has {ids.numel()} tokens, less than one window of"
                f" {self.window}: {remedy}use a longer text."
            )
        if bos is not None:
            windows = torch.cat([torch.full_like(windows[:, :1], bos), windows], dim=1)
        log.info(
            "%s: %d windows of %d tokens%s, out of %d tokens of text.",
            self.name,
            len(windows),
            self.window,
            ", each with BOS in front" if taken else "",
            ids.numel(),
        )
        return windows

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """ppl, nll (nats), ppl_finite, tokens, windows, window, nonfinite_windows, collapsed; see
        `summarize`.

        Raises UserError as `check_tokens` does.
        """
        settled = self.for_model(model.config)
        windows, vocabulary = settled.windows(tokenizer), _vocabulary(model)
        check_rows(windows, vocabulary, tokenizer, self.name)
        if self.max_windows is not None and len(windows) < self.max_windows:
            log.warning(
                "%s: the text fills %d windows of %d tokens, not the %d asked for.",
                self.name,
                len(windows),
                self.window,
                self.max_windows,
            )
        loss = window_nll(
            model, windows, self.batch_size, precision=self.precision, description=settled.id
        )
        return summarize(loss, name=self.name, window=self.window, vocabulary=vocabulary)


@configurable
class TokenFilePerplexity:
    """Perplexity of prepared token ids; every row of the file is one window. The ids must come from
    the model's own tokenizer.
    """

    metric: ClassVar[str] = "ppl"
    metrics: ClassVar[Mapping[str, Metric]] = METRICS
    volatile: ClassVar[bool] = False
    name: str
    version: PositiveInt
    path: Path
    max_windows: PositiveInt | None
    batch_size: PositiveInt
    precision: ForwardPrecision

    @property
    def id(self) -> str:
        """Names the content of the file, not its place: token_ids@1:xall:3f2a91c0. Raises UserError
        when it cannot be read.
        """
        windows = self._windows()
        content = hashlib.sha256(
            windows.numpy().tobytes() + repr(tuple(windows.shape)).encode()
        ).hexdigest()[:8]
        return self.protocol + content

    @property
    def protocol(self) -> str:
        """The id without the content, up to and with its colon."""
        return ":".join(
            [
                f"{self.name}@{self.version}",
                f"x{self.max_windows or 'all'}",
                *precision_mark(self.precision),
                "",
            ]
        )

    def workload(self) -> list[Workload]:
        """Rows of the file."""
        rows, length = self._windows()[: self.max_windows].shape
        half = self.precision == "bfloat16"
        return [
            Workload(tokens=rows * length, length=length, batch=self.batch_size, sure="", half=half)
        ]

    def validate(self, max_length: int) -> None:
        """Raises UserError when the file cannot be read or its rows do not fit a context of
        `max_length` tokens.
        """
        length = self._windows().shape[1]
        if length > max_length:
            raise UserError(
                f"{self.path}: rows of {length} tokens do not fit the model's context of"
                f" {max_length}: write shorter rows or choose another model."
            )
        if length < MIN_WINDOW:
            raise UserError(
                f"{self.path}: rows of {length} token leave nothing to predict: write rows of"
                f" {MIN_WINDOW} or more."
            )

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Raises UserError for ids without a row in the embedding; loads no model."""
        check_vocabulary(self._windows()[: self.max_windows], rows, self.path)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """The metrics of `Perplexity`. Raises UserError for ids outside the model's vocabulary."""
        windows, vocabulary = self._windows()[: self.max_windows], _vocabulary(model)
        check_vocabulary(windows, vocabulary, self.path)
        if needs_bos(model.config) and (bare := without_bos(windows, tokenizer)):
            log.warning(
                "%s: %d of %d rows do not begin with BOS, which this model needs.",
                self.id,
                bare,
                len(windows),
            )
        loss = window_nll(
            model, windows, self.batch_size, precision=self.precision, description=self.id
        )
        return summarize(loss, name=self.name, window=windows.shape[1], vocabulary=vocabulary)

    def _windows(self) -> Tensor:
        return read_token_ids(self.path)
