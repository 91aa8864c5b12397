"""Every task beside the papers' on documents of our own, against lm-eval's own evaluation of the
definition it finds itself: requests and scores are equal. And answers that are written, chat
templates, and what is missing.
"""

import copy
import importlib.machinery
import json
import math
import random
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import CONF
from tiny import bare_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specomp.errors import UserError
from specomp.evaluation import definitions, harness, language_model
from specomp.evaluation.harness import KNOWN, HarnessTask

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets bring their own
ROWS = 12
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Rows = list[dict[str, Any]]


class Brief(LlamaForCausalLM):
    """Ends its answers soon."""

    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits[..., 0] += 2
        return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Brief(config).eval()
    model.lm_head.weight.data *= 20  # random, but with opinions, so that options differ clearly
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token = byte; 0 is the end token."""
    return bare_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def ifeval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for what only IFEval needs; the checks are lm-eval's."""
    import nltk

    for name in ("langdetect", "immutabledict"):
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.detect, module.immutabledict = (lambda text: "en"), dict
        module.LangDetectException = ValueError
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    definitions.stock_configs.cache_clear()
    yield
    definitions.stock_configs.cache_clear()
    for name in [x for x in sys.modules if x.startswith("lm_eval.tasks.ifeval")]:
        del sys.modules[name]


def documents(task: str, start: int) -> Rows:
    return [document(task, n) for n in range(start, start + ROWS)]


def document(task: str, n: int) -> dict[str, Any]:
    """The n-th, in the task's own format."""
    if task in ("copa", *(x for x in KNOWN if x.startswith("xcopa"))):
        return {
            "premise": f"The lamp {n} went out.",
            "choice1": f"It burned {n} hours.",
            "choice2": "The wind blew.",
            "question": ("cause", "effect")[n % 2],
            "label": n % 3 % 2,
        }
    if task.startswith("truthfulqa"):
        choices = [f"{n} of them.", "None.", f"About {n * n}.", "All."][: 2 + n % 3]
        labels = [1, *[n % 2] * (len(choices) - 2), 0]
        return {
            "question": f"How many of {n} boats float?",
            f"{task[-3:]}_targets": {"choices": choices, "labels": labels},
        }
    return {
        "boolq": {"passage": f"A has {n} hats.", "question": "has a a hat", "label": n % 2},
        "sciq": {
            "support": f" Salt {n} dissolves.",
            "question": f"What dissolves in glass {n}?",
            "distractor1": "sand",
            "distractor2": "glass",
            "distractor3": f"iron {n}",
            "correct_answer": "salt",
        },
        "mathqa": {
            "Problem": f"What is {n} + 1?",
            "options": f"a ) {n} , b ) {n + 1} , c ) {n + 2} , d ) 7 , e ) none of these",
            "correct": "abcde"[n % 5],
        },
        "lambada_openai": {"text": f"She took {n} steps and opened the {'door' if n % 2 else 'o'}"},
        "gsm8k": {"question": f"{n} and {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"},
        "ifeval": {
            "key": n,
            "prompt": f"Write {n} words.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"num_words": n % 4, "relation": ("at least", "less than")[n % 2]}],
        },
    }[task]


def make(task: str, root: Path | None, **changes: Any) -> HarnessTask:
    settings = {"version": 1, "num_fewshot": None, "limit": None, "batch_size": 4}
    settings |= {"precision": "float32", "metric": quoted(task), "data_root": root}
    return HarnessTask(task=task, **settings | changes)


def quoted(task: str) -> str:
    return {"gsm8k": "exact_match.strict-match", "ifeval": "prompt_level_strict_acc"}.get(
        task, "acc"
    )


