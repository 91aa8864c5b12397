"""Families find the right linears, group them by common input, and refuse what they do not know."""

from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILY_NAMES, VOCAB, tiny_model
from torch import nn

from specomp.errors import UserError
from specomp.forms.factors import LowRankLinear
from specomp.models.families import FAMILY_OF_TYPE, base_model_type, family_of
from specomp.models.modules import replace_linear


def test_lists_every_linear_of_the_decoder_layers_once(tiny_any):
    family = family_of(tiny_any.config)
    specs = family.linears(tiny_any)
    prefix = family.decoder_layers
    expected = {
        name
        for name, module in tiny_any.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    }
    assert {spec.name for spec in specs} == expected
    assert len(specs) == len(expected)
    for spec in specs:
        weight = tiny_any.get_submodule(spec.name).weight
        assert (spec.m, spec.n) == tuple(weight.shape)
        assert spec.params == weight.numel()
        assert spec.name == f"{prefix}.{spec.decoder_layer}.{spec.kind}"


def test_linears_of_a_site_see_the_same_tensor_and_other_linears_another(tiny_any):
    seen: dict[str, int] = {}
    kept = []  # keeps inputs alive, so that equal addresses mean equal tensors

    def remember(name):
        def hook(module, args):
            kept.append(args[0])
            seen[name] = args[0].data_ptr()

        return hook

    specs = family_of(tiny_any.config).linears(tiny_any)
    hooks = [
        tiny_any.get_submodule(spec.name).register_forward_pre_hook(remember(spec.name))
        for spec in specs
    ]
    with torch.no_grad():
        tiny_any(torch.randint(0, VOCAB, (1, 8)))
    for hook in hooks:
        hook.remove()
    sites: dict[tuple[int, int], set[int]] = {}
    for spec in specs:
        sites.setdefault((spec.decoder_layer, spec.site), set()).add(seen[spec.name])
    assert all(len(addresses) == 1 for addresses in sites.values())
    assert len(set.union(*sites.values())) == len(sites)


def test_decoder_runs_every_decoder_layer_but_not_the_head(tiny_any):
    family = family_of(tiny_any.config)
    ran = []
    watched = [*family.layers(tiny_any), tiny_any.get_output_embeddings()]
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.append(module)) for module in watched
    ]
    with torch.no_grad():
        family.decoder(tiny_any)(torch.randint(0, VOCAB, (1, 8)))
    for hook in hooks:
        hook.remove()
    assert ran == family.layers(tiny_any)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, [range(3)]),
        (1, [range(1), range(1, 2), range(2, 3)]),
        (2, [range(2), range(2, 3)]),
        (9, [range(3)]),
    ],
)
def test_ranges_cover_the_model(tiny_llama, size, expected):
    assert list(family_of(tiny_llama.config).layer_ranges(tiny_llama, size)) == expected


def test_every_linear_is_a_unit_of_its_own(tiny_any):
    family = family_of(tiny_any.config)
    units, specs = family.units(tiny_any), family.linears(tiny_any)
    assert [x.linears for x in units] == [(spec,) for spec in specs]
    assert [(x.name, x.decoder_layer, x.params) for x in units] == [
        (spec.name, spec.decoder_layer, spec.m * spec.n) for spec in specs
    ]


def test_accepts_low_rank_linears(tiny_llama):
    family = family_of(tiny_llama.config)
    before = family.linears(tiny_llama)
    replace_linear(
        tiny_llama, before[0].name, LowRankLinear(before[0].n, before[0].m, 4, bias=False)
    )
    assert family.linears(tiny_llama) == before


@pytest.mark.parametrize("module", [nn.Conv1d(32, 32, 1), nn.Linear(32, 32, bias=False)])
def test_refuses_other_modules_by_name_and_type(tiny_llama, module):
    if isinstance(
        module, nn.Linear
    ):  # as 4-bit libraries do: a subclass of nn.Linear with packed integers inside
        module.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    replace_linear(tiny_llama, "model.layers.1.mlp.up_proj", module)
    with pytest.raises(
        UserError,
        match=r"model\.layers\.1\.mlp\.up_proj is a torch\.nn\..*supported are torch\.nn\.Linear",
    ) as error:
        family_of(tiny_llama.config).linears(tiny_llama)
    assert "\n" not in str(error.value)


def test_refuses_a_model_with_other_names(tiny_opt):
    with pytest.raises(UserError, match="OPTForCausalLM has no module 'model.layers'"):
        FAMILY_OF_TYPE["llama"].linears(tiny_opt)
    with pytest.raises(
        UserError, match=r"mlp\.gate_up_proj does not exist|self_attn\.qkv_proj does not exist"
    ):
        FAMILY_OF_TYPE["phi3"].linears(tiny_model("llama"))


def test_family_of_names_the_supported_types_and_how_to_add_one():
    with pytest.raises(UserError) as error:
        family_of(SimpleNamespace(model_type="mamba"))
    text = str(error.value)
    assert (
        "'mamba'" in text
        and "gemma2, llama, mistral, opt, phi3, qwen2, qwen3" in text
        and "families.py" in text
    )
    assert "\n" not in text


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_compressed_model_has_the_family_of_its_base(name):
    config = tiny_model(name).config
    compressed = SimpleNamespace(model_type=f"specomp_{config.model_type}")
    assert family_of(compressed) is family_of(config)
    assert base_model_type(compressed) == config.model_type


def test_tiny_models_are_seeded():
    one, two, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[key], two.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
