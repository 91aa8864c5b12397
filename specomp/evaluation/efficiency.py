"""Speed and memory of a model as it is: prefill and decode throughput with a key-value cache, peak
memory, bytes.
"""

import logging
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.errors import UserError
from specomp.evaluation.greedy import greedy
from specomp.evaluation.metric import Metric
from specomp.evaluation.perplexity import evaluating
from specomp.evaluation.workload import Workload
from specomp.models.fuse import fused
from specomp.progress import track
from specomp.settings import configurable

log = logging.getLogger(__name__)


def measure_efficiency(
    model: PreTrainedModel,
    *,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    seed: int,
) -> dict[str, float]:
    """Medians over `repeats` after one warm-up, on random prompts.

    Keys: `prefill_tokens_per_s_bs<B>`, `decode_tokens_per_s_bs<B>`, on a GPU also
    `peak_memory_bytes_bs<B>` (allocated by torch while that batch size ran); once: `model_bytes`
    (parameters and buffers, shared ones counted once), `process_peak_rss_bytes` (the largest
    resident size of this process so far, whatever caused it). Raises UserError when a batch size
    does not fit the GPU.
    """
    on_gpu = model.device.type == "cuda"
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    result: dict[str, float] = {"model_bytes": float(model_bytes(model))}
    with evaluating(model):
        for batch_size in batch_sizes:
            prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(
                model.device
            )
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(model.device)
            try:
                runs = track(
                    range(1 + repeats),
                    f"efficiency, batch size {batch_size}",
                    1 + repeats,
                    traced=False,
                )
                seconds = [_prefill_and_decode(model, prompt, new_tokens) for _ in runs][1:]
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"Efficiency: out of GPU memory at batch size {batch_size} with {prompt_tokens}"
                    f" + {new_tokens} tokens: lower batch_sizes or prompt_tokens of the efficiency"
                    " benchmark."
                ) from error
            prefill, decode = (statistics.median(column) for column in zip(*seconds, strict=True))
            result[f"prefill_tokens_per_s_bs{batch_size}"] = batch_size * prompt_tokens / prefill
            result[f"decode_tokens_per_s_bs{batch_size}"] = batch_size * new_tokens / decode
            if on_gpu:
                result[f"peak_memory_bytes_bs{batch_size}"] = float(
                    torch.cuda.max_memory_allocated(model.device)
                )
    result["process_peak_rss_bytes"] = float(_process_peak_rss())
    return result


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]
    )


def _prefill_and_decode(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int
) -> tuple[float, float]:
    """Seconds of the forward over prompt (batch, tokens), and of `new_tokens` greedy steps after
    it.
    """
    steps = greedy(model, prompt)
    start = now(prompt.device)
    next(steps)
    prefilled = now(prompt.device)
    for _ in range(new_tokens):
        next(steps)
    return prefilled - start, now(prompt.device) - prefilled


def now(device: torch.device) -> float:
    """Seconds on a clock, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _process_peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@configurable
class Efficiency:
    """`measure_efficiency` as a benchmark. Its numbers belong to the machine that measured them."""

    volatile: ClassVar[bool] = (
        True  # depends on the machine at that moment: dense and compressed are timed in one run
    )
    version: PositiveInt
    batch_sizes: tuple[PositiveInt, ...]
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt
    repeats: PositiveInt
    seed: int
    fuse: bool
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None

    @property
    def id(self) -> str:
        """For example efficiency@1:128+16:bs1+4 (prompt + new tokens, batch sizes)."""
        sizes = "+".join(map(str, self.batch_sizes))
        made = ":fused" if self.fuse else ""
        made += f":compiled={self.compile}" if self.compile else ""
        tokens = f"{self.prompt_tokens}+{self.new_tokens}"
        return f"efficiency@{self.version}:{tokens}:bs{sizes}{made}"

    @property
    def protocol(self) -> str:
        """The id: it depends on no text."""
        return self.id

    @property
    def metric(self) -> str:
        """Decoding at the first batch size."""
        return f"decode_tokens_per_s_bs{self.batch_sizes[0]}"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Tokens a second, by batch size."""
        names = (
            f"{what}_tokens_per_s_bs{batch}"
            for batch in self.batch_sizes
            for what in ("prefill", "decode")
        )
        return dict.fromkeys(names, Metric("tokens/s", "higher"))

    def workload(self) -> list[Workload]:
        """One for each batch size."""
        runs, steps, prompt = 1 + self.repeats, self.new_tokens, self.prompt_tokens
        tokens = runs * (prompt + steps)
        return [
            Workload(tokens=b * tokens, length=prompt, batch=b, sure="", decoded=runs * steps)
            for b in self.batch_sizes
        ]

    def validate(self, max_length: int) -> None:
        """Raises UserError when prompt and new tokens exceed a context of `max_length` tokens."""
        if self.prompt_tokens + self.new_tokens > max_length:
            raise UserError(
                f"Efficiency: {self.prompt_tokens} prompt + {self.new_tokens} new tokens do not fit"
                f" the model's context of {max_length}: lower prompt_tokens or new_tokens of the"
                " efficiency benchmark."
            )

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """See `measure_efficiency`; the tokenizer is not used."""
        log.info(
            "Efficiency: %s, %s, %d threads.", model.device, model.dtype, torch.get_num_threads()
        )
        with fused(model) if self.fuse else nullcontext(0) as sites, compiled(model, self.compile):
            if self.fuse:
                log.info("Efficiency: first factors stacked at %d sites.", sites)
            return measure_efficiency(
                model,
                batch_sizes=self.batch_sizes,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                repeats=self.repeats,
                seed=self.seed,
            )


@contextmanager
def compiled(model: PreTrainedModel, mode: str | None) -> Iterator[None]:
    """While it is open the model runs as torch.compile makes it; reduce-overhead and max-autotune
    capture CUDA graphs on a GPU.
    """
    if mode is None:
        yield
        return
    try:
        vars(model)["forward"] = torch.compile(model.forward, mode=mode)
        yield
    finally:
        vars(model).pop("forward", None)
        torch.compiler.reset()
