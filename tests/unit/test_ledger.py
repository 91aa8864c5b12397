"""Counts against an independent count of the state dict."""

import json

import pytest
import torch
from tiny import FAMILY_NAMES, tiny_model

from specomp.compression.ledger import Ledger, ledger, measure
from specomp.forms.factors import LowRankLinear
from specomp.forms.prices import Bits, Numbers
from specomp.models.families import family_of
from specomp.models.modules import replace_linear


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
    low = LowRankLinear.from_factors(
        torch.randn(x.m, 3), torch.randn(3, x.n), module.bias, dtype=torch.float32, device="cpu"
    )
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
    assert 2 * half.linear_bits == single.linear_bits == 32 * single.linear_params


def compressed():
    """Counts of a dense model and of the same with every linear at rank 4, and its linears."""
    model = tiny_model("llama")
    linears = family_of(model.config).linears(model)
    dense = measure(model, linears)
    for x in linears:
        U, Vt = torch.randn(x.m, 4), torch.randn(4, x.n)
        replace_linear(
            model,
            x.name,
            LowRankLinear.from_factors(U, Vt, None, dtype=torch.float32, device="cpu"),
        )
    return dense, measure(model, linears), linears


def test_ledger_compares_and_serializes():
    dense, small, linears = compressed()
    result = ledger(Numbers(compression=0.7), dense, small)
    retention = sum(4 * (x.m + x.n) for x in linears) / sum(x.m * x.n for x in linears)
    assert result.target_retention == pytest.approx(0.3)
    assert (result.target_compression, result.target_bits) == (0.7, None)
    assert result.measured_retention == pytest.approx(retention)
    assert result.deviation == pytest.approx(retention / 0.3 - 1)
    assert result.measured_retention < result.measured_retention_model < 1
    stored = json.loads(json.dumps(result.as_dict()))
    assert stored["compressed"]["linear_params"] == result.compressed.linear_params
    assert "target_bits" not in stored, "what is unknown is left out"
    assert Ledger.from_dict(stored) == result


def test_a_budget_of_bits_is_compared_in_bits():
    dense, small, linears = compressed()
    result = ledger(Bits(bits=10), dense, small)
    spent = 32 * sum(4 * (x.m + x.n) for x in linears) / sum(x.m * x.n for x in linears)
    assert result.target_retention == pytest.approx(10 / 32)
    assert (result.target_bits, result.target_compression) == (10, None)
    assert result.measured_bits == pytest.approx(spent)
    assert result.deviation == pytest.approx(spent / 10 - 1)
    assert Ledger.from_dict(json.loads(json.dumps(result.as_dict()))) == result


def test_without_a_budget_everything_is_kept():
    dense, _, _ = compressed()
    result = ledger(None, dense, dense, num_linears=3, num_dense=3)
    assert result.target_retention == result.measured_retention == 1
    assert (result.target_compression, result.deviation) == (0, 0)
    assert (result.num_linears, result.num_dense) == (3, 3)
