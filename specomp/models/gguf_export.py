"""The merged model as one GGUF file for llama.cpp (form="gguf", form="gguf_q8_0").

Beside the file lie config.json and the tokenizer, which transformers reads it back with: what
llama.cpp has words for (scaled RoPE, soft caps, biases) transformers does not take from a GGUF.
Vectors are float32 as llama.cpp has them; matrices are of the file's type.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specomp.errors import UserError
from specomp.models.door import TEXTS, compare, logits
from specomp.models.family import base_model_type
from specomp.models.files import GGUF, some
from specomp.models.gguf_tokens import READ_ALIKE, refusal, token_fields
from specomp.models.load import quiet, read_config, told

log = logging.getLogger(__name__)

TYPES = {"gguf": "F16", "gguf_q8_0": "Q8_0"}  # of matrices, by form
FILE_TYPES = {"F16": 1, "Q8_0": 7}  # general.file_type, as llama.cpp counts them
LOGITS = {"F16": 0.02, "Q8_0": 0.2}  # largest relative error against the model before rounding
HALF = torch.finfo(torch.float16).max
# A block of Q8_0 has integers up to 127 and a scale in float16.
MOST = {"F16": HALF, "Q8_0": 127 * HALF, "F32": torch.finfo(torch.float32).max}
BLOCK = 32  # numbers of a row that share one scale in Q8_0
# llama.cpp's name, by model type; Mistral is a Llama there
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
}
ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh"}  # the others: silu
GEMMA2_27B = 46  # decoder layers, by which llama.cpp knows the one model with another scale


def check_gguf(config: PreTrainedConfig) -> None:
    """Whether a GGUF file can hold a model of this architecture, before there is one. Raises
    UserError where it cannot.
    """
    try:
        import gguf  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise UserError("export=gguf needs the Python package gguf: pip install gguf") from error
    architecture_fields(config)


def architecture_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What llama.cpp reads of the architecture, by key without the architecture's name. Raises
    UserError for what llama.cpp would compute otherwise.
    """
    kind = base_model_type(config)
    if kind not in ARCHITECTURES:
        raise refusal(f"models of type '{kind}' (known: {', '.join(ARCHITECTURES)})")
    heads, width = config.num_attention_heads, head_dim(config)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != ACTIVATIONS.get(kind, "silu"):
        raise refusal(f"the activation {activation} in models of type '{kind}'")
    if kind in ("qwen3", "gemma2") and getattr(config, "attention_bias", False):
        raise refusal(f"biases in the attention of models of type '{kind}'")
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **rope_fields(config),
    }
    if width * heads != config.hidden_size or kind in ("qwen3", "gemma2"):
        fields |= {"attention.key_length": width, "attention.value_length": width}
    return fields | (_gemma2_fields(config) if kind == "gemma2" else {})


