"""Compressed models on disk: folders that transformers loads like any other, bit for bit what was
saved.

form="factors"  What is stored, as it is. The config has a model_type of its own (specomp_llama) and
says what stands in the place
                of which linear; one generated Python file makes the folder self-contained. Loads by
                plain AutoModelForCausalLM after `import specomp`, or without specomp by
                trust_remote_code=True; with neither, transformers refuses. Rounded weights are
                packed (packed.py), and need compressed-tensors to be read.
form="dense"    Multiplied out to plain linears under the original model_type: loads everywhere,
saves no memory.
"""

import contextlib
import inspect
import json
import logging
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specomp import __version__
from specomp.cache import Cache
from specomp.checksums import checking, reseal, seal
from specomp.disk import disk_errors, whole_folder
from specomp.errors import UserError, first_line
from specomp.models.door import Walk, logits
from specomp.models.door import check as check_door
from specomp.models.families import COMPRESSED_PREFIX, base_model_type, family_of
from specomp.models.files import TOKEN_FILES, checked_folder, model_folder, safetensors_header
from specomp.models.load import LoadedModel, open_model, quiet, torch_device
from specomp.models.modules import Substitute
from specomp.models.packed import (
    grid_linears,
    packed_state,
    quantization_config,
    unpack_model,
    unpacking,
)
from specomp.models.portable import for_all_versions, write_beside
from specomp.models.registration import full_name
from specomp.models.remote import OWN_FIELDS, compressed_config, compressed_model
from specomp.models.sources import folder_config, folder_tokenizer, streamed
from specomp.settings import default_cache

log = logging.getLogger(__name__)

INFO_FILE = "specomp.json"  # also marks a folder as ours, which may be replaced
MAX_SHARD = "5GB"
# what decides its numbers; the rest of a folder may be edited
SEALED = ("*.safetensors", "*.json", "*.py", *TOKEN_FILES)
Form = Literal["factors", "dense"]


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    form: Form,
    info: dict[str, Any],
    cache: Cache | None = None,
    beside: Path | None = None,
) -> None:
    """Write a model, what stands in the place of its linears, its tokenizer, generation settings
    and `info` (specomp.json).

    The folder appears complete or not at all, and only when it was opened and gave the model's
    logits (models/door.py); an earlier export there is replaced. cache: where it is remembered that
    such folders open where specomp is not installed; None: the default one. beside: a folder whose
    licence and generation settings go with the model. Raises UserError when the folder holds
    something else, when a linear is of another type, when the model cannot be opened again, and
    when the disk is full.
    """
    with exporting(folder, form, model, cache, beside) as export:
        export.finish(tokenizer, info)


@contextlib.contextmanager
def exporting(
    folder: Path,
    form: Form,
    model: PreTrainedModel,
    cache: Cache | None = None,
    beside: Path | None = None,
) -> Iterator["Export"]:
    """The same for a model that is never in memory as a whole: the decoder layers that were `add`ed
    need no numbers any more when it is finished.
    """
    folder = Path(folder).expanduser().absolute()
    ours = (folder / INFO_FILE).is_file()
    if os.path.lexists(folder) and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and was not written by specomp: name another folder, or remove it."
        )
    with whole_folder(folder) as target:
        export = Export(target, folder, form, model, beside)
        yield export
        if export.logits is not None:
            seal(target, SEALED)
            known = cache or Cache(default_cache())
            check_door(target, folder, export.logits, form, str(model.device), known)


