"""The supported model families, one row each, and the look-up from a transformers config."""

from transformers import PreTrainedConfig

from specomp.errors import UserError
from specomp.models.family import Attention, Mlp, ModelFamily, Site, base_model_type

LLAMA = ModelFamily(
    # LLaMA 1-3, Vicuna, SmolLM2, Mistral, Qwen 2-3 and Gemma 2 name their linears alike
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma2"),
    decoder_layers="model.layers",
    sites=(
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Site(("self_attn.o_proj",)),
        Site(("mlp.gate_proj", "mlp.up_proj")),
        Site(("mlp.down_proj",)),
    ),
    mlp=Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),
    attention=Attention(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        rotary=True,
        normed=("qwen3",),
    ),
)

PHI3 = ModelFamily(
    name="phi3",  # q, k, v are one linear, gate and up another
    model_types=("phi3",),
    decoder_layers="model.layers",
    sites=(
        Site(("self_attn.qkv_proj",)),
        Site(("self_attn.o_proj",)),
        Site(("mlp.gate_up_proj",)),
        Site(("mlp.down_proj",)),
    ),
    mlp=Mlp(("mlp.gate_up_proj",), "mlp.down_proj", "intermediate_size"),
)

OPT = ModelFamily(
    name="opt",
    model_types=("opt",),
    decoder_layers="model.decoder.layers",
    sites=(
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Site(("self_attn.out_proj",)),
        Site(("fc1",)),
        Site(("fc2",)),
    ),
    mlp=Mlp(("fc1",), "fc2", "ffn_dim"),
    attention=Attention(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        rotary=False,
    ),
)

FAMILIES = (LLAMA, PHI3, OPT)
FAMILY_OF_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
# Trained with their BOS token in front of every text, and lost without it: published Gemma models
# have perplexities of thousands on windows that begin in mid-text.
NEED_BOS = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})


def needs_bos(config: PreTrainedConfig) -> bool:
    """Whether a model is only itself on sequences that begin with its BOS token."""
    return base_model_type(config) in NEED_BOS


def family_of(config: PreTrainedConfig) -> ModelFamily:
    """The family of a model, from its config alone. Raises UserError for a model_type that no
    family lists.
    """
    family = FAMILY_OF_TYPE.get(base_model_type(config))
    if family is None:
        raise UserError(
            f"Model type '{config.model_type}' is not supported; supported:"
            f" {', '.join(sorted(FAMILY_OF_TYPE))}. To add one, write a ModelFamily of about 10"
            " lines in specomp/models/families.py and add it to FAMILIES there."
        )
    return family
