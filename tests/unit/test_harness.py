"""lm-eval tasks on local files: against hand-computed log-likelihoods, on the seven tasks of the
papers, and what a user is told.
"""

import gzip
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
from tiny import FAMILY_NAMES, bare_tokenizer, tiny_model
from tokenizers import processors
from transformers import (
    AutoConfig,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from specomp.errors import UserError
from specomp.evaluation import definitions, harness, language_model, task_data
from specomp.evaluation.harness import HarnessTask
from specomp.evaluation.task_data import localize

DATA = Path(os.environ.get("SPECOMP_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (DATA / "piqa").is_dir(),
    reason="no evaluation data: set SPECOMP_DATA to a folder that holds it",
)
# Those whose published data is known.
PAPERS = [name for name, known in harness.KNOWN.items() if known.published]
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets bring their own


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token = byte; 0 is the end token."""
    return bare_tokenizer()


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
@pytest.mark.parametrize("task", [name for name in PAPERS if name != "mmlu"])
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
        match="squadv2: only piqa, .*mmlu, .* can be read from a data root .*: set data_root=null",
    ):
        make("squadv2", data_root=tmp_path).validate(2048)
    make("piqa", data_root=None).validate(2048)  # known without the index

    manager = type("Manager", (), {"all_tasks": ["squadv2", "drop"]})()
    monkeypatch.setattr(definitions, "full_manager", lambda: manager)
    make("squadv2", data_root=None).validate(2048)
    with pytest.raises(UserError, match=r"knows no task squadv3 \(close names: squadv2\)"):
        make("squadv3", data_root=None).validate(2048)


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


PIQA = [
    {"goal": f"To do {n}", "sol1": f"do {n}", "sol2": f"leave {n}", "label": n % 2}
    for n in range(4)
]


def own(root: Path, rows: list[Any], name: str = "piqa/validation.jsonl", **changes: Any) -> Any:
    """A task on rows of one's own."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return make(name.partition("/")[0], data_root=root, limit=None, **changes)


def test_two_sets_of_data_never_share_an_id(tmp_path: Path) -> None:
    """What prompts and scores are made of decides, not where or how it is stored."""
    first = own(tmp_path / "a", PIQA).id
    assert first.startswith("piqa@1:") and len(first) == len("piqa@1:") + 8
    for name, rows in {
        "places": PIQA,
        "order": [dict(reversed(row.items())) for row in PIQA],
        "columns": [{**row, "id": 7} for row in PIQA],
    }.items():
        assert own(tmp_path / name, rows).id == first
    assert own(tmp_path / "gz", PIQA, "piqa/validation.jsonl.gz").id == first
    others = {
        own(tmp_path / name, rows).id
        for name, rows in {
            "label": [{**PIQA[0], "label": 1}, *PIQA[1:]],
            "fewer": PIQA[:3],
            "turned": PIQA[::-1],
            "goal": [{**PIQA[0], "goal": "To do"}, *PIQA[1:]],
        }.items()
    }
    assert len(others | {first, "piqa@1"}) == 6
    task = own(tmp_path / "changed", PIQA)
    assert task.protocol == task.id == first
    own(tmp_path / "changed", PIQA[:2])  # the same file, written anew
    assert task.id != first


def test_examples_are_a_part_of_the_data(tmp_path: Path) -> None:
    own(tmp_path, PIQA)
    examples = own(tmp_path, PIQA, "piqa/train.jsonl", num_fewshot=2)
    before = examples.id
    assert before.startswith("piqa@1:2shot:")
    plain = make("piqa", data_root=tmp_path).id
    own(tmp_path, PIQA[:3], "piqa/train.jsonl")
    assert examples.id != before and make("piqa", data_root=tmp_path).id == plain


def test_the_published_data_has_the_plain_id(tmp_path: Path) -> None:
    """Here as from the hub, and where there is nothing to read."""
    for task in harness.KNOWN:
        plain = make(task, data_root=None).id
        assert ":" not in plain.removesuffix(":limit4").removesuffix(":limit1each")
        assert make(task, data_root=tmp_path).id == make(task, data_root=None).id


@needs_data
def test_the_published_data_is_known() -> None:
    for task in PAPERS:
        assert make(task).id == make(task, data_root=None).id
    shots = make("mmlu", num_fewshot=5)
    assert shots.id == make("mmlu", num_fewshot=5, data_root=None).id == "mmlu@1:5shot:limit1each"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"goal": "a", "sol1": "b", "sol2": "c"}, "line 5: no 'label'; every row needs goal, sol1"),
        ({**PIQA[0], "sol2": None}, "line 5: no 'sol2'; every row needs"),
        ({**PIQA[0], "goal": ["a"]}, "line 5: 'goal' is a list, in the first row a str; every"),
        ({**PIQA[0], "label": "1"}, "line 5: 'label' is a str, in the first row a int"),
        ("[1]", "line 5: no 'goal'; every row needs"),
        ("{oops", "line 5: not JSON"),
    ],
)
def test_rows_that_are_no_documents(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        own(tmp_path, [*PIQA, row]).validate(2048)
    assert "validation.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.jsonl is empty; every row is a document"):
        own(tmp_path, []).validate(2048)
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    path = tmp_path / "piqa" / "validation.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PIQA[0]).encode())[:-9])
    with pytest.raises(UserError, match=r"validation\.jsonl\.gz is not a whole gzip file"):
        make("piqa", data_root=tmp_path).validate(2048)


