"""From a config and a folder (or hub repository) to a model that is ready to use: what all model
sources share.

Order of the checks: architecture from the config, then the files, then the weights; nothing large
is read before the small can fail.
"""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from specomp.cache import claim
from specomp.errors import UserError, one_line
from specomp.models.families import family_of
from specomp.models.family import COMPRESSED_PREFIX, ModelFamily
from specomp.models.files import some
from specomp.models.registration import register
from specomp.models.remote import OWN_FIELDS
from specomp.models.store import LayerStore, TensorFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, with what is needed to feed it and to find its
    linears.
    """

    model: PreTrainedModel
    tokenizer: Any  # of transformers; None where a folder has none
    family: ModelFamily
    store: LayerStore | None = None  # of a streamed model: where its decoder layers are
    # of a model that was rounded by others: what its file stores of the linears' weights (bits),
    # and of everything (bytes)
    stored: tuple[int, int] | None = None


def open_model(
    where: Path | str,
    config: PreTrainedConfig,
    *,
    dtype: str,
    device: str,
    device_map: str | None,
    without: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The causal LM of `config` with the weights at `where` (a checked folder or a hub repository),
    in eval mode.

    `dtype` may be "auto" (as saved). `options` go to from_pretrained. Raises UserError when a
    weight is absent or has another shape. without: part of the names of weights that are there and
    not wanted.
    """
    register()
    target = torch_device(device, device_map)
    # what the hub says of a repository is told by whoever asked it
    passing: tuple[type[Exception], ...] = () if os.path.isdir(where) else (OSError, ValueError)
    with (
        told(f"The model in {where} cannot be opened", passing=passing),
        _fitting(where, config),
        quiet(),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            output_loading_info=True,
            **options,
        )
        model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only warns, and leaves random weights
        raise UserError(
            f"{where} lacks {len(missing)} weights that its config.json asks for ({some(missing)}):"
            f" {_renamed(missing, info['unexpected_keys'])}."
        )
    unexpected = sorted(
        name for name in info["unexpected_keys"] if without is None or without not in name
    )
    if unexpected:
        log.warning(
            "%s: %d weights are not used by %s (%s)",
            where,
            len(unexpected),
            type(model).__name__,
            some(unexpected),
        )
    if device_map is None:
        model = model.to(target)
    return model.eval()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _fitting(where: Path | str, config: PreTrainedConfig) -> Iterator[None]:
    """What transformers raises about weights of another shape than the config says, with the first
    of them.
    """
    try:
        yield
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        found = _misfit(Path(where), config) if os.path.isdir(where) else None
        raise UserError(
            f"Weights of {where} do not fit its config.json: {found or one_line(error)}"
        ) from error


def _misfit(folder: Path, config: PreTrainedConfig) -> str | None:
    model = skeleton(config, "float32")
    stored = TensorFiles(folder).places
    for name, tensor in model.state_dict().items():
        base = name.removeprefix(f"{model.base_model_prefix}.")
        place = stored.get(name) or stored.get(base)
        if place is not None and place.shape != tuple(tensor.shape):
            return f"{name} is {place.shape}, expected {tuple(tensor.shape)}."
    return None


def _renamed(missing: Sequence[str], unexpected: Collection[str]) -> str:
    """Why weights are missing: they have other names, or are not there."""
    for name in unexpected:
        prefix = name.removesuffix(missing[0])
        if prefix != name and all(prefix + x in unexpected for x in missing):
            return f"there their names begin with '{prefix}': save them without it"
    return "the folder is incomplete"


@contextlib.contextmanager
def told(what: str, remedy: str = "", passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Anything that transformers raises about a folder, as one line; it has many ways. What is said
    already passes, and what lacks memory.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # the last is how torch tells of exhausted CPU memory
        if isinstance(error, passing) or "allocate memory" in str(error):
            raise
        end = f": {remedy}." if remedy else "."
        raise UserError(f"{what} ({one_line(error)}){end}") from error


def open_streamed(
    folder: Path,
    config: PreTrainedConfig,
    family: ModelFamily,
    *,
    dtype: str,
    device: str,
    **options: Any,
) -> tuple[PreTrainedModel, LayerStore]:
    """The model of a checked folder without its decoder layers, which come in when they are called.
    Raises UserError as `open_model`.
    """
    # What surrounds the decoder layers is what a model of none consists of: transformers loads,
    # ties and initializes it.
    none: dict[str, Any] = {"num_hidden_layers": 0, "layer_types": [], **dict.fromkeys(OWN_FIELDS)}
    hollow = copy.deepcopy(config)
    if packed := getattr(config, "quantization_config", None):
        del hollow.quantization_config
    for name, value in none.items():
        if getattr(config, name, None) is not None:
            setattr(hollow, name, value)
    leaf = family.decoder_layers.rpartition(".")[2]
    around = open_model(
        folder, hollow, dtype=dtype, device=device, device_map=None, without=f"{leaf}.", **options
    )
    # The rest is what the whole config makes: which masks a model prepares depends on its layers.
    trusted = {name: value for name, value in options.items() if name == "trust_remote_code"}
    with torch.device("meta"), told(f"The model in {folder} cannot be opened"), quiet():
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), dtype=around.dtype, **trusted
        )
    _graft(model, around, family.decoder_layers)
    model.generation_config = around.generation_config
    model.config.name_or_path = str(folder)
    model.requires_grad_(False).eval()
    store = LayerStore(
        family.layers(model),
        family.decoder_layers,
        model.base_model_prefix,
        TensorFiles(folder, packed),
        around.device,
    )
    return model, store


