"""lm-eval tasks on local files: against hand-computed log-likelihoods, on all seven tasks, and what
a user is told.
"""

import json
import logging
import math
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specomp.errors import UserError
from specomp.evaluation import harness
from specomp.evaluation.harness import HarnessTask, localize

DATA = Path(os.environ.get("SPECOMP_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (DATA / "piqa").is_dir(),
    reason="no evaluation data: set SPECOMP_DATA to a folder that holds it",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets bring their own


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token = byte; 0 is the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {symbol: index for index, symbol in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 20  # random, but with opinions, so that options differ clearly
    return model


def make(task: str, **changes: Any) -> HarnessTask:
    settings: dict[str, Any] = {
        "version": 1,
        "num_fewshot": None,
        "limit": 4,
        "batch_size": 4,
        "data_root": DATA,
        "metric": "acc",
    }
    settings["precision"] = "float32"
    return HarnessTask(task=task, **settings | changes)


def option_logprob(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, option: str
) -> float:
    read, answer = tokenizer(context).input_ids, tokenizer(option).input_ids
    ids = torch.tensor([read + answer])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)
    return sum(logprobs[0, len(read) + i - 1, token].item() for i, token in enumerate(answer))


@needs_data
def test_piqa_equals_hand_computed_options(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = make("piqa", limit=20)(model.train(), tokenizer)
    with (DATA / "piqa" / "validation.jsonl").open(encoding="utf-8") as lines:
        documents = [json.loads(next(lines)) for _ in range(20)]
    right = right_norm = 0
    model.eval()
    for document in documents:
        options = [document["sol1"], document["sol2"]]
        scores = [
            option_logprob(model, tokenizer, f"Question: {document['goal']}\nAnswer:", f" {option}")
            for option in options
        ]
        by_length = [score / len(option) for score, option in zip(scores, options, strict=True)]
        right += scores.index(max(scores)) == document["label"]
        right_norm += by_length.index(max(by_length)) == document["label"]
    assert (result["acc"], result["acc_norm"], result["n"]) == (right / 20, right_norm / 20, 20)
    assert result["acc_stderr"] == pytest.approx(
        math.sqrt(result["acc"] * (1 - result["acc"]) / 19)
    )
    assert tokenizer.pad_token is None, "the tokenizer must come back as it was"


@needs_data
@pytest.mark.parametrize("task", list(harness.STOCK_FILES))
def test_tasks_run_on_local_files_without_network(
    task: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    benchmark = make(task)
    benchmark.validate(2048)
    capfd.readouterr()
    result = benchmark(model.train(), tokenizer)
    assert result["n"] == 4 and 0 <= result["acc"] <= 1
    assert ("acc_norm" in result) == (task != "winogrande")
    assert (result["nonfinite_requests"], result["truncated_requests"]) == (0, 0)
    assert model.training
    assert capfd.readouterr().out == ""


@needs_data
def test_mmlu_is_the_average_over_documents(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = make("mmlu", limit=1, batch_size=16)(model, tokenizer)
    assert result["n"] == 57
    assert round(result["acc"] * 57, 6).is_integer()


@needs_data
def test_mmlu_takes_examples_from_dev(tokenizer: PreTrainedTokenizerFast) -> None:
    specification = make("mmlu", num_fewshot=5)._specification()
    assert specification is not None and len(specification) == 57
    anatomy = next(config for config in specification if config["task"] == "mmlu_anatomy")
    assert (
        set(anatomy["dataset_kwargs"]["data_files"]) == {"dev", "test"}
        and anatomy["fewshot_split"] == "dev"
    )


@needs_data
def test_a_model_of_nan_is_counted(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model.lm_head.weight.data.fill_(math.nan)
    result = make("piqa")(model, tokenizer)
    assert result["nonfinite_requests"] == 8
    assert "of 8 requests 8 had a non-finite log-likelihood" in caplog.text


@needs_data
def test_cut_prompts_are_counted(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model.config.max_position_embeddings = 200
    assert make("hellaswag", limit=20)(model, tokenizer)["truncated_requests"] > 0
    model.config.max_position_embeddings = 16
    with pytest.raises(UserError, match="does not fit the model's context of 16"):
        make("piqa")(model, tokenizer)


STOCK = {
    "task": "t",
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "dataset_path": "x/y",
    "doc_to_text": "q",
}


def test_localize_keeps_the_evaluated_split() -> None:
    files = {"validation": Path("/d/validation.jsonl"), "test": Path("/d/test.jsonl")}
    local = localize(STOCK, files, Path("/d"), 0)
    assert (local["training_split"], local["validation_split"], local["test_split"]) == (
        None,
        "validation",
        "test",
    )
    assert local["dataset_kwargs"] == {
        "data_files": {"validation": "/d/validation.jsonl", "test": "/d/test.jsonl"}
    }
    assert (local["dataset_path"], local["dataset_name"], local["doc_to_text"]) == (
        "json",
        None,
        "q",
    )
    with pytest.raises(UserError, match=r"t: no test\.jsonl under /d \(splits found: validation"):
        localize(STOCK, {"validation": Path("/d/validation.jsonl")}, Path("/d"), 0)
    with pytest.raises(
        UserError, match=r"no train\.jsonl under /d .*; 3 few-shot examples asked for\)"
    ):
        localize(STOCK, files, Path("/d"), 3)


def test_missing_files_and_unknown_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"piqa: no validation\.jsonl under .*piqa \(splits found: none"
    ):
        make("piqa", data_root=tmp_path).validate(2048)
    with pytest.raises(UserError, match=r"mmlu_abstract_algebra: no test\.jsonl"):
        make("mmlu", data_root=tmp_path).validate(2048)
    with pytest.raises(
        UserError,
        match="boolq: only piqa, .*mmlu can be read from a data root .*: set data_root=null",
    ):
        make("boolq", data_root=tmp_path).validate(2048)
    make("piqa", data_root=None).validate(2048)  # known without the index

    manager = type("Manager", (), {"all_tasks": ["boolq", "copa"]})()
    monkeypatch.setattr(harness, "_full_manager", lambda: manager)
    make("boolq", data_root=None).validate(2048)
    with pytest.raises(UserError, match=r"knows no task boolk \(close names: boolq\)"):
        make("boolk", data_root=None).validate(2048)


def test_unreachable_data_is_one_line(
    monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"piqa: cannot load its data \(Couldn't reach the hub\): check the network"
    ):
        make("piqa", data_root=None)(model, tokenizer)
    assert logging.getLogger("lm_eval").level != logging.ERROR


@needs_data
def test_a_metric_the_task_lacks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        UserError, match=r"winogrande has no metric acc_norm: set metric to one of acc\."
    ):
        make("winogrande", metric="acc_norm").validate(2048)
    with pytest.raises(
        UserError, match="winogrande has no metric acc_norm: set metric to one of acc, "
    ):
        make("winogrande", metric="acc_norm")(model, tokenizer)


def test_identity() -> None:
    assert make("piqa", limit=None).id == "piqa@1"
    assert make("mmlu", num_fewshot=5, limit=100).id == "mmlu@1:5shot:limit2each"


def test_requests_of_one_context_stay_together() -> None:
    requests = [SimpleNamespace(args=(context, option)) for context in "abcde" for option in "xyz"]
    chunks = harness._chunks(requests, 4)
    assert [len(chunk) for chunk in chunks] == [6, 6, 3]
    assert [request for chunk in chunks for request in chunk] == requests