def test_rows_that_make_no_requests_are_found_before_any_work(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = own(tmp_path, PIQA)
    task.validate(2048)
    task.check_tokens(tokenizer, 257)
    good = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}}
    arc = own(tmp_path, [{**good, "answerKey": "A"}], "arc_easy/test.jsonl")
    arc.check_tokens(tokenizer, 257)
    arc = own(tmp_path, [{**good, "answerKey": "E"}], "arc_easy/test.jsonl")
    arc.validate(2048)
    with pytest.raises(
        UserError, match="arc_easy: .*'E' is not in list.*check the files in"
    ) as caught:
        arc.check_tokens(tokenizer, 257)
    assert "\n" not in str(caught.value)
    short = own(tmp_path, [{**good, "choices": ["b"], "answerKey": "A"}], "arc_easy/test.jsonl")
    short.validate(2048)
    with pytest.raises(UserError, match="arc_easy: ") as caught:
        short.check_tokens(tokenizer, 257)
    assert "network" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [2, -1])
def test_answers_that_are_no_choice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, label: int
) -> None:
    task = own(tmp_path, [*PIQA, {**PIQA[0], "label": label}])
    with pytest.raises(UserError, match=f"piqa: the answer of row 5 in .* is {label}, which is"):
        task.check_tokens(tokenizer, 257)


