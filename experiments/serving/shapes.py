"""Models of LLaMA-7B's shapes with random weights, dense and compressed: how fast numbers are
multiplied does not depend on them.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specomp.forms.factors import LowRankLinear
from specomp.forms.pivoted import PivotedLinear
from specomp.models.families import family_of
from specomp.models.modules import PartLinear, replace_linear
from specomp.models.registration import adopt

LAYERS = 6  # of 32: the head, which stays dense, weighs more than in the whole model


def dense() -> PreTrainedModel:
    """In bfloat16, a few decoder layers."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: PreTrainedModel = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    return model


@torch.no_grad()
def small(form: str, removed: float, multiple: int = 1) -> PreTrainedModel:
    """Of the same shapes, every linear with the share of its numbers that is not removed.

    form: factors, pivoted, or cut: MLPs of fewer inner dimensions, attention as factors; multiple:
    of which ranks and inner dimensions are.
    """
    model = dense()
    for linear in family_of(model.config).linears(model):
        m, n, kept = linear.m, linear.n, (1 - removed) * linear.params
        options: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16}
        made: nn.Module
        if form == "cut" and ".mlp." in linear.name:
            inner = whole((1 - removed) * max(m, n), multiple)
            sizes = (inner, m) if linear.name.endswith("down_proj") else (n, inner)
            made = PartLinear(*sizes, **options)
        elif form == "pivoted":  # r (m + n - r) numbers
            rank = whole(((m + n) - ((m + n) ** 2 - 4 * kept) ** 0.5) / 2, multiple)
            made = PivotedLinear(n, m, rank, **options)
            made.order.copy_(torch.randperm(m))
        else:
            made = LowRankLinear(n, m, whole(kept / (m + n), multiple), **options)
        replace_linear(model, linear.name, made)
    adopt(model)
    return model


def whole(size: float, multiple: int) -> int:
    """The largest multiple that is not above."""
    return max(1, int(size) // multiple) * multiple
