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
form="gguf"     The same weights in one file for llama.cpp, model.gguf, in float16 (gguf_export.py);
form="gguf_q8_0" in 8 bits.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp import __version__
from specomp.cache import Cache
from specomp.checksums import checking, reseal, seal
from specomp.disk import disk_errors, whole_folder
from specomp.errors import UserError, one_line
from specomp.models.beside import write_beside
from specomp.models.card import CARD, write_card
from specomp.models.door import Walk, check_tokenizer, logits
from specomp.models.door import check as check_door
from specomp.models.families import family_of
from specomp.models.files import (
    GGUF,
    TOKEN_FILES,
    checked_folder,
    model_folder,
    safetensors_header,
)
from specomp.models.gguf_export import (
    TYPES,
    check_gguf,
    check_written,
    open_gguf,
    prepared,
    write_gguf,
)
from specomp.models.identity import (
    Form,
    check_form,
    hide_from_engines,
    write_identity,
    write_json,
)
from specomp.models.load import LoadedModel, open_model, quiet, read_config, torch_device
from specomp.models.modules import Substitute
from specomp.models.packed import (
    grid_linears,
    in_plain_groups,
    packed_state,
    quantization_config,
    unpack_model,
    unpacking,
)
from specomp.models.sources import folder_config, folder_tokenizer, streamed
from specomp.settings import default_cache

log = logging.getLogger(__name__)

INFO_FILE = "specomp.json"  # also marks a folder as ours, which may be replaced
MAX_SHARD = "5GB"
HALVES = (torch.float16, torch.bfloat16)
# Tried with vLLM 0.32: its kernels have no scheme for blocks, and a rank is no multiple of a group.
INTEGERS = (
    "its integers are packed in blocks that vLLM's kernels do not have; export=dense, or"
    " quantizer=none, is served"
)
# what decides its numbers; the rest of a folder may be edited
SEALED = ("*.safetensors", GGUF, "*.index.json", "config.json", INFO_FILE, "*.py", *TOKEN_FILES)


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    form: Form,
    info: dict[str, Any],
    cache: Cache | None = None,
    beside: Path | None = None,
    ours: bool = False,
) -> None:
    """Write a model, what stands in the place of its linears, its tokenizer, generation settings
    and `info` (specomp.json).

    The folder appears complete or not at all, and only when it was opened and gave the model's
    logits (models/door.py); an earlier export there is replaced. cache: where it is remembered that
    such folders open where specomp is not installed; None: the default one. beside: a folder whose
    licence and generation settings go with the model. ours: whatever is in the folder's place may
    be replaced. Raises UserError when the folder holds something else, when a linear is of another
    type, when the model cannot be opened again, and when the disk is full.
    """
    with exporting(folder, form, model, cache, beside, ours=ours) as export:
        export.finish(tokenizer, info)


@contextlib.contextmanager
def exporting(
    folder: Path,
    form: Form,
    model: PreTrainedModel,
    cache: Cache | None = None,
    beside: Path | None = None,
    *,
    ours: bool = False,
) -> Iterator["Export"]:
    """The same for a model that is never in memory as a whole: the decoder layers that were `add`ed
    need no numbers any more when it is finished.
    """
    folder = Path(folder).expanduser()
    folder = folder.absolute() if ours else folder.resolve()  # a link stays, and is written through
    ours = ours or (folder / INFO_FILE).is_file()
    if os.path.lexists(folder) and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and was not written by specomp: name another folder, or remove it."
        )
    with whole_folder(folder) as target:
        export = Export(target, folder, form, model, beside)
        yield export
        seal(target, SEALED)
        if form in TYPES:
            export.check_gguf()
        elif unserved := check_door(
            target,
            folder,
            export.logits,
            form=form,
            half=any(x.dtype in HALVES for x in model.parameters()),
            device=str(model.device),
            cache=cache or Cache(default_cache()),
        ):
            export.withhold(unserved)
        if tokenizer := export.tokenizer:
            check_tokenizer(target, folder, tokenizer)


