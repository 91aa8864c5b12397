"""Training of the scales of grids, and of norms and biases (methods/scales.py).

While it trains, a weight is its value times a multiple for every group of its numbers; afterwards
the multiples are in the scales, rounded as scales are stored.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from specomp.compression.run import Run
from specomp.models.modules import CodedLinear, GridLinear, replace_linear
from specomp.numerics.grid import Grid
from specomp.training.recovery import recovered
from specomp.training.teacher import TeacherStates

# Bumped whenever the same settings would train other multiples.
VERSION = 1


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


def rescaled(run: Run, settings: Any, teacher: TeacherStates) -> dict[str, Any]:
    """Train multiples, or take them from the cache, and put them in their places. Returns how it
    went; `curve` included.

    settings: a methods.scales.Scales; teacher: made while the model was dense.
    """
    model = run.model
    modules = [
        (f"{x.name}.{part}".rstrip("."), module)
        for x in run.linears
        for part, module in run.model.get_submodule(x.name).named_modules()
        if isinstance(module, GridLinear | CodedLinear)
    ]
    vectors: list[tuple[nn.Module, str]] = []

    def put_in() -> None:
        for name, module in modules:
            if isinstance(module, CodedLinear):
                held = linear_of(module, model.dtype)
                replace_linear(model, name, held)
                multiply(held, "weight", module.block_size, by_row=False)
            else:
                multiply(module, "weight", module.grid.group_size, by_row=True)
        # those of the linears that stand in for codes too
        vectors.extend(vectors_of(run.family.decoder(model)) if settings.vectors else [])
        for owner, part in vectors:
            multiply(owner, part, 1, by_row=False)

    groups = sum(
        len(x.largest) if isinstance(x, CodedLinear) else x.grid.scales.numel() for _, x in modules
    )
    report = recovered(
        run,
        settings,
        teacher,
        put_in,
        part="scales",
        trains=("gain",),
        what=f"{groups} scales of {len(modules)} matrices"
        + ", and norms and biases" * settings.vectors,
        version=VERSION,
    )
    for owner, part in vectors:
        parametrize.remove_parametrizations(owner, part)
    for name, module in modules:
        trained: Any = model.get_submodule(name)
        gain = taken_out(trained, "weight")
        if isinstance(module, CodedLinear):
            module.bias = trained.bias
            replace_linear(model, name, with_largest(module, gain.flatten()))
        else:
            rescale(module, gain)
    model.requires_grad_(False)
    return report


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
    made = Grid(scales=scales, zeros=grid.zeros, bits=grid.bits, group_size=grid.group_size)
    module.grid = made
    module.weight = nn.Parameter(made.values(integers).to(weight.dtype), requires_grad=False)


def linear_of(module: CodedLinear, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear with the same weight, in the model's dtype, and bias."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(module.merged_weight().to(dtype), requires_grad=False)
    linear.bias = cast(Any, module.bias)
    return linear


def with_largest(module: CodedLinear, gain: Tensor) -> CodedLinear:
    """The same codes, the number of every block (blocks) multiplied."""
    largest = module.largest.view(torch.float32)[:, 0] * gain.to(module.largest.device)
    module.largest = largest.contiguous()[:, None].view(torch.uint8)
    return module
