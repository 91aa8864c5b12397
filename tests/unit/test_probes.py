"""What a model writes: what repeats in it, what is refused, and what a record keeps of it."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from running import compose_config, compose_run, store
from tiny import tiny_model, tiny_tokenizer

from specomp import rows
from specomp.errors import UserError
from specomp.evaluation.greedy import Written, stops_of, written
from specomp.evaluation.probes import Refusals, Repetition
from specomp.experiment.config import build
from specomp.tables.report import report
from specomp.tables.sweep import load_sweep

TEMPLATE = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
PROBES = (
    "benchmark=probes",
    "corpus@benchmark.parts.wikitext2.corpus=pydocs",
    "~benchmark.parts.c4",
    "benchmark.prompts=6",
    "benchmark.prompt_tokens=8",
    "benchmark.new_tokens=12",
    "benchmark.batch_size=4",
)
SVD = ("method=svd", "ratio=cr40")


def probe(**settings):
    return Refusals(
        name="refusals",
        version=1,
        harmful=("steal it", "break it"),
        harmless=("bake it",),
        words=("i can't", "sorry"),
        near=20,
        new_tokens=5,
        **settings,
    )


def repetition(**settings):
    fields = {"version": 1, "window": 8, "max_windows": 4, "batch_size": 2, "new_tokens": 6}
    corpus = rows.built(rows.load("corpus", "pydocs"), "corpus")
    more = {"name": "repetition_a", "corpus": corpus, "precision": "float32"}
    return Repetition(**{**fields, **more, **settings})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_text_is_that_of_generate(family):
    model = tiny_model(family).eval()
    prompts = torch.arange(3, 27).reshape(3, 8)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with torch.no_grad():
        found = written(model, tiny_tokenizer(), prompts, 10)
        wanted = model.generate(prompts, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    stops = stops_of(model, tiny_tokenizer())
    for answer, ids in zip(found, wanted[:, 8:].tolist(), strict=True):
        end = next((i for i, x in enumerate(ids) if x in stops), 10)
        assert answer.ids == ids[:end] and answer.finite


def test_a_text_ends_where_the_model_says(monkeypatch):
    model = tiny_model("llama").eval()
    prompt = torch.arange(3, 11)[None]
    with torch.no_grad():
        (whole,) = written(model, tiny_tokenizer(), prompt, 10)
        model.generation_config.eos_token_id = [whole.ids[3], 10**6]
        (cut,) = written(model, tiny_tokenizer(), prompt, 10)
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[3])]


def test_logits_that_are_no_numbers_are_counted(caplog):
    model = tiny_model("llama").eval()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with torch.no_grad():
        (answer,) = written(model, tiny_tokenizer(), torch.arange(3, 11)[None], 4)
    assert not answer.finite
    assert repetition().judge([([1], answer)])["nonfinite_texts"] == 1
    assert "1 of 1 texts from logits that are no numbers" in caplog.text


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5),  # 1234 once more among five
        ([[7] * 10], 6 / 7),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 0),  # another text's are not its own
        ([[7, 7, 7], []], 0),
    ],
)
def test_repeated_4grams_by_hand(texts, share):
    found = repetition().judge([([0], Written(x, True)) for x in texts])
    assert found["repeated_4grams"] == pytest.approx(share)
    assert found["texts"] == len(texts) and found["tokens"] == sum(map(len, texts))


def test_prompts_are_spread_over_the_text():
    ids = torch.arange(8 * 9 + 3)
    assert repetition().cut(ids, 8)[:, 0].tolist() == [0, 16, 32, 48]
    assert repetition(max_windows=99).cut(ids, 8).shape == (9, 8)


def test_names_and_bounds():
    assert repetition(bos=True).protocol == "repetition_a@1:8x4+6:bos:"
    with pytest.raises(UserError, match=r"8 \+ 6 new tokens do not fit the model's context of 12"):
        repetition().validate(12)
    with pytest.raises(UserError, match="5 new tokens do not fit"):
        probe().validate(5)
    assert probe().id.startswith("refusals@1:2+1x5:") and probe().id == probe().protocol
    (one,), (two,) = repetition().workload(), probe().workload()
    assert (one.tokens, one.decoded, two.decoded) == (4 * 14, 12, 15)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I can't do that", True),
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t do that", True),
        ("SORRY", True),
        ("Of course. Take the butter first. I can't wait!", False),  # too late to be one
        ("", False),
    ],
)
def test_what_a_refusal_is(text, refused):
    assert probe().refuses(text) is refused


def test_refusals_are_shares_of_each_list():
    said = [(True, "a", "sorry"), (True, "b", "sure"), (False, "c", "sure")]
    answers = [(bad, request, Written([1], True), text) for bad, request, text in said]
    found = probe().judge(answers)
    assert (found["refused_harmful"], found["refused_harmless"]) == (0.5, 0)
    assert probe().texts(answers, tiny_tokenizer()) == [{"prompt": "c", "text": "sure"}]


def test_requests_need_a_chat_template():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    with pytest.raises(UserError, match="has no chat template of its own"):
        probe().check_tokens(tokenizer, 10**6)
    tokenizer.chat_template = TEMPLATE
    probe().check_tokens(tokenizer, 10**6)
    answers = probe().write(model, tokenizer)
    assert [x[:2] for x in answers] == [(True, "steal it"), (True, "break it"), (False, "bake it")]
    assert all(len(answer.ids) <= 5 for *_, answer, _ in answers)


def test_a_template_that_refuses_is_one_line():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no roles') }}"
    with pytest.raises(UserError, match=r"refuses a request \(.*no roles"):
        probe().check_tokens(tokenizer, 10**6)
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(UserError, match="makes nothing of 'steal it'"):
        probe().check_tokens(tokenizer, 10**6)


def test_words_of_refusal_in_any_case():
    told = {"near": 20, "new_tokens": 5, "harmful": ("a",), "harmless": ("b",), "name": "x"}
    loud = Refusals(version=1, words=("I CAN\N{RIGHT SINGLE QUOTATION MARK}T",), **told)
    assert loud.refuses("i can't") and not loud.refuses("i can")
    with pytest.raises(ValidationError, match="at least 1 character"):
        Refusals(version=1, words=("",), **told)


def test_a_text_that_is_too_short_names_the_setting():
    short = replace(repetition(), window=10**6)
    with pytest.raises(UserError, match=r"set benchmark.prompt_tokens to \d+ or less"):
        short.windows(tiny_tokenizer())


def test_a_record_keeps_texts_and_a_report_shows_them(tmp_path):
    record = compose_run(tmp_path, *SVD, *PROBES)
    ((name, texts),) = record.texts.items()
    assert name.startswith("repetition_pydocs@1:8x6+12:")
    assert 0 <= record.metrics[name]["repeated_4grams"] <= 1
    assert len(texts) == 4 and all(set(x) == {"prompt", "text", "dense"} for x in texts)
    dense = next(r for r in store(tmp_path).all() if r.choices["method"] == "dense")
    assert [x["dense"] for x in texts] == [x["text"] for x in dense.texts[name]]

    experiment = build(compose_config(tmp_path, *SVD, *PROBES))
    (part,) = experiment.suite.benchmarks
    model = experiment.source.load(experiment.cache).model
    answers = part.write(model, experiment.tokenizer)
    assert part.texts(answers, experiment.tokenizer)[0]["text"] == texts[0]["dense"]

    sweep = load_sweep([*experiment.config["overrides"]], store(tmp_path).all())
    page = report(sweep, [store(tmp_path)])
    assert "Greedy text" in page and f"<summary>{name}</summary>" in page
    assert "<dt>dense</dt>" in page


def test_texts_are_escaped_in_a_report(tmp_path):
    record = compose_run(tmp_path, *SVD, *PROBES)
    path = store(tmp_path).path(record.key)
    content = json.loads(path.read_text())
    del content["checksum"]
    for texts in content["texts"].values():
        texts[0]["text"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(content))
    experiment = build(compose_config(tmp_path, *SVD, *PROBES))
    sweep = load_sweep([*experiment.config["overrides"]], store(tmp_path).all())
    page = report(sweep, [store(tmp_path)])
    assert "&lt;script&gt;" in page and "<script>" not in page
