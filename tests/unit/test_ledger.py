"""Counts against an independent count of the state dict."""

import json

import pytest
import torch
from tiny import FAMILY_NAMES, tiny_model

from specomp.compression.ledger import ledger, measure
from specomp.models.families import family_of
from specomp.models.modules import LowRankLinear, replace_linear


def counted(model) -> tuple[int, int]:
    """Numbers and bytes in the state dict, each storage once."""
    tensors = {value.data_ptr(): value for value in model.state_dict().values()}.values()
    return sum(x.numel() for x in tensors), sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_counts_equal_the_state_dict(name):
    model = tiny_model(name)
    linears = family_of(model.config).linears(model)
    size = measure(model, linears)
    assert (size.model_params, size.model_bytes) == counted(model)
    state = model.state_dict()
    assert size.linear_params == sum(state[f"{x.name}.weight"].numel() for x in linears)
    assert size.macs_per_token == size.linear_params + model.get_output_embeddings().weight.numel()


def test_biases_count_in_the_model_and_not_in_the_linears():
    model = tiny_model("opt")
    linears = family_of(model.config).linears(model)
    biases = [name for name in model.state_dict() if any(name == f"{x.name}.bias" for x in linears)]
    assert len(biases) == len(linears)
    before = measure(model, linears)
    for x in linears:
        model.get_submodule(x.name).bias = None
    after = measure(model, linears)
    assert after.linear_params == before.linear_params
    assert before.model_params - after.model_params == sum(x.m for x in linears)


def test_tied_weights_count_once():
    model = tiny_model("llama_gqa")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embeddings.weight
    linears = family_of(model.config).linears(model)
    tied = measure(model, linears)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    untied = measure(model, linears)
    assert untied.model_params - tied.model_params == head.weight.numel()
    assert untied.model_bytes - tied.model_bytes == head.weight.numel() * head.weight.element_size()
    assert untied.macs_per_token == tied.macs_per_token


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_factors_count_what_they_store(name):
    model = tiny_model(name)
    linears = family_of(model.config).linears(model)
    dense = measure(model, linears)
    x = linears[0]
    module = model.get_submodule(x.name)
    low = LowRankLinear.from_factors(torch.randn(x.m, 3), torch.randn(3, x.n), module.bias, dtype=torch.float32, device="cpu")
    replace_linear(model, x.name, low)
    compressed = measure(model, linears)
    saved = x.m * x.n - 3 * (x.m + x.n)
    assert dense.linear_params - compressed.linear_params == saved
    assert dense.model_params - compressed.model_params == saved
    assert dense.macs_per_token - compressed.macs_per_token == saved
    assert (compressed.model_params, compressed.model_bytes) == counted(model)


def test_bytes_follow_the_dtype():
    model = tiny_model("llama")
    linears = family_of(model.config).linears(model)
    single, half = measure(model, linears), measure(model.to(torch.bfloat16), linears)
    assert half.model_params == single.model_params
    assert 2 * half.model_bytes == single.model_bytes


def test_ledger_compares_and_serializes():
    model = tiny_model("llama")
    linears = family_of(model.config).linears(model)
    dense = measure(model, linears)
    for x in linears:
        U, Vt = torch.randn(x.m, 4), torch.randn(4, x.n)
        replace_linear(model, x.name, LowRankLinear.from_factors(U, Vt, None, dtype=torch.float32, device="cpu"))
    result = ledger(0.3, dense, measure(model, linears))
    retention = sum(4 * (x.m + x.n) for x in linears) / sum(x.m * x.n for x in linears)
    assert result.measured_retention == pytest.approx(retention)
    assert result.deviation == pytest.approx(retention / 0.3 - 1)
    assert result.measured_retention < result.measured_retention_model < 1
    assert json.loads(json.dumps(result.as_dict()))["compressed"]["linear_params"] == result.compressed.linear_params
