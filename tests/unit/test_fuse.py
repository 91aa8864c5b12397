"""Stacked first factors compute what the linears compute one by one, and leave names, numbers and
files as they were.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from specomp.forms.factors import LowRankLinear
from specomp.forms.pivoted import PivotedLinear
from specomp.models.families import family_of
from specomp.models.fuse import fuse, fused, unfuse
from specomp.models.modules import TwoStage, replace_linear


def compressed(kind: str, *, rank: int = 5) -> LlamaForCausalLM:
    """A tiny LLaMA whose linears are factorized, except the last decoder layer's k and v: nothing
    is shared there but gate and up.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    for linear in family_of(config).linears(model):
        if linear.decoder_layer == 1 and linear.kind in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        made: nn.Module = {"factors": LowRankLinear, "pivoted": PivotedLinear}[kind](
            linear.n, linear.m, rank, bias=False
        )
        replace_linear(model, linear.name, made)
    return model


@pytest.mark.parametrize("kind", ["factors", "pivoted"])
@torch.no_grad()
def test_same_outputs(kind: str) -> None:
    model, ids = compressed(kind), torch.arange(24).reshape(2, 12)
    before = model(ids).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    products = count_products(model)
    model(ids)
    alone = products.copy()
    with fused(model) as sites:
        assert sites == 3, "q, k, v and gate, up; gate, up"
        products.clear()
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
        assert torch.allclose(model(ids).logits, before, atol=1e-6), "again"
        assert len(alone) - len(products) / 2 == 3 + 2 + 2, (
            "first factors that are no products of their own any more"
        )
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert fuse(model) == 0, "it is already"
    assert torch.equal(model(ids).logits, before)


def count_products(model: nn.Module) -> list[str]:
    """Names of the first factors that run as modules, from now on."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, TwoStage):
            module.first.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


@torch.no_grad()
def test_no_activation_is_kept_and_a_cast_model_is_right() -> None:
    model, ids = compressed("factors"), torch.arange(12)[None]
    fuse(model)
    model(ids)
    stacked = vars(model.model.layers[0].self_attn.q_proj)["forward"].func.__self__
    assert stacked.seen is None and not stacked.parts
    wide = model.double()(ids).logits
    unfuse(model)
    assert torch.equal(model(ids).logits, wide)


@torch.no_grad()
def test_a_linear_that_runs_alone_is_right() -> None:
    """k before q, or q twice: whatever comes, each output is that of its own input."""
    model = compressed("factors")
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 3, 32)
    wanted = {
        name: (getattr(attention, name)(x), getattr(attention, name)(y))
        for name in ("q_proj", "k_proj", "v_proj")
    }
    fuse(model)
    for name, which in (
        ("k_proj", 0),
        ("k_proj", 0),
        ("q_proj", 1),
        ("v_proj", 0),
        ("q_proj", 0),
        ("k_proj", 1),
    ):
        assert torch.allclose(
            getattr(attention, name)((x, y)[which]), wanted[name][which], atol=1e-6
        )


def test_a_fused_model_is_saved_as_any_other(tmp_path) -> None:
    model = compressed("factors")
    fuse(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    factors = {name: value for name, value in model.state_dict().items() if "proj" in name}
    assert factors.keys() <= stored.keys()
    assert all(torch.equal(stored[name], value) for name, value in factors.items())
