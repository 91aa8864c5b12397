"""Throughput is positive, complete, and measured on the whole budget."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specomp.errors import UserError
from specomp.evaluation import efficiency
from specomp.evaluation.efficiency import Efficiency, measure_efficiency, model_bytes


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def make(**changes: Any) -> Efficiency:
    settings: dict[str, Any] = {
        "version": 1,
        "batch_sizes": (1, 3),
        "prompt_tokens": 8,
        "new_tokens": 4,
        "repeats": 2,
        "seed": 0,
        "fuse": False,
        "compile": None,
    }
    return Efficiency(**settings | changes)


def test_keys_and_values() -> None:
    model = tiny().train()
    result = make()(model, None)  # type: ignore[arg-type]
    speeds = {
        f"{stage}_tokens_per_s_bs{size}" for stage in ("prefill", "decode") for size in (1, 3)
    }
    assert set(result) == speeds | {"model_bytes", "process_peak_rss_bytes"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert model.training


def test_every_run_is_one_prefill_and_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = tiny(), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    clock = iter(range(100))
    monkeypatch.setattr(
        efficiency.time, "perf_counter", lambda: float(next(clock))
    )  # one second between any two readings
    result = measure_efficiency(
        model, batch_sizes=[2], prompt_tokens=5, new_tokens=3, repeats=2, seed=0
    )
    assert lengths == ([(2, 5)] + [(2, 1)] * 3) * 3  # one warm-up, two repeats
    assert (result["prefill_tokens_per_s_bs2"], result["decode_tokens_per_s_bs2"]) == (2 * 5, 2 * 3)


def test_cached_steps_are_the_greedy_continuation() -> None:
    model, fed = tiny().eval(), []
    prompt = torch.randint(64, (1, 6), generator=torch.Generator().manual_seed(3))
    model.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        efficiency._prefill_and_decode(model, prompt, 5)
        steps = torch.cat(fed[1:], dim=1)
        expected = model.generate(
            prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )[:, 6:]
    assert torch.equal(steps, expected)


def test_tied_weights_count_once() -> None:
    tied, untied = tiny(tie_word_embeddings=True), tiny(tie_word_embeddings=False)
    assert model_bytes(untied) - model_bytes(tied) == 64 * 32 * 4


def test_identity_and_messages() -> None:
    assert make().id == "efficiency@1:8+4:bs1+3"
    make().validate(12)
    with pytest.raises(
        UserError,
        match=r"8 prompt \+ 4 new tokens do not fit the model's context of 11: lower prompt_tokens",
    ):
        make().validate(11)


def test_out_of_memory_names_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(efficiency, "_prefill_and_decode", full)
    with pytest.raises(UserError, match="out of GPU memory at batch size 1 with 8"):
        make()(tiny(), None)  # type: ignore[arg-type]
