"""A model in memory as lm-eval's language model."""

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.data.token_ids import check_rows
from specomp.errors import UserError
from specomp.evaluation.definitions import quiet
from specomp.models.families import family_of
from specomp.progress import track

# requests are sorted by length within a chunk; progress is reported between chunks
BATCHES_PER_CHUNK = 32
WRITTEN_PER_CHUNK = 4  # the same of requests whose answers are written, which take longer
# Of requests that begin alike: characters by which they are told, tokens that are worth it.
SHARED_CHARACTERS, SHARED_TOKENS = 1000, 64
ANSWER_TOKENS = 256  # lm-eval's number where a definition names none


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, description: str
) -> Any:
    """HFLM around the model, with progress, and counts of what lm-eval would pass over."""
    from lm_eval.models.huggingface import HFLM

    decoder = family_of(model.config).decoder(model)
    streamed = any(x.is_meta for x in model.parameters())  # a second run would load it again

    class CountingLM(HFLM):  # type: ignore[misc]
        nonfinite = truncated = total = 0
        unread = 0  # tokens at the beginning of every request after which no answer is read

        def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            # Logits of what follows the beginning that all rows share, which is run once: HFLM
            # counts positions from the end, since a model may have fewer.
            same = (inps == inps[:1]).all(0).long().cumprod(0).sum()
            shared = min(int(same), self.unread)
            if len(inps) == 1 or shared < SHARED_TOKENS or streamed:
                logits: torch.Tensor = super()._model_call(inps)
                return logits
            cache = decoder(input_ids=inps[:1, :shared], use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(inps))
            found = self.model(inps[:, shared:], past_key_values=cache, use_cache=True).logits
            return cast(torch.Tensor, found)

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            chunks = chunked(requests, BATCHES_PER_CHUNK * batch_size)
            answers: list[tuple[float, bool]] = []
            for chunk in track(chunks, description, len(chunks)):
                answers += super().loglikelihood(chunk, disable_tqdm=True)
            return answers

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[float]:
            chunks = chunked(requests, batch_size)  # whole texts, many windows each
            answers: list[float] = []
            for chunk in track(chunks, description, len(chunks)):
                answers += super().loglikelihood_rolling(chunk, disable_tqdm=True)
            return answers

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            for context, options in (x.args for x in requests):
                room = check_room(description, options, self.max_length)
                self.truncated += len(self.tok_encode(context)) > room
            self.total += len(requests)
            chunks = chunked(requests, WRITTEN_PER_CHUNK * batch_size)
            answers: list[str] = []
            for chunk in track(chunks, description, len(chunks)):
                answers += super().generate_until(chunk, disable_tqdm=True)
            return answers

        def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
            broken = torch.zeros(len(context), dtype=torch.bool, device=context.device)

            def watch(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                # the largest is the one chosen; others may be -inf
                broken.logical_or_(~logits.amax(-1).isfinite())
                return logits

            written: torch.Tensor = super()._model_generate(
                context=context, logits_processor=[watch], **options
            )
            self.nonfinite += int(broken.sum())
            return written

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **options: Any
        ) -> list[tuple[float, bool]]:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise UserError(
                    f"{description}: an answer of {longest} tokens does not fit the model's context"
                    f" of {self.max_length}: take this task out of the benchmark."
                )
            # of what is left of a context in the model's own; its last token gives the first answer
            room = self.max_length + 1
            self.unread = min((min(len(x), room - len(y)) for _, x, y in requests), default=1) - 1
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, **options | {"disable_tqdm": True}
            )
            self.total += len(answers)
            self.truncated += sum(
                len(context) + len(continuation) > self.max_length + 1
                for _, context, continuation in requests
            )
            self.nonfinite += sum(not math.isfinite(logprob) for logprob, _ in answers)
            return answers

    # a copy, because a padding token is given to it: HFLM's own choice may have no row. What is
    # padded is masked, so any token will do.
    padded = copy.deepcopy(tokenizer)
    rows = model.config.get_text_config().vocab_size
    if padded.pad_token_id is None or padded.pad_token_id >= rows:
        usable = padded.eos_token_id is not None and padded.eos_token_id < rows
        padded.pad_token = padded.eos_token if usable else padded.convert_ids_to_tokens(0)
    with quiet():  # that the model is in memory already is meant
        return CountingLM(pretrained=model, tokenizer=padded, batch_size=batch_size)


def rehearsal(tokenizer: PreTrainedTokenizerBase, rows: int, description: str) -> Any:
    """A language model of lm-eval's that answers nothing, and only checks the tokens of what it is
    asked.
    """
    from lm_eval.api.model import LM

    class Rehearsal(LM):  # type: ignore[misc]
        tokenizer_name = ""  # of lm-eval's cache of requests, which is not used

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(self._checked(*x.args), False) for x in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [self._checked(x.args[0]) for x in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.loglikelihood_rolling(requests)
            return [""] * len(requests)

        def _checked(self, context: str, continuation: str = "") -> float:
            # lm-eval tokenizes both
            for text in {context, context + continuation}:
                check_rows(torch.tensor(tokenizer.encode(text)), rows, tokenizer, description)
            return 0.0

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return Rehearsal()


def chunked(requests: Sequence[Any], size: int) -> list[list[Any]]:
    """At least `size` requests each; those with one context stay together, since lm-eval answers
    them with one forward, and those of several that begin alike (with the same examples) apart from
    others, since that is run once.
    """
    chunks: list[list[Any]] = []
    alike = False
    for _, run in groupby(requests, lambda x: x.args[0][:SHARED_CHARACTERS]):
        members, before = list(run), alike
        alike = (
            len({x.args[0] for x in members}) > 1 and len(members[0].args[0]) > SHARED_CHARACTERS
        )
        if not chunks or alike or before:
            chunks.append([])
        for request in members:
            last = chunks[-1]
            if len(last) >= size and last[-1].args[0] != request.args[0]:
                chunks.append([])
            chunks[-1].append(request)
    return chunks


def check_room(description: str, options: Mapping[str, Any], max_length: int) -> int:
    """The most tokens of a prompt beside an answer. Raises UserError where there is none."""
    answer = _answer_tokens(options)
    if answer >= max_length:
        raise UserError(
            f"{description}: answers of up to {answer} tokens leave no room for a prompt in the"
            f" model's context of {max_length}: take this task out of the benchmark."
        )
    return max_length - answer


def _answer_tokens(options: Mapping[str, Any]) -> int:
    """The most that are written."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(dict(options), ANSWER_TOKENS)["max_gen_toks"])
