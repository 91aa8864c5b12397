"""What a folder's config.json says the model is, in the words of transformers 4 and 5, and the
Python file that goes with classes which transformers has not.
"""

import inspect
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from specomp import __version__
from specomp.errors import UserError, first_line
from specomp.models.families import family_of
from specomp.models.family import COMPRESSED_PREFIX, base_model_type
from specomp.models.modules import Substitute, full_name
from specomp.models.remote import (
    OWN_FIELDS,
    compressed_config,
    compressed_model,
    shards_of,
    tell_apart,
)

Form = Literal["factors", "dense", "gguf", "gguf_q8_0"]

# of the machine the model was loaded on, no property of the model
MACHINE = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
)


def write_identity(
    folder: Path, model: PreTrainedModel, form: Form, quantization: dict[str, Any] | None = None
) -> None:
    """Say in a saved folder's config.json which classes open it, and write the code of those that
    transformers has not.
    """
    base = base_model_type(model.config)
    entries, switches = check_form(model, form)
    config = json.loads((folder / "config.json").read_text())
    # of the folder that the model itself was loaded from
    foreign = ("auto_map", "quantization_config", *OWN_FIELDS)
    kept = {key: value for key, value in config.items() if key not in foreign}
    quantized = {} if quantization is None else {"quantization_config": quantization}
    content = kept | switches | _identity(base, entries, form) | quantized
    write_json(folder / "config.json", for_all_versions(content))
    if form == "factors":
        (folder / f"{_file_stem(base)}.py").write_text(
            modelling_source(base, {type(model.get_submodule(name)) for name in entries})
        )


def hide_from_engines(folder: Path) -> None:
    """Take from config.json what serving engines ask for: they refuse the folder then."""
    config = json.loads((folder / "config.json").read_text())
    config.get("auto_map", {}).pop("AutoModel", None)
    write_json(folder / "config.json", config)


def check_form(model: PreTrainedModel, form: Form) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """What config.json says of the modules, and of biases, in a folder of this form. Raises
    UserError where it cannot hold the model.
    """
    names = [x.name for x in family_of(model.config).linears(model)]
    entries, biases = module_entries(model, names)
    if form == "factors":
        return entries, {}
    return entries, bias_switches(model, len(names), biases) | sizes_of(model)


def sizes_of(model: PreTrainedModel) -> dict[str, int]:
    """The config field with which the stock architecture has the MLPs that the model has. Raises
    UserError where they are of several sizes.
    """
    family = family_of(model.config)
    sizes = {unit.linears[-1].n for unit in family.mlps(model)}
    if len(sizes) > 1:
        raise UserError(
            f"The MLPs have {min(sizes)} to {max(sizes)} inner dimensions, a stock"
            f" {type(model).__name__} has one number for all: use export=factors, or"
            " method.units.equal=true."
        )
    if family.mlp is None or getattr(model.config, family.mlp.size) in sizes:
        return {}
    return {family.mlp.size: sizes.pop()}


# of version 4, by model type
OLD_WORDS = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}


def for_all_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with the words of version 4 beside: RoPE, and the dtype.

    Version 4 takes defaults for what it does not find, without a word.
    """
    found = {key: value for key, value in config.items() if key not in MACHINE}
    if "dtype" in found:
        found["torch_dtype"] = found["dtype"]
    base = str(found.get("model_type")).removeprefix(COMPRESSED_PREFIX)
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # one for all decoder layers
        scaling = {
            k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")
        }
        plain = scaling.get("rope_type", "default") == "default"
        found["rope_theta"] = rope["rope_theta"]
        if scaling.get("rope_type") == "longrope":  # version 4 asks for these three and no others
            scaling = {name: scaling[name] for name in ("short_factor", "long_factor")}
            scaling |= {"type": "longrope"}
        found["rope_scaling"] = None if plain else scaling
        if "partial_rotary_factor" in rope:
            found["partial_rotary_factor"] = rope["partial_rotary_factor"]
        for name, old in OLD_WORDS.get(base, {}).items():
            if name in rope:
                found[old] = rope[name]
    return found


def module_entries(
    model: PreTrainedModel, names: Sequence[str]
) -> tuple[dict[str, list[Any]], list[str]]:
    """[class, arguments] of those of these modules that are not what the stock architecture has
    there; and which have a bias where it has none (SoCo's deviation term).
    """
    stock = _stock(model.config)
    entries: dict[str, list[Any]] = {}
    biases: list[str] = []
    for name in names:
        module, plain = model.get_submodule(name), stock.get_submodule(name)
        if module.bias is not None and plain.bias is None:
            biases.append(name)
        if isinstance(module, Substitute):
            for part, made in module.named_modules(prefix=name):  # outside in, as they are made
                if isinstance(made, Substitute):
                    entries[part] = [full_name(type(made)), made.arguments()]
        elif _arguments(module) != _arguments(plain):
            entries[name] = [full_name(nn.Linear), _arguments(module)]
    return entries, biases


def check_biases(config: PreTrainedConfig) -> None:
    """Whether the dense form of this architecture can have an output bias on every linear, told
    before there is a model. Raises UserError where it cannot.
    """
    stock = _stock(config)
    names = [x.name for x in family_of(config).linears(stock)]
    bare = [name for name in names if stock.get_submodule(name).bias is None]
    bias_switches(stock, len(names), bare)


def _stock(config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture as transformers has it, without numbers."""
    base = base_model_type(config)
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "auto_map")}
    with torch.device("meta"):
        stock: PreTrainedModel = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base])(
            CONFIG_MAPPING[base](**fields)
        )
    return stock


