"""The model card: what the hub reads of it, what people read of it, and whose it is."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from running import compose_run, random_tokens
from tiny import tiny_model, tiny_tokenizer

import specomp
from specomp.experiment.pipeline import command
from specomp.models.card import OURS, Measured, write_card

TOKENS = random_tokens(8, 32)
INFO = {
    "form": "factors",
    "base_model": {"name": "small", "source": {"repo": "org/small", "revision": "0" * 40}},
    "method": "svd_llm",
    "changes": ["method/allocation=adacr"],
    "compression": 0.4,
}


def card(folder):
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_it_back(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [a]\n---\n# Small\n"
    )
    measured = [
        Measured("wikitext2@1:512x24:00", "ppl", 32.9, 55.02),
        Measured("piqa@1", "acc", None, 0.61),
        Measured("ptb@1", "ppl", 60.0, float("inf")),
    ]
    assert write_card(tmp_path, INFO, name="mine", source=source, measured=measured)
    found = card(tmp_path)
    data = found.data
    assert (data.base_model, data.license, data.language) == ("org/small", "apache-2.0", ["en"])
    assert data.library_name == "transformers" and "specomp" in data.tags and "a" not in data.tags
    assert [(x.metric_type, x.metric_value) for x in data.eval_results] == [
        ("perplexity", 55.02),
        ("acc", 0.61),
    ]
    assert "| wikitext2@1:512x24:00 | ppl | 32.9 | 55.02 |" in found.text
    assert "| ptb@1 | ppl | 60 | inf |" in found.text  # a number that is none is not hidden
    assert "svd_llm method/allocation=adacr" in found.text and "compression 40 %" in found.text
    assert ModelCard(str(found)).data.to_dict() == data.to_dict()
    assert not write_card(tmp_path, INFO, name="mine", source=source, measured=measured)


@pytest.mark.parametrize(
    "text",
    [
        *("---\nlicense: [\n---\n", "", "\x00", "no front matter"),
        *("---\ntags: 3\n1: a\n---\n", "---\nself: true\n---\n", "---\n- a\n---\n"),
        f"---\nlicense: {'[' * 3000}\n---\n",
        "---\nlicense: {a: b}\n---\n",
    ],
)
def test_a_source_without_a_card_that_can_be_read_gives_nothing(tmp_path, text):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(text)
    assert write_card(tmp_path, INFO, name="mine", source=source)
    assert card(tmp_path).data.license is None and "Nothing yet." in card(tmp_path).text


def test_what_somebody_else_wrote_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My own words\n")
    assert not write_card(tmp_path, INFO, name="mine", source=None)
    assert (tmp_path / "README.md").read_text() == "# My own words\n"
    (tmp_path / "README.md").write_text(f"{OURS}\nold")
    assert write_card(tmp_path, INFO, name="mine", source=None)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert write_card(tmp_path, INFO, name="mine", source=None)


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_a_saved_model_has_one_and_its_snippet_opens_it(tmp_path, form):
    model = tiny_model("llama")
    report = specomp.compress(model, TOKENS, "svd_llm", 0.4, calibration={"batch_size": 4})
    specomp.save(model, tmp_path / "mine", tiny_tokenizer(), form=form, report=report)
    found = card(tmp_path / "mine")
    assert found.text.lstrip().startswith(OURS) and "# mine" in found.text
    assert "parameters of the whole model" in found.text and "`svd_llm`" in found.text
    assert "8 samples of 32 tokens" in found.text
    snippet = found.text.partition("```python\n")[2].partition("```")[0]
    assert ("trust_remote_code" in snippet) == (form == "factors")
    names = {}
    exec(snippet.replace("FOLDER", str(tmp_path / "mine")), names)
    ids = torch.tensor([names["tokenizer"]("abc").input_ids])
    assert torch.allclose(names["model"](ids).logits, model(ids).logits, atol=1e-5)


def test_a_run_says_how_it_was_made_and_what_it_measured(tmp_path):
    record = compose_run(tmp_path, "method=svd_llm", "save=true")
    folder = Path(record.model_folder)
    found = card(folder)
    (name, values), *_ = record.metrics.items()
    assert f"| {name} | ppl | " in found.text and f"{values['ppl']:,.4g} |" in found.text
    assert "Command: `specomp debug=tiny method=svd_llm save=true`" in found.text
    assert str(tmp_path) not in found.text and record.key[:12] in found.text
    assert found.data.base_model is None  # a random model of no repository
    (folder / "README.md").write_text("mine")
    compose_run(tmp_path, "method=svd_llm", "save=true", "benchmark.max_windows=3")
    assert (folder / "README.md").read_text() == "mine"
    assert specomp.load(folder).model is not None  # a card is no part of what has a checksum


def test_the_command_in_a_card_says_nothing_of_the_machine(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("So it is written down here, once and again.\n" * 400)
    record = compose_run(
        tmp_path,
        "method=svd",
        "save=true",
        "corpus=text",
        f"corpus.path={text}",
        "model.device=cpu",
    )
    found = card(Path(record.model_folder)).text
    assert (
        "Command: `specomp debug=tiny method=svd save=true corpus=text corpus.path=PATH`" in found
    )
    assert str(tmp_path) not in found


def test_norwegian_is_a_language_and_a_mixture_names_its_texts(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlanguage: [en, no]\n---\n")
    parts = {x: {"source": {"fingerprint": f"{x} text"}} for x in ("web", "code")}
    info = INFO | {
        "calibration": {"source": {"name": "mixture", "parts": parts}, "samples": 4, "length": 8},
        "command": "specomp a='b`c`'\nd",
        "ledger": {"dense": {"model_params": 2}, "compressed": {"model_params": 1}},
    }
    measured = [Measured("ptb@1", "nonfinite_windows", 0.0, 0.0)]
    write_card(tmp_path, info, name="mine\nyours", source=source, measured=measured)
    found = card(tmp_path)
    assert found.data.language == ["en", "no"] and found.data.eval_results is None
    assert "Calibrated on web text; code text: 4 samples" in found.text
    assert "- Command: `` specomp a='b`c`' d ``" in found.text and "# mine yours" in found.text
    assert "| parameters of the whole model | 2 | 1 | 0.500 |" in found.text


def test_a_card_of_ones_own_outlives_another_save_and_costs_no_model(tmp_path, monkeypatch):
    model = tiny_model("llama")
    specomp.compress(model, TOKENS, "svd", 0.4, calibration={"batch_size": 4})
    specomp.save(model, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("my own")
    specomp.save(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    monkeypatch.setattr("specomp.models.save.write_card", lambda *_, **__: 1 / 0)
    specomp.save(model, tmp_path / "other")
    assert specomp.load(tmp_path / "other").model is not None


def test_a_folder_that_is_gone_costs_no_record(tmp_path):
    record = compose_run(tmp_path, "method=svd", "save=true")
    shutil.rmtree(record.model_folder)
    more = compose_run(tmp_path, "method=svd", "save=false", "benchmark.window=16")
    assert more.status == "ok" and len(more.metrics) == 2


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("+paths.data=/home/me", None),
        ("hydra.run.dir=/home/me", None),
        ("tracking.token=abc", None),
        ("model={path: /home/me, name: x}", "'model={path: PATH, name: x}'"),
        ("calibration.files=[/a/b,~/c]", "'calibration.files=[PATH,PATH]'"),
        ("model.repo=org/name", "model.repo=org/name"),
        ("method/whitening=gram", "method/whitening=gram"),
    ],
)
def test_no_path_is_in_a_command(typed, told):
    found = command(SimpleNamespace(config={"overrides": [typed]}))
    assert found == " ".join(x for x in ("specomp", told) if x)
