"""How far a compressed model's predictions are from the dense model's, which perplexity hides.

kl          mean over tokens of KL(dense || compressed) of the next token, in nats
agreement   share of tokens at which both have the same most likely next token

Over the windows of a text, every position of which counts. Asked for in llama.cpp's terms (KL
divergence, same top token); "Accuracy is not all you need" (arXiv:2407.09141) says why. The dense
model's last hidden states are computed once and cached: times the head, which no method changes,
they are its logits.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import SkipValidation
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.cache import Cache, checksum, digest, waiting
from specomp.errors import UserError
from specomp.evaluation.metric import SHARE, Metric
from specomp.evaluation.perplexity import CHUNK, Perplexity, evaluating
from specomp.models.families import family_of
from specomp.progress import track
from specomp.settings import configurable
from specomp.training.teacher import keep_states, part_name, soft_capped

log = logging.getLogger(__name__)
VERSION = 1  # of what is cached


@dataclass(frozen=True)
class DenseModel:
    """Which one a compressed model came from, and where its states are kept."""

    cache: Cache
    key: str


@runtime_checkable
class ComparesDense(Protocol):
    """A benchmark that has to see the dense model before it is compressed."""

    def beside(self, dense: DenseModel) -> "ComparesDense":
        """The same, for models that come from this one."""

    def remembers(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether it has what it needs of the dense model."""

    def remember(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take it, unless it has it."""


@configurable
class Divergence(Perplexity):
    """Windows of a text as in `Perplexity`; `dense` is known to an experiment."""

    metric: ClassVar[str] = "kl"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl": Metric("nats", "lower"),
        "agreement": Metric(SHARE, "higher", column=True),
        "nonfinite_windows": Metric("windows", "lower"),
    }
    dense: SkipValidation[DenseModel | None] = None

    def beside(self, dense: DenseModel) -> "Divergence":
        """See ComparesDense."""
        return replace(self, dense=dense)

    def remembers(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """See ComparesDense."""
        return self._has(self.windows(tokenizer))

    def remember(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """See ComparesDense."""
        dense, windows = self._dense(), self.windows(tokenizer)
        entry = "dense", self._key(windows)
        with waiting(dense.cache.lock(*entry), "runs the dense model"):
            if self._has(windows):
                return
            batches = windows.split(self.batch_size)  # type: ignore[no-untyped-call]
            with evaluating(model, self.precision):
                told = track(batches, f"dense model: {self.name}", len(batches))
                keep_states(dense.cache, entry, model, told)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """kl, agreement, tokens, windows, window, nonfinite_windows. Raises UserError where the
        dense model's states are not in the cache.
        """
        windows = self.windows(tokenizer)
        decoder = family_of(model.config).decoder(model)
        found: list[tuple[float, float]] = []
        batches = windows.split(self.batch_size)  # type: ignore[no-untyped-call]
        with evaluating(model, self.precision):
            head = partial(logits_of, model)
            for batch in track(batches, self.id, len(batches)):
                ids = batch.to(model.device)
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
                for own in hidden:
                    states = self._states(windows, len(found))
                    if states is None:
                        raise UserError(
                            f"{self.id}: the dense model's states are not in the cache: run the"
                            " same command again."
                        )
                    found.append(compared(head, states.to(own.device), own))
        kl, same = torch.tensor(found, dtype=torch.float64).unbind(1)
        if nonfinite := int((~kl.isfinite()).sum()):
            log.warning("%s: KL not finite in %d of %d windows.", self.id, nonfinite, len(windows))
        return {
            "kl": float(kl.sum() / windows.numel()),
            "agreement": float(same.sum() / windows.numel()),
            "tokens": float(windows.numel()),
            "windows": float(len(windows)),
            "window": float(self.window),
            "nonfinite_windows": float(nonfinite),
        }

    def _dense(self) -> DenseModel:
        if self.dense is None:
            raise UserError(
                f"{self.name}: which dense model it is compared with only an experiment knows:"
                " python run.py benchmark=divergence."
            )
        return self.dense

    def _key(self, windows: Tensor) -> str:
        read = [self.precision, checksum({"windows": windows}), torch.__version__]
        return digest({"version": VERSION, "model": self._dense().key, "read": read})

    def _has(self, windows: Tensor) -> bool:
        dense, key = self._dense(), self._key(windows)
        return all(dense.cache.has("dense", key, part_name(i)) for i in range(len(windows)))

    def _states(self, windows: Tensor, index: int) -> Tensor | None:
        """(window, hidden) of the dense model, None where they are not in the cache."""
        stored = self._dense().cache.load("dense", self._key(windows), part_name(index))
        return None if stored is None else stored["hidden"]


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(tokens, vocabulary) in float32 of last hidden states (tokens, hidden), by the model's own
    head, wherever that is; with the soft cap of the families that have one.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return soft_capped(model.config, head(hidden).float())


def compared(head: Callable[[Tensor], Tensor], dense: Tensor, own: Tensor) -> tuple[float, float]:
    """Sums over tokens, of KL in nats and of equal most likely tokens, for hidden states (tokens,
    hidden) of both models.
    """
    kl = same = 0.0
    for part in range(0, len(own), CHUNK):
        wanted, got = (torch.log_softmax(head(x[part : part + CHUNK]), -1) for x in (dense, own))
        share = wanted.exp()
        # what the dense model never says counts nothing, though its logarithm is infinite
        kl += float(torch.where(share == 0, 0.0, share * (wanted - got)).sum(dtype=torch.float64))
        numbers = ~(wanted.isnan().any(-1) | got.isnan().any(-1))
        same += float((numbers & (wanted.argmax(-1) == got.argmax(-1))).sum())
    return kl, same