@needs_data
@pytest.mark.parametrize("task", PAPERS)
def test_cut_copies_of_the_published_data_are_fit(
    task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Their first rows under another id, with all that is checked of local data."""
    known = harness.KNOWN[task]
    for path in task_data.split_files(DATA, task, known.evaluated):
        copy = tmp_path / path.relative_to(DATA)
        copy.parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as lines, opened(copy, "wb") as written:
            written.writelines(line for line, _ in zip(lines, range(3), strict=False))
    benchmark = make(task, data_root=tmp_path)
    assert benchmark.id != make(task).id
    benchmark.validate(2048)
    benchmark.check_tokens(tokenizer, 257)


def test_a_tokenizer_with_nothing_to_begin_with(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="piqa: a request begins with BOS or EOS .* neither"):
        own(tmp_path, PIQA).check_tokens(other, 257)


def test_requests_with_tokens_without_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    longer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>"
    )
    longer.add_tokens([" leave"])
    with pytest.raises(UserError, match="piqa@1:.*: token 257 .* which has 257; .* 258 tokens"):
        own(tmp_path, PIQA).check_tokens(longer, 257)
    own(tmp_path, PIQA).check_tokens(longer, 258)
    rows = [{**row, "sol2": "stay"} for row in PIQA]  # the token is in no request
    own(tmp_path, rows).check_tokens(longer, 257)


@pytest.mark.parametrize("padding", [None, "<|pad|>"])
def test_a_padding_token_without_a_row_is_not_used(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, padding: str | None
) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<end>")
    if padding:
        other.add_special_tokens({"pad_token": padding})
    lm = language_model.language_model(model, other, 2, "here")
    assert lm.tokenizer.pad_token_id < 257
    assert own(tmp_path, PIQA)(model, other)["n"] == 4


def test_another_set_on_the_hub_is_said(
    monkeypatch: pytest.MonkeyPatch,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import datasets

    hub = datasets.DatasetDict(
        dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(PIQA))
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    make("piqa", data_root=None)(model, tokenizer)
    assert "piqa: the validation split on the hub is not the one that piqa@1" in caplog.text
    caplog.clear()
    content = task_data.sha256_of([task_data.sha256_of_rows(PIQA, harness.KNOWN["piqa"].fields)])
    monkeypatch.setitem(harness.KNOWN["piqa"].published, "validation", content)
    make("piqa", data_root=None)(model, tokenizer)
    assert "on the hub is not" not in caplog.text


def test_every_request_of_gemma_begins_with_bos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its tokenizer, as HFLM of lm-eval 0.4.13 leaves it to that."""
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    gemma = Gemma2ForCausalLM(config)
    begun = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begun.bos_token_id)]
    )
    firsts: list[int] = []
    plain = Gemma2ForCausalLM.forward

    def watched(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        firsts.extend(input_ids[:, 0].tolist())
        return plain(self, input_ids, **options)

    monkeypatch.setattr(Gemma2ForCausalLM, "forward", watched)
    own(tmp_path, PIQA)(gemma, begun)
    assert firsts and set(firsts) == {begun.bos_token_id}


def test_requests_of_one_context_stay_together() -> None:
    requests = [SimpleNamespace(args=(context, option)) for context in "abcde" for option in "xyz"]
    chunks = language_model.chunked(requests, 4)
    assert [len(chunk) for chunk in chunks] == [6, 6, 3]
    assert [request for chunk in chunks for request in chunk] == requests


def test_requests_that_begin_alike_stay_together() -> None:
    """And apart from others; what is short, or alone with its beginning, is no reason."""
    first, second = "a" * 1200, "b" * 1200
    contexts = ["x", "y", *(first + x for x in "12345"), *(second + x for x in "12"), "z" * 1300]
    requests = [SimpleNamespace(args=(context, option)) for context in contexts for option in "pq"]
    chunks = language_model.chunked(requests, 8)
    assert [len(chunk) for chunk in chunks] == [4, 8, 2, 4, 2]
    assert [request for chunk in chunks for request in chunk] == requests
    apart = [SimpleNamespace(args=(x * 1200, "p")) for x in "abcdef"]
    assert [len(x) for x in language_model.chunked(apart, 4)] == [4, 2]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_shared_beginning_is_run_once_and_changes_nothing(
    family: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of several lengths, one of which is the beginning of another, answers of several
    tokens, and a context that is cut.
    """
    model = tiny_model(family).eval()
    lm = language_model.language_model(model, tokenizer, 3, "here")
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 250, (count,), generator=draw).tolist()

    begin = ids(80)
    contexts = [begin, *(begin + ids(x) for x in (1, 4, 9, 9, 20)), ids(5) + begin]
    requests = [(("", ""), x, ids(y)) for x in contexts for y in (1, 1, 3)]
    with torch.no_grad():
        counts: list[int] = []
        model.register_forward_hook(lambda *x: counts.append(x[2].logits.shape[1]))
        found = lm._loglikelihood_tokens(requests)
        few = sum(counts)
        counts.clear()
        monkeypatch.setattr(language_model, "SHARED_TOKENS", 10**9)
        wanted = lm._loglikelihood_tokens(requests)
    assert few < 0.7 * sum(counts)
    assert [x[1] for x in found] == [x[1] for x in wanted]
    assert [x[0] for x in found] == pytest.approx([x[0] for x in wanted], rel=1e-4)
    lm._max_length = 60  # contexts are cut from the left, each somewhere else
    monkeypatch.setattr(language_model, "SHARED_TOKENS", 4)
    with torch.no_grad():
        cut = lm._loglikelihood_tokens(requests)
        monkeypatch.setattr(language_model, "SHARED_TOKENS", 10**9)
        wanted = lm._loglikelihood_tokens(requests)
    assert [x[0] for x in cut] == pytest.approx([x[0] for x in wanted], rel=1e-4)