def _arguments(linear: Any) -> dict[str, Any]:
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def bias_switches(model: PreTrainedModel, count: int, biases: Sequence[str]) -> dict[str, bool]:
    """The config fields with which the stock architecture has these biases. Raises UserError when
    there are none.
    """
    if not biases:
        return {}
    switches = ("attention_bias", "mlp_bias")
    if len(biases) == count and all(hasattr(model.config, x) for x in switches):
        return dict.fromkeys(switches, True)
    raise UserError(
        f"{len(biases)} of {count} linears have an output bias, which a stock"
        f" {type(model).__name__} cannot hold: use export=factors, or train with"
        " method.training.deviation=false."
    )


def modelling_source(base: str, kinds: Collection[type]) -> str:
    """The Python file that goes with the weights of a compressed `base` model: the classes of its
    modules, copied, and two lines.

    Raises UserError for a class whose source cannot be had.
    """
    config, model, inner = _class_names(base)
    own = [
        x
        for kind in sorted(kinds, key=full_name)
        for x in reversed(kind.__mro__)
        if issubclass(x, Substitute)
    ]
    ours = [compressed_config, shards_of, tell_apart, compressed_model]
    copied_items: list[Any] = [*dict.fromkeys(own), *ours]
    try:
        copied = "\n\n".join(inspect.getsource(item) for item in copied_items)
    except (OSError, TypeError) as error:
        raise UserError(
            f"The source of {', '.join(map(full_name, kinds))} cannot be copied into the folder:"
            f" {first_line(error)}."
        ) from error
    named = "".join(f'    "{full_name(x)}": {x.__name__},\n' for x in dict.fromkeys(own))
    return f'''"""A {base} model with other modules in place of some linears, as config.json says.

Written by specomp {__version__}. Loads with
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True), or after `import specomp`
without that option.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import {config}, {model}, {inner}


{copied}

KINDS = {{
    "{full_name(nn.Linear)}": nn.Linear,
{named}}}
Specomp{config} = compressed_config({config}, "{COMPRESSED_PREFIX}{base}")
Specomp{model}, Specomp{inner} = (
    compressed_model(base, Specomp{config}, lambda config, _: config.specomp_modules or {{}}, KINDS)
    for base in ({model}, {inner})
)
'''


def _identity(base: str, entries: dict[str, list[Any]], form: str) -> dict[str, Any]:
    """The fields of config.json that say which classes open the folder."""
    config, model, inner = _class_names(base)
    if form != "factors":
        return {"model_type": base, "architectures": [model]}
    classes = {
        "AutoConfig": f"{_file_stem(base)}.Specomp{config}",
        "AutoModelForCausalLM": f"{_file_stem(base)}.Specomp{model}",
        "AutoModel": f"{_file_stem(base)}.Specomp{inner}",  # what serving engines ask for
    }
    return {
        "model_type": COMPRESSED_PREFIX + base,
        "architectures": [f"Specomp{model}"],
        "auto_map": classes,
        "specomp_modules": entries,
    }


def _class_names(base: str) -> tuple[str, str, str]:
    """Of the config, the causal model, and the one without a head."""
    causal, inner = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base], str(MODEL_MAPPING_NAMES[base])
    return CONFIG_MAPPING[base].__name__, causal, inner


def _file_stem(base: str) -> str:
    return f"modeling_{COMPRESSED_PREFIX}{base}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