def write(root: Path, task: str) -> dict[str, Rows]:
    """Rows of the splits that it can read, on disk too."""
    splits = {x: documents(task, 20 * i) for i, x in enumerate(KNOWN[task].splits(1))}
    (root / task).mkdir(parents=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return splits


class Asked:
    """What lm-eval's model was asked, and said. To gsm8k it says a number too, every other time
    the right one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lm_eval.models.huggingface import HFLM

        self.said: list[Any] = []
        for name in ("loglikelihood", "generate_until"):
            monkeypatch.setattr(HFLM, name, self.watched(getattr(HFLM, name)))

    def watched(self, plain: Any) -> Any:
        def ask(lm: Any, requests: list[Any], disable_tqdm: bool = True) -> Any:
            answers = plain(lm, requests, disable_tqdm=True)
            self.said += [(x.args, answer) for x, answer in zip(requests, answers, strict=True)]
            return [
                self.numbered(x.args[0], answer) if isinstance(answer, str) else answer
                for x, answer in zip(requests, answers, strict=True)
            ]

        return ask

    def numbered(self, prompt: str, answer: str) -> str:
        asked = re.findall(r"(\d+) and ", prompt)
        return answer + (f" #### {int(asked[-1]) * 2 + int(asked[-1]) % 2}" if asked else "")

    def take(self) -> list[Any]:
        taken, self.said = self.said, []
        return taken


def alike(ours: list[Any], theirs: list[Any]) -> None:
    """The same requests and answers; log-likelihoods to rounding, since what requests begin with
    alike is run once here.
    """
    assert [x for x, _ in ours] == [x for x, _ in theirs]
    for (_, own), (_, other) in zip(ours, theirs, strict=True):
        if isinstance(own, str):
            assert own == other
        else:
            assert own[1] == other[1] and own[0] == pytest.approx(other[0], rel=1e-5)


def by_lm_eval(
    task: str,
    splits: dict[str, Rows],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> dict[str, Any]:
    """The row of its own table, with the definition that it finds itself."""
    import datasets
    import lm_eval.evaluator
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    tables = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    # a split that the definition names must be there, and is not asked
    every = dict.fromkeys(("train", "validation", "test"), next(iter(tables.values())))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(every | tables)
    )
    for name in ("add_env_info", "add_tokenizer_info"):  # of the machine
        monkeypatch.setattr(lm_eval.evaluator, name, lambda *_: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    folder = Path(lm_eval.tasks.__file__).parent / KNOWN[task].definition
    results = lm_eval.evaluator.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(
            include_defaults=False, include_path=str(folder.parent)
        ),
        bootstrap_iters=harness.BOOTSTRAP_ITERS,
        log_samples=False,
        **options,
    )
    found: dict[str, Any] = results["results"][task]
    return found


def compare(
    task: str,
    root: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    *,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, float]:
    """Ours, equal to lm-eval's in every request, answer and number."""
    splits, asked = write(root, task), Asked(monkeypatch)
    ours = make(task, root, num_fewshot=shots, chat_template=chat)
    ours.validate(2048)
    ours.check_tokens(tokenizer, 257)
    asked.take()
    scores, said = ours(model, tokenizer), asked.take()
    row = by_lm_eval(
        task,
        splits,
        model,
        tokenizer,
        monkeypatch,
        num_fewshot=shots,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert said
    alike(said, asked.take())
    numbers = {k: v for k, v in row.items() if "," in k and not isinstance(v, str)}
    assert len(numbers) >= 2
    for key, value in numbers.items():
        name, _, chosen = key.partition(",")
        found = scores[harness.metric_name(name, chosen)]
        assert found == pytest.approx(value, rel=1e-5), key
    assert scores["n"] == ROWS
    assert (scores["nonfinite_requests"], scores["truncated_requests"]) == (0, 0)
    return scores


NEW = [
    x for x, known in KNOWN.items() if not known.published and x[:5] != "xcopa" and x != "ifeval"
]


@pytest.mark.parametrize("task", [*NEW, "xcopa_it", "xcopa_zh"])
def test_tasks_equal_lm_evals_own(
    task: str,
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    scores = compare(task, tmp_path, model, tokenizer, monkeypatch)
    assert f"{quoted(task)}_stderr" in scores
    if task == "gsm8k":
        assert scores["exact_match.strict-match"] == scores["exact_match.flexible-extract"] == 0.5
    chance = {"boolq": 1 / 2, "copa": 1 / 2, "sciq": 1 / 4, "mathqa": 1 / 5, "gsm8k": 0}
    chance |= {"xcopa_it": 1 / 2, "xcopa_zh": 1 / 2, "lambada_openai": 0}
    chance |= {"truthfulqa_mc1": (1 / 2 + 1 / 3 + 1 / 4) / 3}
    assert scores.get("chance") == (pytest.approx(chance[task]) if task in chance else None)


@pytest.mark.parametrize("task", ["boolq", "gsm8k", "xcopa_it", "lambada_openai"])
@pytest.mark.parametrize("chat", [False, True])
def test_examples_and_chat_templates_equal_lm_evals_own(
    task: str,
    chat: bool,
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(task, tmp_path, model, tokenizer, monkeypatch, shots=2, chat=chat)


def test_ifeval_equals_lm_evals_own(
    ifeval: None,
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = compare("ifeval", tmp_path, model, tokenizer, monkeypatch)
    assert 0 < scores["inst_level_strict_acc"] < 1 and scores["chance"] == 0


def test_printing_is_lm_evals_alone(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A standard error that is drawn, and written answers: nothing on the terminal."""
    for task in ("lambada_openai", "gsm8k"):
        write(tmp_path, task)
        make(task, tmp_path)(model, tokenizer)
    said = capfd.readouterr()
    assert said.out == "" and "bootstrap" not in said.err and "Running" not in said.err


@pytest.mark.parametrize("task", KNOWN)
def test_what_is_known_of_a_task_is_what_its_definition_says(task: str) -> None:
    from lm_eval.tasks import _yaml_loader

    known = KNOWN[task]
    paths = sorted(Path(_yaml_loader.__file__).parent.glob(known.definition))
    assert len(paths) == (57 if task == "mmlu" else 1)
    for path in paths:
        config = _yaml_loader.load_yaml(path, resolve_func=False)
        assert config["task"].startswith(task) and known.shots == config.get("num_fewshot")
        evaluated = config.get("test_split") or config["validation_split"]
        keys = ("fewshot_split", "training_split", "validation_split")
        examples = next((config[x] for x in keys if config.get(x)), evaluated)
        assert (known.evaluated, known.examples) == (evaluated, examples)


def test_suites_name_the_versions_of_the_definitions() -> None:
    from lm_eval.tasks import _yaml_loader

    folder, seen = Path(_yaml_loader.__file__).parent, set()
    for path in sorted((CONF / "benchmark").glob("*.yaml")):
        for part in (yaml.safe_load(path.read_text()).get("parts") or {}).values():
            if "task" in part:
                first = min(folder.glob(KNOWN[part["task"]].definition))
                config = _yaml_loader.load_yaml(first, resolve_func=False)
                assert part.get("version", 1) == config["metadata"]["version"], part
                assert part.get("metric", "acc") in harness.metric_names(config), part
                seen.add(part["task"])
    assert seen == set(KNOWN)


def test_identity(tmp_path: Path) -> None:
    assert make("gsm8k", None, version=3).id == "gsm8k@3"
    chat = make("gsm8k", None, num_fewshot=8, chat_template=True, limit=9, precision="bfloat16")
    assert chat.id == "gsm8k@1:8shot:chat:limit9:bf16"
    # lm-eval adds no examples to a prompt that is whole
    assert make("ifeval", None, num_fewshot=5).id == make("ifeval", None).id == "ifeval@1"
    assert make("truthfulqa_mc1", None, num_fewshot=5).shots == 0
    write(tmp_path, "gsm8k")
    local = make("gsm8k", tmp_path)
    before = local.id
    assert before.startswith("gsm8k@1:") and len(before) == len("gsm8k@1:") + 8
    (tmp_path / "gsm8k" / "train.jsonl").write_text(json.dumps(document("gsm8k", 1)))
    assert local.id != before, "its own five examples are a part of the data"
    (tmp_path / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"gsm8k: no train\.jsonl .*; 5 few-shot examples asked"):
        local.validate(2048)


def test_examples_that_are_not_used_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "truthfulqa_mc1")
    make("truthfulqa_mc1", tmp_path, num_fewshot=5).validate(2048)
    assert "truthfulqa_mc1: its prompt is whole, and lm-eval adds no examples" in caplog.text
    assert "num_fewshot=5 is not used" in caplog.text


def test_a_tokenizer_without_a_chat_template(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    write(tmp_path, "copa")
    task = make("copa", tmp_path, chat_template=True)
    for ask in (lambda: task.check_tokens(plain, 257), lambda: task(model, plain)):
        with pytest.raises(UserError, match="copa: .*no chat template .*chat_template=false"):
            ask()
    assert make("copa", tmp_path)(model, plain)["n"] == ROWS


def test_prompts_that_are_cut_for_an_answer_are_counted(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, "gsm8k")
    task = make("gsm8k", tmp_path, num_fewshot=0)
    # "Question: 1 and 1?\nAnswer:" is 26 bytes, with two digits 28: two of twelve
    monkeypatch.setattr(model.config, "max_position_embeddings", 256 + 27)
    assert task(model, tokenizer)["truncated_requests"] == 2
    assert "of 12 requests 0 had a non-finite" in caplog.text
    assert "2 were cut to the context" in caplog.text
    monkeypatch.setattr(model.config, "max_position_embeddings", 256)
    said = "gsm8k.*: answers of up to 256 tokens leave no room for a prompt in .* context of 256"
    with pytest.raises(UserError, match=said):
        task(model, tokenizer)
    with pytest.raises(UserError, match=said):
        task.validate(256)


def test_written_answers_of_nan_are_counted(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    write(tmp_path, "gsm8k")
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(math.nan)
    found = make("gsm8k", tmp_path, num_fewshot=0)(broken, tokenizer)
    assert (found["nonfinite_requests"], found["exact_match.strict-match"]) == (ROWS, 0)


def test_whole_texts_are_the_windows_of_lm_eval(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """No stock task of ours asks for them; those of lm-eval's index do."""
    from lm_eval.models.huggingface import HFLM

    draw = random.Random(0)  # lm-eval answers equal windows once, which batches decide about
    lengths = (30, 630, 100, 1000, 129)
    texts = [types.SimpleNamespace(args=("".join(draw.choices("abcd ", k=n)),)) for n in lengths]
    lm = language_model.language_model(model, tokenizer, 2, "here")
    lm._max_length = 128
    plain = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=2, max_length=128)
    expected = plain.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)
    assert (lm.nonfinite, lm.truncated) == (0, 0)


def test_what_ifeval_needs_is_said(
    ifeval: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    def nothing(name: str) -> None:
        raise LookupError(name)

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr(nltk.data, "find", nothing)
    write(tmp_path, "ifeval")
    with pytest.raises(UserError, match=r"nltk's data punkt_tab, .*nltk\.downloader punkt_tab"):
        make("ifeval", tmp_path).validate(2048)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    monkeypatch.setattr(
        definitions.importlib.util, "find_spec", lambda name: None if name == "langdetect" else 1
    )
    with pytest.raises(UserError, match=r"with langdetect, not .* 'lm_eval\[ifeval\]'") as caught:
        make("ifeval", tmp_path).validate(2048)
    assert "\n" not in str(caught.value)


def test_rows_of_no_instructions_are_found_before_any_work(
    ifeval: None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "ifeval").mkdir()
    row = document("ifeval", 1) | {"instruction_id_list": ["be:nice"], "kwargs": [{"a": 1}]}
    (tmp_path / "ifeval" / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"ifeval: the rows in .* \(KeyError: 'be:nice'\)"):
        make("ifeval", tmp_path).check_tokens(tokenizer, 257)


@pytest.mark.parametrize("task", ["boolq", "copa", "xcopa_zh"])
def test_labels_of_no_choice_are_found_before_any_work(
    task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As test splits without answers have them."""
    splits = write(tmp_path, task)
    rows = splits[KNOWN[task].evaluated]
    text = "\n".join(json.dumps(row) for row in [*rows, {**rows[0], "label": -1}])
    (tmp_path / task / f"{KNOWN[task].evaluated}.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"{task}: the answer of row 13 in .* is -1, which is none"):
        make(task, tmp_path).check_tokens(tokenizer, 257)