class Export:
    """A folder that is being written."""

    def __init__(
        self, target: Path, folder: Path, form: Form, model: PreTrainedModel, beside: Path | None
    ) -> None:
        """target: where it is written until it is whole, and becomes `folder`."""
        if form not in get_args(Form):
            raise UserError(f"form={form}: there are {', '.join(get_args(Form))}.")
        if form in TYPES:
            check_gguf(model.config)
        self.target, self.folder, self.form = target, folder, form
        self.model, self.family, self.beside = model, family_of(model.config), beside
        self.files: list[dict[str, int]] = []  # bytes of every tensor, file by file
        self.walk: Walk | None = None  # through the decoder layers that are added
        self.logits: Tensor | None = None  # of the model before it was saved
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.told: dict[str, Any] = {}  # specomp.json

    def add(self, index: int) -> None:
        """Write one decoder layer of the model to a file of its own; a GGUF raises UserError."""
        if self.form in TYPES:
            raise UserError(f"export={self.form} writes models that are in memory as a whole.")
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
        if getattr(model.config, "quantization_config", None) is not None:
            raise UserError(
                "This model is quantized as transformers opens it: open its folder with"
                " specomp.load, and save that."
            )
        if self.walk is None and any(x.is_meta for x in model.parameters()):
            raise UserError("This model is not in memory: load it without stream=True to save it.")
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
        try:
            self.logits = logits(model) if self.walk is None else self.walk.logits()
        except RuntimeError as error:  # of several dtypes: one that was never meant to run
            log.warning(
                "%s: the model does not run (%s), so what is saved is not compared with it.",
                folder,
                one_line(error),
            )
        self._save_rest(model)
        self.tokenizer = tokenizer
        write_beside(target, tokenizer, self.beside)
        packed = form == "factors" and bool(grid_linears(model))
        # the stock architecture, of integers: any engine that reads such opens it
        plain = packed and not check_form(model, form)[0] and in_plain_groups(model)
        quantization = quantization_config(model) if packed else None
        write_identity(target, model, "dense" if plain else form, quantization)
        self.told = {"specomp": __version__, "form": form, **info}
        if plain:
            self.told["stock"] = True
        if form in TYPES:
            config, state = prepared(target, folder.name), merged_state(model)
            self.told["gguf"] = write_gguf(target, folder.name, config, state, tokenizer, form)
        unserved = {x.unserved for x in substitutes(model).values() if x.unserved}
        if form == "factors" and (unserved or (packed and not plain)):
            self.withhold("; ".join(sorted(unserved)) or INTEGERS)
        else:
            self._tell()

    def check_gguf(self) -> None:
        """Raises UserError where the file does not give back the model."""
        check_written(
            self.target,
            self.folder,
            read_config(self.target),
            merged_state(self.model),
            self.logits,
            self.tokenizer,
            self.form,
            self.told["gguf"].get("pre"),
        )

    def withhold(self, why: str) -> None:
        """Make serving engines refuse the folder, which they would load wrongly or not at all; its
        card says so.
        """
        log.warning("%s is for transformers only, serving engines refuse it: %s", self.folder, why)
        hide_from_engines(self.target)
        self.told["unserved"] = why
        self._tell()
        reseal(self.target, ["config.json", INFO_FILE])

    def _tell(self) -> None:
        """specomp.json, and the model card: that of the folder so far where somebody else wrote it.
        It never costs a model.
        """
        write_json(self.target / INFO_FILE, self.told)
        before = self.folder / CARD
        try:
            if before.is_file():
                shutil.copyfile(before, self.target / CARD)
            write_card(self.target, self.told, name=self.folder.name, source=self.beside)
        except Exception as error:
            log.warning("%s has no model card: %s", self.folder, one_line(error))

    def _save_rest(self, model: PreTrainedModel) -> None:
        """config.json, generation settings and what was not added; beside files that were, an index
        of all.
        """
        if self.form in TYPES:
            model.config.dtype = model.dtype
            model.config.save_pretrained(self.target)
            if model.can_generate():
                model.generation_config.save_pretrained(self.target)  # type: ignore[union-attr]
            return
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
        write_json(
            self.target / "model.safetensors.index.json",
            {
                "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
                "weight_map": weights,
            },
        )


def refresh(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, beside: Path | None
) -> list[str]:
    """Bring what goes with a saved model up to what its source has now: chat template, generation
    settings, licence. The names of the files that changed. Raises UserError where a GGUF holds
    what it was.
    """
    fixed = ("tokenizer", "chat_") if (folder / GGUF).is_file() else ()
    with disk_errors(folder):
        changed = write_beside(folder, tokenizer, beside, fixed=fixed)
        reseal(folder, changed)
    return changed


def checked_export(folder: Path) -> None:
    """Whether a folder has its weights, whole as far as headers tell. Raises UserError."""
    if not (model_folder(str(folder)) / GGUF).is_file():
        checked_folder(str(folder))


def _part_name(index: int, count: int | None = None) -> str:
    """A file of weights as transformers calls them; the count is known only at the end."""
    return (
        f"model-{index + 1:05d}.safetensors"
        if count is None
        else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def stored_state(module: nn.Module, form: Form) -> dict[str, Tensor]:
    """What a folder of this form stores of a model, or of a part of it."""
    if form != "factors":
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
    """The model in a folder that `save_compressed` wrote (any form), in eval mode on the CPU
    unless device or device_map say otherwise.

    dtype: "float32", "bfloat16", "float16", or None for the one it was saved in. stream: its
    decoder layers stay on disk until they are called. Raises UserError when the folder is damaged,
    or is not what was written.
    """
    path = model_folder(str(folder))
    config = folder_config(path, trust_remote_code=False)
    family = family_of(config)
    checked_export(path)
    packed = getattr(config, "quantization_config", None) is not None
    with checking(path):
        tokenizer = (
            folder_tokenizer(path, trust_remote_code=False)
            if any(path.glob("tokenizer*"))
            else None
        )
        if (path / GGUF).is_file():
            if stream:
                raise UserError(f"{path / GGUF} cannot be streamed: open it without stream=True.")
            kind: Any = config.dtype if dtype is None else getattr(torch, dtype, None)
            if kind not in (*HALVES, torch.float32):
                raise UserError(f"dtype={dtype}: there are float32, bfloat16 and float16.")
            model = open_gguf(path, config, kind or torch.float32, device_map)
        elif stream:
            return streamed(path, config, tokenizer, dtype=dtype or "auto", device=device)
        else:
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
    """What stands in the place of linears, by full dotted name; not what is inside such."""
    found: dict[str, Substitute] = {}
    for name, module in model.named_modules():  # outside in
        inside = any(name.startswith(f"{x}.") for x in list(found)[-1:])
        if isinstance(module, Substitute) and not inside:
            found[name] = module
    return found


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with what stands in the place of a linear multiplied out to `weight` (m n),
    and its bias under `bias`.
    """
    state, dtype = dict(model.state_dict()), next(model.parameters()).dtype
    for name, module in substitutes(model).items():
        bias = module.bias
        for part in module.state_dict():
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = module.merged_weight().to(dtype)
        if bias is not None:
            state[f"{name}.bias"] = bias.detach()
    return state
