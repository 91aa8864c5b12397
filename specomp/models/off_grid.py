"""A model that computes the same with other numbers: none of its weights is on a grid any more.

The embedded weights are dequantized 4-bit ones (methods.md 14), so a rounding method could find the
very grid they came from. These are exact invariances of a decoder of LLaMA's kind; every channel is
stretched by a number of its own, and what reads it is shrunk by that:

    normed inputs    W_in diag(s), gain / s                  s in [0.8, 1.25]
    inner channels   diag(t) up, down diag(1 / t)
    values           diag(u) v, o diag(1 / u), one u for all query heads that share a value
"""

from typing import Any

import torch
from torch import Tensor, nn

from specomp.errors import UserError

SPREAD = 0.8, 1.25
SEED = 0


@torch.no_grad()
def moved_off_grid(model: nn.Module) -> None:
    """In place. Raises UserError for a model that is built otherwise."""
    config: Any = model.config
    if config.model_type != "llama" or getattr(config, "attention_bias", False):
        raise UserError(
            f"model.off_grid=true knows models of type 'llama' without biases, this is"
            f" '{config.model_type}': set it to false."
        )
    dice = torch.Generator().manual_seed(SEED)
    head = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads

    def stretch(size: int) -> Tensor:
        low, high = SPREAD
        return low * (high / low) ** torch.rand(size, generator=dice)

    layers: Any = model.model.layers  # type: ignore[union-attr]
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = stretch(config.hidden_size)
            norm.weight.div_(s)
            for reader in readers:
                reader.weight.mul_(s)
        t = stretch(config.intermediate_size)
        mlp.up_proj.weight.mul_(t[:, None])
        mlp.down_proj.weight.div_(t)
        u = stretch(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(u[:, None])
        attention.o_proj.weight.div_(u.view(-1, head).repeat_interleave(shared, 0).flatten())