def _gemma2_fields(config: Any) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    if None in caps.values() or not config.tie_word_embeddings:
        raise refusal("a Gemma 2 without soft caps, or with a head of its own")
    big = config.num_hidden_layers == GEMMA2_27B
    scale = config.hidden_size / config.num_attention_heads if big else head_dim(config)
    if config.query_pre_attn_scalar != scale:
        raise refusal(f"query_pre_attn_scalar={config.query_pre_attn_scalar} (it takes {scale:g})")
    kinds = [
        "full_attention" if i % 2 else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        raise refusal("a Gemma 2 whose layers do not slide every second time")
    return {"attention.sliding_window": config.sliding_window} | {
        name: float(cap) for name, cap in caps.items()
    }


def rope_fields(config: Any) -> dict[str, Any]:
    """Of rotary positions. Raises UserError for a scaling that llama.cpp has not."""
    rope = config.rope_parameters
    scaling, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    arch, size = ARCHITECTURES[base_model_type(config)], int(head_dim(config) * share)
    if share != 1 and arch != "phi3":
        raise refusal(f"partial_rotary_factor={share} in models of type '{arch}'")
    fields = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": size}
    if scaling == "linear":
        return fields | {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(rope["factor"]),
        }
    if scaling == "longrope" and arch == "phi3":
        _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        return fields | {
            "rope.scaling.original_context_length": config.original_max_position_embeddings,
            "rope.scaling.attn_factor": float(attention),
        }
    if scaling != "default" and (scaling, arch) != ("llama3", "llama"):
        raise refusal(f"rope_type={scaling} in models of type '{arch}'")
    return fields


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """By how much each frequency is divided, for the scalings that are no single number: tensors
    (rotated dimensions / 2).
    """
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        size = head_dim(config)
        plain = rope["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return {"rope_freqs.weight": (plain / found.double()).float()}
    if rope.get("rope_type") == "longrope":
        names = {"rope_factors_long.weight": "long_factor"}
        names |= {"rope_factors_short.weight": "short_factor"}
        return {name: torch.tensor(rope[x], dtype=torch.float32) for name, x in names.items()}
    return {}


def head_dim(config: Any) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int:
    """In tokens: no more than a sliding window, where llama.cpp has none, since both are the same
    within.
    """
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window and (layers is None or "sliding_attention" in layers)
    full = config.max_position_embeddings
    return min(window, full) if slides and base_model_type(config) != "gemma2" else full


def write_gguf(
    folder: Path,
    name: str,
    config: Any,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    form: str,
) -> dict[str, Any]:
    """Write model.gguf into `folder`. What of it specomp.json says.

    name: of the model; config: that of the folder; state: of the merged model, which is emptied on
    the way. Raises UserError for numbers and tokenizers that the file cannot hold.
    """
    import gguf

    arch, fields = ARCHITECTURES[base_model_type(config)], architecture_fields(config)
    if any(x.dtype == torch.float32 for x in state.values()):
        log.info("%s: float32 weights are rounded to %s.", name, TYPES[form])
    general = {"name": name, "type": "model", "file_type": FILE_TYPES[TYPES[form]]}
    general["quantization_version"] = gguf.GGML_QUANT_VERSION
    tokens = token_fields(tokenizer, config.vocab_size)
    metadata = {f"general.{key}": value for key, value in general.items()}
    metadata |= {f"{arch}.{key}": value for key, value in fields.items()}
    metadata |= {f"tokenizer.{key}": value for key, value in tokens.items()}
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every file
    writer = gguf.GGUFWriter(folder / GGUF, arch)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for key, tensor in rope_tensors(config).items():
        writer.add_tensor(key, tensor.numpy())
    named, coarse = _names(config), []
    for key in list(state):
        tensor = state.pop(key)
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = type_of(tensor, form)
        if kind != TYPES[form] and tensor.ndim > 1:
            coarse.append(key)
        laid = laid_out(tensor, key, config)
        largest, most = float(laid.abs().max()), MOST[kind]
        if not largest <= most:  # nor where it is no number
            raise refusal(f"numbers up to {largest:.3g} of {key} as {kind} (largest: {most:.3g})")
        writer.add_tensor(named(key), _packed(laid, kind), raw_dtype=_type(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if coarse:
        log.warning(
            "%s: %d matrices are F16, their rows do not divide by %d (%s).",
            name,
            len(coarse),
            BLOCK,
            some(coarse),
        )
    pre = tokens.get("ggml.pre")
    return {"type": TYPES[form], "left_f16": coarse} | ({"pre": pre} if pre else {})


def _names(config: Any) -> Callable[[str], str]:
    """llama.cpp's name of a tensor, by that of transformers; UserError where it has none."""
    import gguf

    arch = ARCHITECTURES[base_model_type(config)]
    (known,) = (x for x, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(known, config.num_hidden_layers)

    def named(key: str) -> str:
        found = table.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise refusal(f"{key} in models of type '{arch}'")
        return str(found)

    return named


def type_of(tensor: Tensor, form: str) -> str:
    """What a tensor is stored as."""
    if tensor.ndim == 1:
        return "F32"
    return "F16" if tensor.shape[-1] % BLOCK else TYPES[form]


def laid_out(tensor: Tensor, key: str, config: Any) -> Tensor:
    """A tensor in float32 as llama.cpp has it: of a Llama the two halves of a query and key head,
    which rotate together, are interleaved; to Gemma's norms 1 is added.
    """
    tensor, kind = tensor.detach().cpu().float(), base_model_type(config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if ARCHITECTURES[kind] == "llama" and (of := key.split(".")[-2]) in heads:
        rows = tensor.reshape(heads[of], 2, -1, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape)
    return tensor + 1 if kind == "gemma2" and key.endswith("norm.weight") else tensor


def _type(kind: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[kind]


def _packed(tensor: Tensor, kind: str) -> Any:
    """The numpy array of a tensor's bytes."""
    import gguf

    return gguf.quants.quantize(tensor.contiguous().numpy(), _type(kind))


def rounded(tensor: Tensor, form: str) -> Tensor:
    """A tensor as the file gives it back, in float32."""
    import gguf

    kind = type_of(tensor, form)
    packed = _packed(tensor.detach().cpu().float(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, _type(kind)).copy())


def prepared(folder: Path, name: str) -> PreTrainedConfig:
    """The config of a folder as the file holds it, which config.json says from now on: a Mistral is
    a Llama, whose context is the window.
    """
    config, path = read_config(folder), folder / "config.json"
    context, kind = context_length(config), base_model_type(config)
    if context < config.max_position_embeddings:
        log.warning(
            "%s: its context is the sliding window, %d tokens: llama.cpp has no window in models of"
            " type '%s'.",
            name,
            context,
            ARCHITECTURES[kind],
        )
    if kind != "mistral":
        return config
    content = json.loads(path.read_text())
    content |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    content |= {"max_position_embeddings": context, "sliding_window": None}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return read_config(folder)


def open_gguf(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device_map: str | None = None
) -> PreTrainedModel:
    """The model of such a folder, its weights multiplied out again. Raises UserError for a damaged
    file.
    """
    import gguf

    with told(f"{folder / GGUF} cannot be read"), silent():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF,
            config=config,
            dtype=dtype,
            device_map=device_map,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        fields = gguf.GGUFReader(folder / GGUF).fields
        layers = next(x for name, x in fields.items() if name.endswith(".block_count")).contents()
    model, report = loaded
    if lost := sorted(report["missing_keys"]):
        raise UserError(f"{folder / GGUF} lacks {len(lost)} weights of config.json: {some(lost)}.")
    if layers != config.num_hidden_layers:
        raise UserError(
            f"{folder / GGUF} has {layers} decoder layers, config.json says"
            f" {config.num_hidden_layers}."
        )
    made: PreTrainedModel = model.eval()
    return made


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without a progress bar of tensors."""
    with (
        quiet(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def check_written(
    folder: Path,
    name: Path,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    wanted: Tensor | None,
    tokenizer: Any,
    form: str,
    pre: str | None,
) -> None:
    """Raises UserError where the file in `folder`, which is to be called `name`, does not give back
    what was written: every number as the file's type rounds it, the logits, the tokenizer's ids.

    config: that of the folder; state: of the merged model; wanted: its logits, None where there
    are none; pre: what the file calls the way its tokenizer splits texts.
    """
    again = open_gguf(folder, config, torch.float32)
    held = again.state_dict()
    shift = 1.0 if base_model_type(config) == "gemma2" else 0.0
    off = [x for x in held if x not in state]
    for key, tensor in state.items():
        if key == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        norm = shift if key.endswith("norm.weight") else 0.0  # as it was added, in float32
        asked = rounded(tensor.detach().cpu().float() + norm, form) - norm
        if key not in held or not torch.equal(held[key], asked):
            off.append(key)
    if off:
        raise UserError(
            f"{name} is not saved: read back from {GGUF}, {len(off)} of {len(held)} weights are"
            f" others ({some(off)}): report this with the model's config.json."
        )
    if wanted is not None:
        what = f"{name} is not saved: read back from {GGUF} it"
        compare(wanted, logits(again), LOGITS[TYPES[form]], what)
    if tokenizer is not None:
        _check_tokens(folder, name, tokenizer, pre)


def _check_tokens(folder: Path, name: Path, tokenizer: Any, pre: str | None) -> None:
    """Where transformers splits by the file's own rule, ids that differ refuse the folder."""
    with told(f"{name} is not saved: the tokenizer in {GGUF}"), silent():
        again = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    for text in TEXTS:
        wanted, got = (x(text, verbose=False)["input_ids"] for x in (tokenizer, again))
        if wanted == got:
            continue
        if pre in READ_ALIKE:
            raise UserError(
                f"{name} is not saved: the tokenizer read from {GGUF} makes {got} of {text!r}, not"
                f" {wanted}: use export=dense."
            )
        log.warning(
            "%s: of the tokenizer in %s transformers makes %s of %r, not %s.",
            name,
            GGUF,
            got,
            text,
            wanted,
        )
