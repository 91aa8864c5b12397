"""Greedy text of a model, a step at a time."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt. ids: up to the token that ends a text, without it; finite:
    whether every logit that it was chosen by is a number.
    """

    ids: list[int]
    finite: bool


def greedy(model: PreTrainedModel, prompts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The most likely token (batch, 1) after int64 ids (batch, tokens) and its logit, then those of
    the one after it, and so on without an end.

    A loop of our own and not `generate`, whose stop tokens and settings belong to a model: here the
    same steps are run for all.
    """
    # only the last position's logits are needed; models that cannot skip the others compute them
    parameters = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    output = model(input_ids=prompts, use_cache=True, **last_only)
    while True:
        logit, token = output.logits[:, -1:].max(-1)
        yield token, logit
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int
) -> list[Written]:
    """What follows each of int64 ids (batch, tokens)."""
    steps = islice(greedy(model, prompts.to(model.device)), new_tokens)
    tokens, logits = zip(*steps, strict=True)
    stops = stops_of(model, tokenizer)
    found = []
    for ids, chosen in zip(torch.cat(tokens, 1).tolist(), torch.cat(logits, 1).cpu(), strict=True):
        end = next((i for i, x in enumerate(ids) if x in stops), len(ids))
        found.append(Written(ids[:end], bool(chosen[: end + 1].isfinite().all())))
    return found


def stops_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: of the model's generation settings, its config and its
    tokenizer.
    """
    settings = [model.generation_config, model.config.get_text_config(), tokenizer]
    stated = [getattr(x, "eos_token_id", None) for x in settings]
    flat = (y for x in stated for y in (x if isinstance(x, list) else [x]))
    return {int(x) for x in flat if x is not None}
