"""Decoder layers that live on disk: brought in from a folder of safetensors when they are needed,
and let go again.

A model whose decoder layers are on torch's meta device (names and shapes, no numbers) is usable as
it is: a decoder layer that is called brings itself in for that call. Where several calls follow
each other, `resident` keeps it in between. Parameters only: a module that needs numbers that no
file has (a buffer made by code) is refused.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from specomp.errors import UserError
from specomp.models.files import safetensors_header, shards, some
from specomp.models.packed import grids_of, unpacked


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    file: Path
    start: int
    stop: int
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a checked folder by name, read one at a time; what is packed is unpacked."""

    def __init__(self, folder: Path, quantization: Any = None) -> None:
        """quantization: what config.json says of packed weights."""
        self.folder = folder
        self.places: dict[str, _Place] = {}
        for file in shards(folder):
            offset, header = safetensors_header(file)
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, stop = tensor["data_offsets"]
                    self.places[name] = _Place(
                        file, offset + start, offset + stop, tuple(tensor["shape"])
                    )
        self.grids = {} if quantization is None else grids_of(quantization)
        self.stored = set(self.places)  # their names in the files
        for name in self.grids:
            place = self.places[f"{name}.weight_packed"]
            shape = tuple(self._read(f"{name}.weight_shape").tolist())
            self.places[f"{name}.weight"] = _Place(place.file, place.start, place.stop, shape)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, as it is stored. Do not keep it: it may be a view of the file."""
        owner = name.removesuffix(".weight")
        if owner == name or owner not in self.grids:
            return self._read(name)
        return unpacked(self.grids[owner], lambda part: self._find(f"{owner}.weight_{part}"))

    def parts(self, name: str) -> list[str]:
        """The names in the files of what a tensor is made from."""
        owner = name.removesuffix(".weight")
        packed = owner != name and owner in self.grids
        return [x for x in self.stored if x.startswith(f"{name}_")] if packed else [name]

    def _find(self, name: str) -> Tensor | None:
        return self._read(name) if name in self.stored else None

    def _read(self, name: str) -> Tensor:
        # Opened for this tensor alone, so that no page of the file stays in this process.
        with safe_open(self.places[name].file, framework="pt") as file:  # type: ignore[no-untyped-call]
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Let the system read ahead while something else is computed: into its file cache, which
        costs this process nothing.
        """
        if not hasattr(os, "posix_fadvise"):  # not on macOS
            return
        by_file: dict[Path, list[_Place]] = {}
        for place in (self.places[name] for name in names):
            by_file.setdefault(place.file, []).append(place)
        for path, places in by_file.items():
            with path.open("rb") as file:
                for place in places:
                    os.posix_fadvise(
                        file.fileno(), place.start, place.stop - place.start, os.POSIX_FADV_WILLNEED
                    )


class LayerStore:
    """Brings the decoder layers of a model in, one at a time, and lets them go."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        prefix: str,
        base: str,
        files: TensorFiles,
        device: torch.device,
    ) -> None:
        """layers: on the meta device, called `prefix`.0, `prefix`.1 ...; files that lack the
        model's `base` prefix will do.

        Raises UserError when a tensor is absent from the files, has another shape there, or could
        never be in them.
        """
        self.layers, self.files, self.device = list(layers), files, device
        self._prefix, self._base = prefix, base
        self._users = [0] * len(self.layers)
        self._check()
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._acquire(index))
            # Also after a call that failed.
            layer.register_forward_hook(
                lambda *_, index=index: self._release(index), always_call=True
            )

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Decoder layer `index` has its numbers while the block runs; changes of them are forgotten
        afterwards.
        """
        try:
            self._acquire(index)
            yield
        finally:
            self._release(index)

    def _acquire(self, index: int) -> None:
        self._users[index] += 1  # first, since a call that fails here is released too
        if self._users[index] == 1:
            layer = self.layers[index]
            for name, tensor in layer.state_dict(keep_vars=True).items():
                # A copy, since what was read may be a view of the file, in whose place it would be
                # kept.
                value = self.files.read(self._key(index, name)).to(
                    device=self.device, dtype=tensor.dtype, copy=True
                )
                owner, _, leaf = name.rpartition(".")
                trains = isinstance(tensor, nn.Parameter)
                setattr(
                    layer.get_submodule(owner),
                    leaf,
                    nn.Parameter(value, requires_grad=False) if trains else value,
                )
            if index + 1 < len(self.layers) and self._users[index + 1] == 0:
                self.files.prefetch(
                    key
                    for name in self.layers[index + 1].state_dict()
                    if (key := self._key(index + 1, name))
                )

    def _release(self, index: int) -> None:
        self._users[index] -= 1
        if self._users[index] == 0:
            self.layers[index].to("meta")
            _trim()

    def used(self) -> set[str]:
        """The names in the files of all that the decoder layers are made from."""
        keys = (self._key(i, x) for i, layer in enumerate(self.layers) for x in layer.state_dict())
        return {part for key in keys for part in self.files.parts(key)}

    def _key(self, index: int, name: str) -> str:
        """The name of a tensor of a decoder layer in the files."""
        full = f"{self._prefix}.{index}.{name}"
        return full if full in self.files.places else full.removeprefix(f"{self._base}.")

    def _check(self) -> None:
        tensors: list[tuple[int, str, Any]] = [
            (i, *item) for i, layer in enumerate(self.layers) for item in layer.state_dict().items()
        ]
        absent = [
            f"{self._prefix}.{i}.{name}"
            for i, name, _ in tensors
            if self._key(i, name) not in self.files.places
        ]
        if absent:
            raise UserError(
                f"{self.files.folder} lacks {len(absent)} weights that its config.json asks for"
                f" ({some(absent)}): incomplete."
            )
        for i, name, tensor in tensors:
            stored = self.files.places[self._key(i, name)].shape
            if stored != tuple(tensor.shape):
                raise UserError(
                    f"Weights of {self.files.folder} do not fit its config.json:"
                    f" {self._prefix}.{i}.{name} is {stored}, expected {tuple(tensor.shape)}."
                )
        known = {(i, name) for i, name, _ in tensors}
        made = [
            f"{self._prefix}.{i}.{name}"
            for i, x in enumerate(self.layers)
            for name, _ in x.named_buffers()
            if (i, name) not in known
        ]
        if made:
            raise UserError(
                f"{some(made)}: made by the model's code and in no file, so it cannot be streamed:"
                " set model.stream=false."
            )


def _trim() -> None:
    """Give back what is free: glibc keeps it where something small that lives longer lies behind it
    (SmolLM2: 250 MiB of 960).
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
