"""The library: the whole method in one call, without configuration, and the same as an
experiment.
"""

import subprocess
import sys

import pytest
import torch
from running import CONF, ROOT, compose_config, random_tokens
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import specomp
from specomp.experiment.config import build
from specomp.experiment.pipeline import produce, resume
from specomp.experiment.record import record_key
from specomp.models.modules import Substitute

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
QUICK = {
    "soco": (["method.training.steps_factor=0.02"], {"training": {"steps_factor": 0.02}}),
    "asvd_strs": (
        ["method.allocation.candidates=[0.1,0.6]"],
        {"allocation": {"candidates": [0.1, 0.6]}},
    ),
}
# V2 divides by log(loss), and losses grow with the number of tokens.
V2 = ["calibration.num_samples=64", "calibration.length=128", "calibration.batch_size=32"]
CALIBRATION = {"batch_size": 2}


@pytest.fixture
def tokens():
    return random_tokens(6, 32)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_and_a_call_end_in_the_same_bits(tmp_path, name):
    typed, slots = QUICK.get(name, ([], {}))
    more = V2 if name == "svd_llm_v2" else []
    overrides = (f"method={name}", "ratio=cr40", "benchmark=none", "reference=false", *typed, *more)
    experiment = build(compose_config(tmp_path, *overrides))
    model, _, linears = produce(experiment, resume(experiment, record_key(experiment.identity())))
    other = experiment.source.load(experiment.cache).model
    report = specomp.compress(
        other,
        experiment.samples,
        specomp.method(name, **slots),
        0.4,
        calibration=experiment.calibration,
    )
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[x], theirs[x]) for x in ours)
    if name != "dense":
        assert [x.rank for x in report.linears] == [x.rank for x in linears]


def test_the_whole_round(tmp_path, tokens):
    model = tiny_model("llama_gqa")
    dense = specomp.perplexity(model, tokens)
    report = specomp.compress(model, tokens, method="adasvd", ratio=0.4, calibration=CALIBRATION)
    assert report.ledger.measured_retention == pytest.approx(0.6, abs=0.02)
    assert specomp.perplexity(model, tokens) != dense
    folder = specomp.save(model, tmp_path / "out", report=report)
    again = specomp.load(folder)
    assert again.tokenizer is None  # none was saved
    assert specomp.perplexity(again.model, tokens) == specomp.perplexity(model, tokens)
    assert specomp.perplexity(
        AutoModelForCausalLM.from_pretrained(folder), tokens
    ) == pytest.approx(specomp.perplexity(model, tokens))
    frame = report.to_frame()
    assert list(frame["name"]) == [x.name for x in report.linears]
    assert set(report.to_dict()) == {"ledger", "linears", "training", "seconds", "notes"}
    assert "retention of the linears" in str(report)
    assert not model.training


def test_a_cache_is_shared_by_methods_and_ratios(tmp_path, tokens):
    one = specomp.compress(tiny_model("llama"), tokens, "svd_llm", 0.2, cache=tmp_path)
    stored = sorted(p for p in (tmp_path / "statistics").rglob("*.safetensors"))
    times = [p.stat().st_mtime_ns for p in stored]
    other = specomp.compress(tiny_model("llama"), tokens, "adasvd", 0.6, cache=tmp_path)
    assert [p.stat().st_mtime_ns for p in stored] == times
    assert one.ledger.compressed.linear_params > other.ledger.compressed.linear_params
    # Other weights of the same shapes are another model.
    specomp.compress(tiny_model("llama", seed=1), tokens, "svd_llm", 0.2, cache=tmp_path)
    assert len(list((tmp_path / "statistics").rglob("*.safetensors"))) > len(stored)


def test_a_report_is_text_in_a_notebook_too(tokens, monkeypatch):
    """rich writes to the cell, and not into a file, where it finds itself in a kernel."""
    report = specomp.compress(tiny_model("llama"), tokens, "svd", 0.4)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "retention of the linears" in str(report)


@pytest.mark.parametrize("method", ["svd_llm", "asvd", "two_sided", "adasvd"])
def test_other_tokens_in_a_shared_cache_are_another_calibration(tmp_path, tokens, method):
    """The weights that an empty cache gives."""
    weights = []
    for seen, folder in ((tokens, "shared"), (tokens.flip(1), "shared"), (tokens.flip(1), "own")):
        model = tiny_model("llama")
        specomp.compress(model, seen, method, 0.4, cache=tmp_path / folder)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[2])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[2])


