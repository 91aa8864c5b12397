"""Training of the scales of grids, and of norms and biases (methods/scales.py).

While it trains, a weight is its value times a multiple for every group of its numbers; afterwards
the multiples are in the scales, rounded as scales are stored.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from specomp.compression.run import Run
from specomp.models.family import ModelFamily
from specomp.models.modules import CodedLinear, GridLinear, replace_linear
from specomp.training.recovery import recovered
from specomp.training.teacher import TeacherStates


class Multiple(nn.Module):
    """A tensor times `gain`, one number for every `size` numbers of it that follow each other: in
    each row for itself (the last group has what is left), or in the whole tensor.
    """

    def __init__(self, like: Tensor, size: int, by_row: bool) -> None:
        super().__init__()
        self.size, self.by_row = size, by_row
        shape = self._rows(like).shape
        count = (shape[0], -(-shape[1] // size))
        self.gain = nn.Parameter(torch.ones(count, dtype=torch.float32, device=like.device))

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.by_row else tensor.view(1, -1)

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor, in its dtype."""
        rows = self._rows(tensor)
        whole, rest = divmod(rows.shape[1], self.size)
        parts = rows[:, : whole * self.size].view(len(rows), whole, self.size)
        found = (parts * self.gain[:, :whole, None]).flatten(1)
        if rest:
            found = torch.cat([found, rows[:, whole * self.size :] * self.gain[:, whole:]], 1)
        return found.view(tensor.shape).to(tensor.dtype)


class Multiples:
    """Of every group of what lies on a grid or is made of codes, and of norms and biases."""

    part: ClassVar[str] = "scales"
    trains: ClassVar[tuple[str, ...]] = ("gain",)
    version: ClassVar[int] = 1

    def __init__(self, linears: Sequence[str], family: ModelFamily, vectors: bool) -> None:
        """linears: full names of the compressible ones; vectors: whether norms and biases train."""
        self.linears, self.family, self.vectors = linears, family, vectors
        self._coded: dict[str, CodedLinear] = {}  # what linears stand in for while they train

    @property
    def what(self) -> str:
        """For the log."""
        return f"scales of what {len(self.linears)} linears store" + (
            ", and norms and biases" * self.vectors
        )

    def put_in(self, model: nn.Module) -> None:
        """As parametrizations, which do not pickle."""
        dtype = next(model.parameters()).dtype
        for name, module in self._rounded(model):
            if isinstance(module, CodedLinear):
                self._coded[name], held = module, linear_of(module, dtype)
                replace_linear(model, name, held)
                multiply(held, "weight", module.block_size, by_row=False)
            else:
                multiply(module, "weight", module.grid.group_size, by_row=True)
        for owner, part in vectors_of(self.family.decoder(model)) if self.vectors else []:
            multiply(owner, part, 1, by_row=False)

    def take_out(self, model: nn.Module, *, keep: bool) -> None:
        """In their places: in scales, rounded as these are stored, and in vectors."""
        owners = [(n, m) for n, m in model.named_modules() if parametrize.is_parametrized(m)]
        for name, module in owners:
            for part in list(cast(Any, module).parametrizations):
                if part == "weight" and cast(Any, module).weight.ndim == 2:
                    gain = taken_out(module, part)
                    if keep and name in self._coded:
                        rescale_codes(self._coded[name], gain.flatten())
                    elif keep:
                        rescale(cast(GridLinear, module), gain)
                else:
                    parametrize.remove_parametrizations(module, part, leave_parametrized=keep)
        for name, coded in self._coded.items():
            coded.bias = cast(Any, model.get_submodule(name)).bias
            replace_linear(model, name, coded)
        self._coded.clear()

    def _rounded(self, model: nn.Module) -> list[tuple[str, GridLinear | CodedLinear]]:
        return [
            (f"{name}.{part}".rstrip("."), module)
            for name in self.linears
            for part, module in model.get_submodule(name).named_modules()
            if isinstance(module, GridLinear | CodedLinear)
        ]


def rescaled(run: Run, settings: Any, teacher: TeacherStates) -> dict[str, Any]:
    """Train multiples and put them in their places. See `recovered`.

    settings: a methods.scales.Scales.
    """
    multiples = Multiples([x.name for x in run.linears], run.family, settings.vectors)
    return recovered(run, settings, teacher, multiples)


def vectors_of(decoder: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owners and names of the decoder's parameters of one dimension: norms and biases."""
    return [
        (owner, name)
        for owner in decoder.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.ndim == 1
    ]


def multiply(owner: nn.Module, name: str, size: int, *, by_row: bool) -> None:
    """Let a parameter be itself times multiples."""
    module = Multiple(getattr(owner, name), size, by_row)
    parametrize.register_parametrization(owner, name, module)


def taken_out(owner: nn.Module, name: str) -> Tensor:
    """The multiples of a parameter, which is as it was before."""
    multiple = cast(Any, owner).parametrizations[name][0]
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    gain: Tensor = multiple.gain.detach()
    return gain


@torch.no_grad()
def rescale(module: GridLinear, gain: Tensor) -> None:
    """Multiply the scales of a grid (m, groups), in place: the same integers, other values."""
    grid, weight = module.grid, module.weight
    integers = grid.integers(weight)
    scales = (grid.scales.float() * gain.to(grid.scales.device)).to(grid.scales.dtype)
    module.grid = replace(grid, scales=scales)
    module.weight = nn.Parameter(module.grid.values(integers).to(weight.dtype), requires_grad=False)


def linear_of(module: CodedLinear, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear with the same weight, in the model's dtype, and bias."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(module.merged_weight().to(dtype), requires_grad=False)
    linear.bias = cast(Any, module.bias)
    return linear


def rescale_codes(module: CodedLinear, gain: Tensor) -> None:
    """Multiply the number of every block (blocks), in place: the same codes."""
    largest = module.largest.view(torch.float32)[:, 0] * gain.to(module.largest.device)
    module.largest = largest.contiguous()[:, None].view(torch.uint8)
