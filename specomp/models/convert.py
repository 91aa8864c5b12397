"""specomp convert CHECKPOINT FOLDER --base MODEL: a model that SVD-LLM or ASVD compressed, as a
folder of specomp, which transformers opens and vLLM serves.

Read are state dicts: .pt and .bin files of tensors alone, safetensors, folders of either. No code
of a checkpoint is run, and no pickled module is opened.
"""

import argparse
import logging
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specomp.cache import Cache
from specomp.errors import UserError, one_line
from specomp.models.beside import COPIED
from specomp.models.card import CARD
from specomp.models.families import FAMILY_OF_TYPE, family_of
from specomp.models.family import COMPRESSED_PREFIX
from specomp.models.files import PICKLED, content_hash, model_folder, shards, some
from specomp.models.hub import hub_errors
from specomp.models.load import quiet, skeleton, told
from specomp.models.registration import register
from specomp.models.save import INFO_FILE, save_compressed
from specomp.models.sources import folder_tokenizer
from specomp.settings import default_cache

log = logging.getLogger(__name__)


class Scheme(NamedTuple):
    """How others call the factors of a linear W = U V, from its `name` and its `stem`, which is the
    name without _proj. Each is an nn.Linear of its own.
    """

    format: str
    u: str  # (m r), with the bias of the linear
    v: str  # (r n)


# Another format with factors is one more line.
SCHEMES = (
    # github.com/AIoT-MLSys-Lab/SVD-LLM, component/svd_llama.py, svd_mistral.py, svd_opt.py: in OPT
    # V has a bias too, which nobody sets (random numbers, which act).
    Scheme("SVD-LLM", "{stem}_u_proj", "{stem}_v_proj"),
    # github.com/hahnyuan/ASVD4LLM, modules/svd_linear.py, and its models on the hub: the head and
    # OPT's projections of embeddings are factored too.
    Scheme("ASVD", "{name}.ALinear", "{name}.BLinear"),
)
# In front of the architecture's name, where config.json has classes of the format's own (of ASVD:
# huggingface_repos/build_asvd_repo.py).
OWN_CLASSES = ("ASVD",)
# Of a config.json, what is not the architecture.
ABOUT = ("auto_map", "architectures", "model_type", "truncation_ranks", "dtype", "torch_dtype")
# What older modules store and newer ones compute, or do not have.
FREQUENCIES = "rotary_emb.inv_freq"
BUFFERS = (FREQUENCIES, "decoder.version")
# What is fetched of a base model on the hub: no weights.
BESIDE = ("config.json", "generation_config.json", CARD, *COPIED)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOW_RANK = "specomp.forms.factors.LowRankLinear"  # by name: it stands on a higher floor