def test_bits_are_a_budget(tokens):
    from specomp.forms.prices import bits, parts_of

    model = tiny_model("llama")
    method = specomp.method("svd_llm", quantizer="rtn_int4", allocation="global_loss")
    report = specomp.compress(model, tokens, method, specomp.Bits(bits=3.0))
    stored = sum(bits(parts_of(model.get_submodule(x.name)), torch.float32) for x in report.linears)
    assert stored == report.ledger.compressed.linear_bits
    assert report.ledger.measured_bits <= 3.0
    assert report.ledger.measured_bits == pytest.approx(3.0, rel=0.05)
    assert "stored bits a weight" in str(report)


def test_training_may_read_other_tokens(tmp_path, tokens):
    lora = specomp.method("svd", training="lora")
    lora = specomp.Method(
        **{**vars(lora), "training": specomp.rows.slot("training", "lora", steps=2, rank=2)}
    )
    report = specomp.compress(
        tiny_model("llama"), tokens, lora, 0.4, training_tokens=random_tokens(9, 32, seed=3)
    )
    assert report.training["samples"] == 9
    assert report.training["steps"] == 2


REFUSALS = [
    ({"ratio": 1.0}, "ratio=1.0"),
    ({"ratio": 0.99999}, "keeps"),
    ({"method": "adasvdd"}, "did you mean adasvd"),
    ({"tokens": torch.zeros(3, dtype=torch.int64)}, "int64 ids"),
    ({"tokens": torch.full((2, 8), 10_000)}, "embedding"),
    ({"tokens": torch.zeros(1, 4096, dtype=torch.int64)}, "context"),
    ({"calibration": {"window": 3}}, "calibration.window"),
    ({"calibration": {"precision": "half"}}, "calibration.precision"),
    ({"method": "soco", "ratio": specomp.Bits(bits=4.0)}, "parameters"),
    (
        {"method": "specomp", "calibration": {"upstream": "compressed"}, "quantizer": "int4"},
        "quantizer",
    ),
]


@pytest.mark.parametrize(("change", "said"), REFUSALS, ids=[x for _, x in REFUSALS])
def test_what_cannot_work_is_one_line_and_changes_nothing(tokens, change, said):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call = {"tokens": tokens, "method": "svd"} | change
    with pytest.raises(specomp.UserError, match=said) as refused:
        specomp.compress(model, call.pop("tokens"), **call)
    assert "\n" not in str(refused.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_slots_are_named_where_they_do_not_fit(tokens):
    with pytest.raises(specomp.UserError, match="no slot 'allocations'"):
        specomp.method("svd", allocations="uniform")
    with pytest.raises(specomp.UserError, match="compensation.iterationz"):
        specomp.method("adasvd", compensation={"iterationz": 3})
    with pytest.raises(
        specomp.UserError, match="method.whitening is a object, which is no Whitening"
    ):
        specomp.method("svd", whitening=object())
    with pytest.raises(specomp.UserError, match="refinement=block_refine"):
        specomp.method("svd", compensation="block_refine")


def test_a_compressed_model_is_not_compressed_again(tokens):
    model = tiny_model("llama")
    specomp.compress(model, tokens, "svd", 0.4)
    assert any(isinstance(x, Substitute) for x in model.modules())
    with pytest.raises(specomp.UserError, match="compressed already"):
        specomp.compress(model, tokens, "svd", 0.4)


def test_an_unknown_family_is_named_with_what_to_write(tokens):
    model = AutoModelForCausalLM.from_config(
        __import__("transformers").GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64)
    )
    with pytest.raises(specomp.UserError, match=r"'gpt2'.*ModelFamily"):
        specomp.compress(model, tokens, "svd", 0.4)


def test_a_plan_needs_a_config_alone():
    config = tiny_model.__globals__["RandomModel"](
        name="x",
        dtype="float32",
        device="cpu",
        device_map=None,
        architecture="llama",
        seed=0,
        config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
        },
    ).config_for_plan(None)
    found = specomp.plan(config, "svd_llm", 0.4, num_samples=4, length=16, dtype="float32")
    assert found.compressed.linear_params < found.size.linear_params
    assert [x.name for x in found.stages] == ["load", "calibrate", "allocate", "compress", "save"]


FRESH = """
import sys
import specomp
assert "torch" not in sys.modules, "import specomp costs torch"
import torch
sys.path.insert(0, "tests")
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
sizes |= {"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes))
tokens = torch.randint(0, 64, (4, 16))
report = specomp.compress(model, tokens, method="adasvd", ratio=0.4)
str(report), report.to_dict()
specomp.save(model, sys.argv[1])
specomp.perplexity(specomp.load(sys.argv[1]).model, tokens)
specomp.method_names()
heavy = {"hydra", "lightning", "pytorch_lightning", "lm_eval", "wandb", "matplotlib"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""


def test_a_fresh_interpreter_imports_no_framework(tmp_path):
    line = [sys.executable, "-c", FRESH, str(tmp_path / "saved")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
