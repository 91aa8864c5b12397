"""Tiny random models of every supported architecture, and a tokenizer for them: offline, seeded,
milliseconds.
"""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specomp.cache import Cache
from specomp.models.sources import RandomModel, byte_tokenizer

VOCAB = 264  # 256 bytes, 3 special tokens, rounded up to a multiple of 8
CONTEXT = 256
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
}
# weights wide enough that the linears matter against the residual stream
GATED = {**SIZES, "intermediate_size": 88, "num_hidden_layers": 2, "initializer_range": 0.1}
GQA = {**GATED, "num_key_value_heads": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**GATED, "num_hidden_layers": 3, "num_key_value_heads": 4}),
    "llama_gqa": ("llama", {**GQA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**GQA, "sliding_window": 16}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", {**GQA, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GQA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi3": ("phi3", GQA),
    "opt": (
        "opt",
        {
            **SIZES,
            "word_embed_proj_dim": 32,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "init_std": 0.1,
        },
    ),
}
FAMILY_NAMES = tuple(CONFIGS)


def tiny_model(family_name: str, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model on the CPU in eval mode; `family_name` is one of FAMILY_NAMES."""
    architecture, config = CONFIGS[family_name]
    source = RandomModel(
        name=f"tiny_{family_name}",
        dtype="float32",
        device="cpu",
        device_map=None,
        architecture=architecture,
        seed=seed,
        config=config,
    )
    return source.load(Cache("unused")).model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, pads on the left."""
    return byte_tokenizer()


def bare_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Token = byte; 0 is the end token, the only special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {symbol: index for index, symbol in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **options)