class Export:
    """A folder that is being written."""

    def __init__(
        self, target: Path, folder: Path, form: Form, model: PreTrainedModel, beside: Path | None
    ) -> None:
        """target: where it is written until it is whole, and becomes `folder`."""
        self.target, self.folder, self.form = target, folder, form
        self.model, self.family, self.beside = model, family_of(model.config), beside
        self.files: list[dict[str, int]] = []  # bytes of every tensor, file by file
        self.walk: Walk | None = None  # through the decoder layers that are added
        self.logits: Tensor | None = None  # of the model before it was saved

    def add(self, index: int) -> None:
        """Write one decoder layer of the model to a file of its own."""
        if self.walk is None:
            self.walk = Walk(self.model)
        self.walk.step(index)
        module = self.family.layers(self.model)[index]
        name = f"{self.family.decoder_layers}.{index}"
        state = {
            f"{name}.{key}": tensor.detach().cpu().contiguous()
            for key, tensor in stored_state(module, self.form).items()
        }
        save_file(state, self.target / _part_name(len(self.files)), metadata={"format": "pt"})
        self.files.append({key: tensor.nbytes for key, tensor in state.items()})

    def finish(self, tokenizer: PreTrainedTokenizerBase | None, info: dict[str, Any]) -> None:
        """Write all that was not added, and what makes the folder a model."""
        folder, target, form, model = self.folder, self.target, self.form, self.model
        check_form(model, form)
        dtypes = {
            parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()
        }
        if len(dtypes) > 1:
            log.warning(
                "%s: weights of several dtypes (%s); loading casts them to one.",
                folder,
                ", ".join(sorted(map(str, dtypes))),
            )
        self.logits = logits(model) if self.walk is None else self.walk.logits()
        self._save_rest(model)
        write_beside(target, tokenizer, self.beside)
        packed = form == "factors" and bool(grid_linears(model))
        write_identity(target, model, form, quantization_config(model) if packed else None)
        _write_json(target / INFO_FILE, {"specomp": __version__, "form": form, **info})

    def _save_rest(self, model: PreTrainedModel) -> None:
        """config.json, generation settings and what was not added; beside files that were, an index
        of all.
        """
        if not self.files:
            with quiet():
                PreTrainedModel.save_pretrained(
                    model,
                    self.target,
                    state_dict=stored_state(model, self.form),
                    max_shard_size=MAX_SHARD,
                )
            return
        added = {name for file in self.files for name in file}
        rest = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
        # In a folder of its own, since it would remove the files that are there as those of an
        # earlier save.
        with tempfile.TemporaryDirectory(dir=self.target) as temporary, quiet():
            PreTrainedModel.save_pretrained(
                model, temporary, state_dict=dict(rest), max_shard_size=sys.maxsize
            )  # which takes it apart
            os.replace(
                Path(temporary) / "model.safetensors", self.target / _part_name(len(self.files))
            )
            for path in Path(temporary).iterdir():
                os.replace(path, self.target / path.name)
        names = safetensors_header(self.target / _part_name(len(self.files)))[1].keys() - {
            "__metadata__"
        }
        assert not names & added, "written twice"
        self.files.append({name: rest[name].nbytes for name in names})
        count = len(self.files)
        for index in range(count):
            os.replace(self.target / _part_name(index), self.target / _part_name(index, count))
        weights = {
            name: _part_name(index, count)
            for index, file in enumerate(self.files)
            for name in sorted(file)
        }
        size = sum(sum(file.values()) for file in self.files)
        _write_json(
            self.target / "model.safetensors.index.json",
            {
                "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
                "weight_map": weights,
            },
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
    _write_json(folder / "config.json", for_all_versions(content))
    if form == "factors":
        (folder / f"{_file_stem(base)}.py").write_text(
            modelling_source(base, {type(model.get_submodule(name)) for name in entries})
        )


def check_form(model: PreTrainedModel, form: Form) -> tuple[dict[str, list[Any]], dict[str, bool]]:
    """What config.json says of the modules, and of biases, in a folder of this form. Raises
    UserError where it cannot hold the model.
    """
    names = [x.name for x in family_of(model.config).linears(model)]
    entries, biases = module_entries(model, names)
    return entries, bias_switches(model, len(names), biases) if form == "dense" else {}


def refresh(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, beside: Path | None
) -> list[str]:
    """Bring what goes with a saved model up to what its source has now: chat template, generation
    settings, licence. The names of the files that changed.
    """
    with disk_errors(folder):
        changed = write_beside(folder, tokenizer, beside)
        reseal(folder, changed)
    return changed


def _part_name(index: int, count: int | None = None) -> str:
    """A file of weights as transformers calls them; the count is known only at the end."""
    return (
        f"model-{index + 1:05d}.safetensors"
        if count is None
        else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def stored_state(module: nn.Module, form: Form) -> dict[str, Tensor]:
    """What a folder of this form stores of a model, or of a part of it."""
    if form == "dense":
        return merged_state(module)
    return packed_state(module) if grid_linears(module) else dict(module.state_dict())


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    device_map: str | None = None,
    device: str = "cpu",
    stream: bool = False,
) -> LoadedModel:
    """The model in a folder that `save_compressed` wrote (either form), in eval mode on the CPU
    unless device or device_map say otherwise.

    dtype: "float32", "bfloat16", "float16", or None for the one it was saved in. stream: its
    decoder layers stay on disk until they are called. Raises UserError when the folder is damaged,
    or is not what was written.
    """
    path = model_folder(str(folder))
    config = folder_config(path, trust_remote_code=False)
    family = family_of(config)
    checked_folder(str(path))
    packed = getattr(config, "quantization_config", None) is not None
    with checking(path):
        tokenizer = (
            folder_tokenizer(path, trust_remote_code=False)
            if any(path.glob("tokenizer*"))
            else None
        )
        if stream:
            return streamed(path, config, tokenizer, dtype=dtype or "auto", device=device)
        with unpacking() if packed else contextlib.nullcontext():
            model = open_model(
                path,
                config,
                dtype=dtype or "auto",
                device="cpu" if device_map is None else "auto",
                device_map=device_map,
            )
    if packed:
        unpack_model(model)
    if device_map is None:
        model.to(torch_device(device, None))  # type: ignore[arg-type]
    return LoadedModel(model, tokenizer, family)


def substitutes(model: nn.Module) -> dict[str, Substitute]:
    """What stands in the place of linears, by full dotted name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Substitute)
    }


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
            entries[name] = [full_name(type(module)), module.arguments()]
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


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with what stands in the place of a linear multiplied out to `weight` (m n),
    and its bias under `bias`.
    """
    state = dict(model.state_dict())
    for name, module in substitutes(model).items():
        dtype = next(module.parameters()).dtype
        bias = module.bias
        for part in module.state_dict():
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = module.merged_weight().to(dtype)
        if bias is not None:
            state[f"{name}.bias"] = bias.detach()
    return state


def modelling_source(base: str, kinds: Collection[type]) -> str:
    """The Python file that goes with the weights of a compressed `base` model: the classes of its
    modules, copied, and two lines.

    Raises UserError for a class whose source cannot be had.
    """
    config, model = _class_names(base)
    own = [
        x
        for kind in sorted(kinds, key=full_name)
        for x in reversed(kind.__mro__)
        if issubclass(x, Substitute)
    ]
    copied_items: list[Any] = [*dict.fromkeys(own), compressed_config, compressed_model]
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
from transformers import {config}, {model}


{copied}

KINDS = {{
    "{full_name(nn.Linear)}": nn.Linear,
{named}}}
Specomp{config} = compressed_config({config}, "{COMPRESSED_PREFIX}{base}")
Specomp{model} = compressed_model(
    {model}, Specomp{config}, lambda config, _: config.specomp_modules or {{}}, KINDS
)
'''


def _identity(base: str, entries: dict[str, list[Any]], form: str) -> dict[str, Any]:
    """The fields of config.json that say which classes open the folder."""
    config, model = _class_names(base)
    if form == "dense":
        return {"model_type": base, "architectures": [model]}
    classes = {
        "AutoConfig": f"{_file_stem(base)}.Specomp{config}",
        "AutoModelForCausalLM": f"{_file_stem(base)}.Specomp{model}",
    }
    return {
        "model_type": COMPRESSED_PREFIX + base,
        "architectures": [f"Specomp{model}"],
        "auto_map": classes,
        "specomp_modules": entries,
    }


def _class_names(base: str) -> tuple[str, str]:
    return CONFIG_MAPPING[base].__name__, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base]


def _file_stem(base: str) -> str:
    return f"modeling_{COMPRESSED_PREFIX}{base}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
