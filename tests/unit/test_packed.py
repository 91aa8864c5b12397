"""Packed folders: exact with and without specomp, as large as they were counted, and never
half-read.
"""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from units import Known

import specomp
from specomp.compression.ledger import measure
from specomp.errors import UserError
from specomp.forms.factors import Factors
from specomp.forms.pivoted import Pivoted
from specomp.models.families import family_of
from specomp.models.load import cast_weights
from specomp.models.modules import GridLinear, replace_linear
from specomp.models.packed import grid_linears
from specomp.models.save import save_compressed, substitutes
from specomp.numerics.factors import LowRankFactors
from specomp.quantization.factors import FactorQuantizer
from specomp.quantization.rtn import Spacing, round_to_nearest

IDS = torch.arange(3, 23)[None]
KINDS = {
    "groups": {"group_size": 8, "symmetric": True},
    "ragged": {"group_size": 24, "symmetric": True},
    "zeros": {"group_size": 8, "symmetric": False},
    "ragged zeros": {"group_size": 24, "symmetric": False},
    "rows": {"group_size": None, "symmetric": True},
    "rows with zeros": {"group_size": None, "symmetric": False},
    "3 bits": {"group_size": 24, "symmetric": False, "bits": 3},
}


FACTORS = Factors()


def quantized(
    name: str, *, dtype: torch.dtype = torch.float32, every: int = 1, form=FACTORS, **changes
):
    """A tiny model with rounded factors of odd ranks, or with another form of them."""
    settings = {
        "algorithm": "rtn",
        "bits": 4,
        "act_order": False,
        "damping": 0.0,
        "order": "faithful",
        "rebalance": False,
    }
    quantizer = FactorQuantizer(**settings | changes)
    model = cast_weights(tiny_model(name), dtype)
    for index, spec in enumerate(family_of(model.config).linears(model)):
        if index % every == 0:
            linear, rank = model.get_submodule(spec.name), 7 + index % 4
            U, s, Vt = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
            evidence = Known(
                pair=LowRankFactors(U * s, Vt),
                own_bias=linear.bias,
                rounding=quantizer,
                dtype=dtype,
            )
            replace_linear(model, spec.name, form.module(spec, rank, evidence))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def export(tmp_path):
    def save(model, form="factors", folder="model"):
        save_compressed(model, tiny_tokenizer(), tmp_path / folder, form=form, info={})
        return tmp_path / folder

    return save


def bytes_on_disk(folder) -> int:
    """Of the tensors: headers left out."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "form"),
    [("llama_gqa", Factors()), ("opt", Factors()), ("opt", Pivoted(max_growth=1.5))],
)
def test_reloads_bit_for_bit_and_is_as_large_as_counted(export, name, form, kind, dtype):
    model = quantized(name, dtype=dtype, every=2, form=form, **KINDS[kind])
    linears = family_of(model.config).linears(model)
    folder, size = export(model), measure(model, linears)
    assert size.model_bytes == bytes_on_disk(folder)
    assert size.held_bytes > size.model_bytes
    by_transformers, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(by_transformers), logits(model))
    by_specomp = specomp.load(folder).model
    assert torch.equal(logits(by_specomp), logits(model))
    assert by_specomp.dtype == dtype
    assert measure(by_specomp, linears) == size
    before, after = grid_linears(model), grid_linears(by_specomp)
    assert before.keys() == after.keys() and len(before) == 2 * len(substitutes(model))
    for key, module in before.items():
        assert torch.equal(module.grid.scales, after[key].grid.scales)
        assert torch.equal(module.weight, after[key].weight)


def test_a_reloaded_model_can_be_saved_again_in_both_forms(export):
    model = quantized("llama", **KINDS["ragged zeros"])
    once = specomp.load(export(model)).model
    again = export(once, folder="again")
    assert torch.equal(logits(specomp.load(again).model), logits(model))
    dense = export(once, "dense", "dense")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    torch.testing.assert_close(logits(specomp.load(dense).model), logits(model), atol=1e-5, rtol=0)


def test_config_says_which_weights_are_packed_and_how(export):
    model = quantized("llama", every=2, **KINDS["ragged"])
    found = json.loads((export(model) / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "compressed-tensors" and found["format"] == "pack-quantized"
    targets = [name for group in found["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(grid_linears(model))
    assert {x["weights"]["num_bits"] for x in found["config_groups"].values()} == {4}


def test_saving_leaves_the_model_as_it_was(export):
    model = quantized("opt", **KINDS["zeros"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


def test_a_weight_that_left_its_grid_is_refused(export):
    model = quantized("llama", **KINDS["groups"])
    next(iter(grid_linears(model).values())).weight.data[0, 0] += 1e-3
    with pytest.raises(UserError, match="changed after it was quantized"):
        export(model)


def test_without_compressed_tensors_reading_is_one_line(export, monkeypatch):
    folder = export(quantized("llama", **KINDS["groups"]))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r"pip install 'specomp\[int4\]'"):
        specomp.load(folder)


def test_generation_with_cache_equals_without(export):
    model = specomp.load(export(quantized("llama_gqa", **KINDS["groups"]))).model
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(IDS, **options, use_cache=True),
        model.generate(IDS, **options, use_cache=False),
    )


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_linears_in_full_in_plain_groups_are_a_stock_model_of_integers(export, name):
    """No code of ours in the folder, and none is needed to open it."""
    model = in_full(name, group_size=8)
    folder = export(model)
    config = json.loads((folder / "config.json").read_text())
    stock = tiny_model(name).config
    assert config["model_type"] == stock.model_type and "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert "unserved" not in json.loads((folder / "specomp.json").read_text())
    assert "trust" not in (folder / "README.md").read_text()
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert type(opened) is type(tiny_model(name))
    assert torch.equal(logits(opened), logits(model))
    again = specomp.load(folder).model
    assert torch.equal(logits(again), logits(model))
    assert len(grid_linears(again)) == len(grid_linears(model))


@pytest.mark.parametrize("changes", [{"group_size": 24}, {"group_size": 8, "symmetric": False}])
def test_other_grids_are_for_transformers_alone(export, changes):
    folder = export(in_full("llama", **changes))
    config = json.loads((folder / "config.json").read_text())
    assert "AutoModelForCausalLM" in config["auto_map"] and "AutoModel" not in config["auto_map"]
    assert "blocks" in json.loads((folder / "specomp.json").read_text())["unserved"]


def in_full(name: str, **changes):
    """Every linear in full, rounded to nearest."""
    model = tiny_model(name)
    settings = {"group_size": 8, "symmetric": True, "bits": 4, "search": 0} | changes
    for spec in family_of(model.config).linears(model):
        linear = model.get_submodule(spec.name)
        spacing = Spacing(scale_dtype=torch.float16, **settings)
        found = round_to_nearest(linear.weight.detach(), spacing)
        linear.weight = torch.nn.Parameter(found.values())
        replace_linear(model, spec.name, GridLinear.of(linear, found.grid))
    return model