def _graft(target: nn.Module, source: nn.Module, layers: str) -> None:
    """Put the modules of `source` into `target`, all but those of the dotted name `layers`."""
    for name, child in source.named_children():
        head, _, rest = layers.partition(".")
        if name != head:
            for module in child.modules():
                if hasattr(module, "config"):
                    module.config = target.config  # type: ignore[assignment]
            setattr(target, name, child)
        elif rest:
            _graft(target.get_submodule(name), child, rest)


def read_config(where: Path | str, **options: Any) -> PreTrainedConfig:
    """The config of a folder or hub repository, compressed folders included. OSError or ValueError
    as transformers raises them.
    """
    register()
    with quiet():
        return AutoConfig.from_pretrained(where, **options)  # type: ignore[no-any-return]


def config_of_shape(shape: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """The config that a `shape` of conf/model describes. Raises UserError when transformers refuses
    it.
    """
    fields = dict(shape)
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"model.shape of {name} is refused: {one_line(error)}: correct it, or set"
            " model.shape=null."
        ) from error


def check_shape(
    shape: Mapping[str, Any] | None, config: PreTrainedConfig, where: Path | str
) -> None:
    """Whether the real config is what `shape` says. Raises UserError."""
    found = {key: getattr(config, key, None) for key in shape or {}}
    wrong = [
        f"{key} is {found[key]} where model.shape says {value}"
        for key, value in (shape or {}).items()
        if found[key] != value
    ]
    if wrong:
        raise UserError(
            f"{where}: {'; '.join(wrong)}: correct model.shape, or set model.shape=null to read the"
            " config itself."
        )


def skeleton(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """The causal LM of a config on the meta device: every module and shape, no weights and no
    memory.
    """
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-any-return, no-untyped-call]


def dense_family(config: PreTrainedConfig, where: Path | str) -> ModelFamily:
    """The family of a model that is to be compressed. Raises UserError when it is unsupported,
    compressed already or quantized.
    """
    family = family_of(config)
    if config.model_type.startswith(COMPRESSED_PREFIX):
        raise UserError(
            f"{where} is compressed already ({config.model_type}): compress its dense original, or"
            " open it with specomp.load."
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise UserError(
            f"{where} is quantized ({_quantization_name(quantization)}): start from the float16 or"
            " bfloat16 release."
        )
    return family


def context_length(config: PreTrainedConfig) -> int:
    """Tokens the model can attend to. Raises UserError when the config does not say."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UserError(
            f"The config of this {config.model_type} model has no max_position_embeddings: set it"
            " in its config.json."
        )
    return length


def torch_device(device: str, device_map: str | None) -> torch.device:
    """Resolve "auto" (CUDA, else MPS, else CPU) and check that the device exists. Raises UserError
    when it does not.

    Of several GPUs "auto" is the first that no other job of this machine holds, unless a device_map
    spreads the model over them.
    """
    if device_map is not None and device != "auto":
        raise UserError(
            f"model.device={device} and model.device_map={device_map} contradict each other: leave"
            " one of them unset."
        )
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        if cuda > 1 and device_map is None:
            return torch.device("cuda", claim("gpu", cuda))
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device}: {one_line(error)}") from error
    if (target.type == "cuda" and (target.index or 0) >= cuda) or (
        target.type == "mps" and not mps
    ):
        raise UserError(
            f"model.device={device} is not on this machine ({cuda} CUDA devices, MPS"
            f" {'yes' if mps else 'no'}): use model.device=auto."
        )
    return target


def device_name(device: torch.device) -> str:
    """What a reader knows the device by: the GPU's product name, else "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast parameters in place. Unlike model.to(dtype), leaves rotary frequencies in float32, as
    from_pretrained does: no reload would reproduce rounded ones.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, advice or warnings from transformers; errors still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _quantization_name(quantization: Any) -> str:
    settings = quantization if isinstance(quantization, dict) else vars(quantization)
    return str(settings.get("quant_method", "unknown method"))