def convert(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a folder that `load` and from_pretrained open, with the logits that the checkpoint has
    in the code it came from, to rounding.

    checkpoint: a state dict, or a folder of one. base: a folder or hub repository with the
    config.json of the dense model; None: the checkpoint's own. tokenizer: None: that of the
    checkpoint or of base. dtype: None: as stored, the widest where there are several (SVD-LLM has
    float32 factors beside float16 embeddings). Factored linears outside the decoder layers (ASVD's
    head) are multiplied out, biases of V become part of the linear's. Raises UserError for pickled
    modules, and where a tensor is missing, left over or of another shape.
    """
    path, folder = Path(checkpoint).expanduser(), Path(folder)
    files = weight_files(path)
    home = path if base is None and path.is_dir() else _home(base)
    kind, fields = architecture(home)
    with told(f"{home / 'config.json'} cannot be used"):
        stock = skeleton(CONFIG_MAPPING[kind].from_dict(fields), "float32")
    state = _unwrapped(state_dict(files), family_of(stock.config).decoder_layers)
    stored = [state.pop(x) for x in [*state] if x.endswith(BUFFERS)]
    _drop_tied(stock, state)
    found = Found.of(stock, state)
    if not found.formats:
        known = "; ".join(f"{x.format}'s q_proj: {x.u}, {x.v}" for x in SCHEMES)
        known = known.format_map({"name": "q_proj", "stem": "q"})
        raise UserError(f"{path} has no factored linear by a name that is known ({known}).")
    head = _head(stock)
    tied = fields.get("tie_word_embeddings", stock.config.tie_word_embeddings)
    fields = {**fields, "tie_word_embeddings": bool(tied) and head not in found.state}
    register()
    config = CONFIG_MAPPING[COMPRESSED_PREFIX + kind].from_dict(
        {**fields, "specomp_modules": found.entries}
    )
    found.check(path, home, config)
    model = _filled(config, found.state, dtype)
    _check_frequencies(path, home, model, [x for x in stored if x.numel() > 1])
    cache = Cache(default_cache())
    source = {"format": " and ".join(sorted(found.formats))}
    hashes = {x.name: content_hash(x, cache) for x in files}
    info: dict[str, Any] = {"converted": {**source, "files": hashes}}
    if base is not None:
        repo = {"source": "hub", "repo": str(base), "revision": home.name}
        info["base_model"] = {"name": home.name}
        if not _local(base):
            info["base_model"] = {"name": str(base), "source": repo}
    if found.merged:
        log.info("%s: multiplied out, as no decoder layer has them: %s", path, some(found.merged))
        info["converted"]["multiplied_out"] = found.merged
    tokenizer = tokenizer or _tokenizer(path, base)
    save_compressed(model, tokenizer, folder, form="factors", info=info, beside=home)
    return folder


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint. Raises UserError where there are none, or it is specomp's own."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name a file of weights, or a folder of them.")
    if (path / INFO_FILE).is_file():
        raise UserError(
            f"{path} is a folder of specomp already: open it with specomp.load, or serve it."
        )
    if not any(path.glob("*.safetensors*")):
        pickled = sorted({x for pattern in PICKLED for x in path.glob(pattern)})
        bins = sorted(path.glob("pytorch_model*.bin"))
        if bins or len(pickled) == 1:
            return bins or pickled
    return shards(path)


def state_dict(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors by name, read when they are used. Raises UserError for anything else."""
    state: dict[str, Tensor] = {}
    for path in files:
        read = load_file if path.suffix == ".safetensors" else _unpickled
        with told(f"{path} is no file of weights, or is damaged"):
            content = read(path)
        for name, tensor in content.items():
            if not isinstance(name, str):
                raise UserError(f"{path}: {name!r} is no name of a tensor.")
            if not isinstance(tensor, Tensor):
                raise UserError(
                    f"{path}: {name!r} is a {type(tensor).__name__}, where a tensor belongs: save"
                    " model.state_dict() alone."
                )
            if name in state:
                raise UserError(f"{name} is in {path.name} and in a file before it.")
            if tensor.dtype not in FLOATS and not name.endswith(BUFFERS):
                raise UserError(
                    f"{path}: {name} is stored as {tensor.dtype}: start from weights that are not"
                    " quantized."
                )
            state[name] = tensor.detach()
    return state


def _unpickled(path: Path) -> Mapping[str, Any]:
    """What torch's unpickler of tensors reads, which calls nothing that a file names."""
    zipped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is no file of torch
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        # what torch says here begins with how to open it in spite of that
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise UserError(
                f"{path} is no file of weights, or is damaged: torch does not read it"
                f" ({type(error).__name__}), and it is not called .safetensors."
            ) from error
        raise UserError(
            f"{path} is no state dict: it holds Python objects ({named[1]}), which only their own"
            " code opens, and no code of a checkpoint is run. Where it was written:"
            f" x = torch.load('{path.name}', weights_only=False); torch.save("
            "x['model'].state_dict(), 'state.pt'), as SVD-LLM saves models; then convert state.pt."
        ) from error
    for name in ("model", "state_dict"):  # {"model": state dict}
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, where a state dict belongs.")
    return content


def _local(base: str | Path) -> bool:
    return Path(base).expanduser().is_dir()


def _home(base: str | Path | None) -> Path:
    """The folder of a base model; of a repository of the hub what of it is no weights."""
    if base is None:
        raise UserError(
            "A file of weights does not say its architecture: name the dense model (--base, base=)."
        )
    if _local(base):
        return Path(base).expanduser()
    try:
        with hub_errors(str(base), "main"):
            return Path(snapshot_download(str(base), allow_patterns=list(BESIDE)))
    except UserError as error:
        raise UserError(f"base={base} is no folder here, and as a repository: {error}") from error


def architecture(home: Path) -> tuple[str, dict[str, Any]]:
    """The stock model_type of a folder's config.json, and its fields; what it says of classes of
    its own is no code that is run. Raises UserError.
    """
    model_folder(str(home))
    with told(f"{home / 'config.json'} cannot be used"):
        found, _ = PreTrainedConfig.get_config_dict(home, local_files_only=True)
    if found.get("quantization_config"):
        raise UserError(f"{home} is quantized: name the folder of the float16 or bfloat16 release.")
    known = {str(x): kind for kind, x in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    told_type, classes = str(found.get("model_type")), [str(x) for x in _listed(found)]
    bare = [reduce(str.removeprefix, OWN_CLASSES, x) for x in classes]
    for kind in (told_type, *(known.get(x) for x in bare)):
        if kind in FAMILY_OF_TYPE:
            return kind, {k: v for k, v in found.items() if k not in ABOUT}
    raise UserError(
        f"{home} is a {told_type} ({some(classes) or 'no architectures'}), which is not supported:"
        f" the base is the dense model, one of {', '.join(sorted(FAMILY_OF_TYPE))}."
    )


def _listed(config: Mapping[str, Any]) -> list[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def _unwrapped(state: dict[str, Tensor], layers: str) -> dict[str, Tensor]:
    """Without what stands in front of all names: `module.` of DataParallel, `model.` of a module
    around the model.
    """
    inside = next((x for x in state if f"{layers}.0." in x), "")
    prefix = inside.partition(layers)[0]
    if not all(x.startswith(prefix) for x in state):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _name(model: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, x in model.named_modules() if x is module), "")


def _head(model: PreTrainedModel) -> str:
    """The weight of the head."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return f"{_name(model, head)}.weight"


def _drop_tied(stock: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """A tied head is in state dicts of torch twice."""
    head, inputs = _head(stock), f"{_name(stock, stock.get_input_embeddings())}.weight"
    both = stock.config.tie_word_embeddings and head in state and inputs in state
    if both and torch.equal(state[head], state[inputs]):
        del state[head]


class Found(NamedTuple):
    """A checkpoint in the names of specomp."""

    state: dict[str, Tensor]
    entries: dict[str, list[Any]]  # as in config.json: what stands in the place of which linear
    formats: set[str]
    merged: list[str]  # linears that were multiplied out
    wrong: list[str]  # pairs that make no linear of this model
    called: dict[str, str]  # what a tensor is called in the checkpoint

    @classmethod
    def of(cls, stock: PreTrainedModel, state: Mapping[str, Tensor]) -> "Found":
        """Factors by any of the schemes; all else as it is."""
        made = cls(dict(state), {}, set(), [], [], {})
        inside = {x.name for x in family_of(stock.config).linears(stock)}
        for name, linear in stock.named_modules():
            if isinstance(linear, nn.Linear):
                for scheme, u, v in _pairs(name, made.state):
                    made.formats.add(scheme.format)
                    made._take(name, linear, u, v, inside=name in inside)
        return made

    def _take(self, name: str, linear: nn.Linear, u: str, v: str, *, inside: bool) -> None:
        """Put the pair of factors called `u` and `v` in the place of a linear."""
        state = self.state
        U, V, shape = state[f"{u}.weight"], state[f"{v}.weight"], tuple(linear.weight.shape)
        bias, inner = state.get(f"{u}.bias"), state.get(f"{v}.bias")
        fits = U.ndim == V.ndim == 2 and U.shape[1] == V.shape[0]
        fits = fits and (U.shape[0], V.shape[1]) == shape
        if not fits or (inner is not None and inner.shape != V.shape[:1]):
            shapes = f"{u} {tuple(U.shape)} and {v} {tuple(V.shape)}"
            self.wrong.append(f"{shapes} where the linear is {shape}")
            return
        for key in (f"{u}.weight", f"{v}.weight", f"{u}.bias", f"{v}.bias"):
            state.pop(key, None)
        if inner is not None:  # U (V x + inner) + bias
            wide = torch.promote_types(U.dtype, torch.float32)
            more = U.to(wide) @ inner.to(wide)
            bias = (more if bias is None else bias.to(wide) + more).to(U.dtype)
        if inside:
            sizes = {"in_features": shape[1], "out_features": shape[0], "rank": V.shape[0]}
            self.entries[name] = [LOW_RANK, {**sizes, "bias": bias is not None}]
            made = {f"{name}.v_proj.weight": (V, f"{v}.weight")}
            made |= {f"{name}.u_proj.weight": (U, f"{u}.weight")}
            places = f"{name}.u_proj.bias"
        else:
            wide = torch.promote_types(torch.promote_types(U.dtype, V.dtype), torch.float32)
            product = (U.to(wide) @ V.to(wide)).to(U.dtype)
            made, places = {f"{name}.weight": (product, f"{u}.weight")}, f"{name}.bias"
            self.merged.append(name)
        if bias is not None:
            made[places] = (bias, f"{u}.bias")
        for key, (tensor, called) in made.items():
            if key in state:  # the linear is there as well: told as left over
                state[f"{key} (beside {u})"] = state[key]
            state[key], self.called[key] = tensor, called

    def check(self, path: Path, home: Path, config: PreTrainedConfig) -> None:
        """Whether every tensor has a place and every place a tensor. Raises UserError."""
        made = skeleton(config, "float32")
        wanted = {name: tuple(x.shape) for name, x in made.state_dict().items()}
        if config.tie_word_embeddings:
            wanted.pop(_head(made), None)
        shapes = [
            f"{self.called.get(x, x)} is {tuple(self.state[x].shape)}, expected {shape}"
            for x, shape in wanted.items()
            if x in self.state and tuple(self.state[x].shape) != shape
        ]
        missing = sorted(self.called.get(x, x) for x in wanted if x not in self.state)
        surplus = sorted(x for x in self.state if x not in wanted)
        if self.wrong:  # their linears would be told as missing, and they as left over
            missing, surplus = [], []
        faults = {"missing": missing, "left over": surplus, "of another shape": self.wrong + shapes}
        said = [f"{len(x)} {what} ({some(x)})" for what, x in faults.items() if x]
        if said:
            raise UserError(f"{path} does not fit the config of {home}: {'; '.join(said)}.")


def _pairs(name: str, state: Mapping[str, Tensor]) -> Iterator[tuple[Scheme, str, str]]:
    """By which schemes the factors of a linear are there, and what they are called."""
    words = {"name": name, "stem": name.removesuffix("_proj")}
    for scheme in SCHEMES:
        u, v = scheme.u.format_map(words), scheme.v.format_map(words)
        if f"{u}.weight" in state and f"{v}.weight" in state:
            yield scheme, u, v


def _filled(
    config: PreTrainedConfig, state: dict[str, Tensor], dtype: str | None
) -> PreTrainedModel:
    """The model of these tensors, which are copied only where their dtype changes."""
    widest = reduce(torch.promote_types, {x.dtype for x in state.values()})
    chosen = widest if dtype is None else getattr(torch, dtype, None)
    if chosen not in FLOATS:
        raise UserError(f"dtype={dtype}: there are float32, float16 and bfloat16.")
    most = torch.finfo(chosen).max
    for name, tensor in state.items():
        # a bfloat16 has the range of a float32
        if tensor.dtype != chosen and not float(tensor.abs().max()) <= most:
            raise UserError(
                f"{name} has numbers up to {float(tensor.abs().max()):.3g}, {chosen} goes to"
                f" {most:.3g}: use another dtype."
            )
    with told("The converted weights cannot be put into the model"), quiet():
        loaded: Any = type(skeleton(config, "float32")).from_pretrained(
            None, config=config, state_dict=state, dtype=chosen, output_loading_info=True
        )
    model, report = loaded
    if lost := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise UserError(f"transformers has no place for, or did not find, {some(sorted(lost))}.")
    made: PreTrainedModel = model.requires_grad_(False).eval()
    return made


def _check_frequencies(
    path: Path, home: Path, model: PreTrainedModel, stored: Sequence[Tensor]
) -> None:
    """Whether the checkpoint rotates queries and keys as the config says: SVD-LLM's LLaMA has base
    10000 whatever the config says. Raises UserError.
    """
    own = [x.cpu() for name, x in model.named_buffers() if name.endswith(FREQUENCIES)]
    for tensor in stored:
        alike = [x for x in own if x.shape == tensor.shape]
        # half floats have few digits there
        near = (torch.allclose(tensor.float(), x.float(), rtol=0.01, atol=1e-6) for x in alike)
        if not any(near):
            raise UserError(
                f"{path} rotates queries and keys by other frequencies ({FREQUENCIES}, down to"
                f" {tensor.min():.3g}) than {home / 'config.json'} says: give a base whose"
                " rope_theta and rope_scaling are those it was made with."
            )


def _tokenizer(path: Path, base: str | Path | None) -> PreTrainedTokenizerBase | None:
    """That of the checkpoint, or of its base; a model does not fail for it."""
    local = None if base is None or not _local(base) else Path(base).expanduser()
    try:
        for place in (path, local):
            if place is not None and any(place.glob("tokenizer*")):
                return folder_tokenizer(place, trust_remote_code=False)
        if base is not None and local is None:
            with hub_errors(str(base), "main"), quiet():
                found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base))
                return found
    except UserError as error:
        log.warning("The folder gets no tokenizer: %s", one_line(error))
    return None


def main(typed: Sequence[str] | None = None) -> int:
    """The command. The exit code."""
    parser = argparse.ArgumentParser(prog="specomp convert", description=__doc__)
    parser.add_argument("checkpoint", help="a state dict (.pt, .bin, .safetensors), or a folder")
    parser.add_argument("folder", help="to write")
    parser.add_argument("--base", help="folder or ORG/NAME of the dense model, for its config.json")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; else as stored")
    asked = parser.parse_args(typed)
    try:
        folder = convert(asked.checkpoint, asked.folder, base=asked.base, dtype=asked.dtype)
    except UserError as error:
        sys.stderr.write(f"specomp: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0
