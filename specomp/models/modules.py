"""What may stand where a family expects an nn.Linear. m out_features, n in_features, r rank.

The source of `Substitute` and of its subclasses is copied into every folder of compressed weights
(models/save.py): they use torch and each other alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specomp.numerics.grid import Grid


class Substitute(nn.Module):
    """Takes the place of a linear of weight (m n). There is no `weight`: ask `merged_weight()`.

    Made by `kind(**module.arguments(), dtype=..., device=...)`, and then filled with numbers.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    unserved: str = ""  # why an engine, which rewrites linears, cannot run it

    def arguments(self) -> dict:
        """What makes an empty module of the same shapes, JSON-able."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The weight (m n) as it acts, multiplied in at least float32 and returned so."""
        raise NotImplementedError

    @staticmethod
    def acting(part: nn.Module) -> Tensor:
        """The weight of a linear, or of what stands in the place of one, in at least float32."""
        if isinstance(part, Substitute):
            return part.merged_weight()
        weight: Any = part.weight
        weight = weight.detach()
        wide: Tensor = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return wide

    def shards(self, style: str) -> dict[str, str] | None:
        """Which of its parts have which style of tensor parallelism where the linear has `style`,
        colwise or rowwise; None where it cannot be split.
        """
        return None

    def macs(self) -> int:
        """Multiply-adds a token."""
        inner = [x for x in self.children() if isinstance(x, Substitute)]
        linears = [x for x in self.children() if isinstance(x, nn.Linear)]
        return sum(x.macs() for x in inner) + sum(x.weight.numel() for x in linears)

    def split(self, part: str, style: str) -> dict[str, str] | None:
        """`shards` where one part is split as a linear would be."""
        inner = self.get_submodule(part)
        if not isinstance(inner, Substitute):
            return {part: style}
        found = inner.shards(style)
        return None if found is None else {f"{part}.{x}": y for x, y in found.items()}

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them, and what else it is made of."""
        return ", ".join(f"{name}={value}" for name, value in self.arguments().items())


class TwoStage(Substitute):
    """A linear of rank r as two products: `first` (n -> r, no bias), and `expand`, which makes the
    outputs of what that gives.
    """

    first: nn.Linear
    rank: int

    def expand(self, hidden: Tensor) -> Tensor:
        """(... r) -> y (... m)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        return self.expand(self.first(x))

    def arguments(self) -> dict:
        """Sizes, rank, and whether there is a bias."""
        sizes = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
        }
        return sizes | {"bias": self.bias is not None}


class CodedLinear(Substitute):
    """A linear of NF4 codes: `codes`, two in a byte, the first in its high half, row by row, and
    `largest`, the bytes of one float32 number for every block of them, which no cast may touch.
    """

    # arXiv:2305.14314, App. E
    LEVELS = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
    codes: Tensor
    largest: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, numbers = block_size, in_features * out_features
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        # Where the caller makes tensors, not `device`: an engine that makes parameters alone on the
        # meta device never fills a buffer there.
        self.register_buffer("codes", torch.zeros(-(-numbers // 2), dtype=torch.uint8))
        blocks = -(-numbers // block_size)
        self.register_buffer("largest", torch.zeros(blocks, 4, dtype=torch.uint8))

    @classmethod
    def of(
        cls, codes: Tensor, largest: Tensor, linear: nn.Linear, block_size: int
    ) -> "CodedLinear":
        """From codes 0 to 15 row by row, float32 numbers, and a linear of these sizes, whose bias
        it takes.
        """
        weight = linear.weight
        made = cls(
            linear.in_features, linear.out_features, block_size, bias=False, dtype=weight.dtype
        )
        pairs = nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        made.codes = (pairs[:, 0] * 16 + pairs[:, 1]).to(weight.device, torch.uint8)
        made.largest = largest.float().contiguous()[:, None].view(torch.uint8).to(weight.device)
        made.bias = linear.bias
        return made

    def arguments(self) -> dict:
        """Sizes, and whether there is a bias."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"block_size": self.block_size, "bias": self.bias is not None}

    def macs(self) -> int:
        """Multiply-adds a token."""
        return self.in_features * self.out_features

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n) in float32."""
        levels = torch.tensor(self.LEVELS, device=self.codes.device)
        codes = torch.stack([self.codes >> 4, self.codes & 15], 1).flatten()
        flat = levels[codes[: self.in_features * self.out_features].long()]
        scales = self.largest.view(torch.float32)[:, 0].repeat_interleave(self.block_size)
        return (flat * scales[: len(flat)]).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        return nn.functional.linear(x, self.merged_weight().to(x.dtype), self.bias)


class GridLinear(nn.Linear):
    """An nn.Linear whose weight (m n), held in the model's dtype, lies on a grid: what a folder
    stores as integers (models/packed.py).
    """

    grid: Grid

    @classmethod
    def of(cls, linear: nn.Linear, grid: Grid) -> "GridLinear":
        """Takes over the parameters of a linear whose weight was rounded to this grid."""
        module = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        module.weight, module.bias, module.grid = linear.weight, linear.bias, grid
        return module


class PartLinear(nn.Linear):
    """An nn.Linear with only some of the outputs or inputs of the one in whose place it is: their
    indices there, or None for all. Saved and loaded as a plain nn.Linear of its own size.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None


def full_name(kind: type) -> str:
    """What a config calls a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode while the block runs; afterwards every module in the mode it was in."""
    training = [x for x in model.modules() if x.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weight_of(module: nn.Module) -> Tensor:
    """(m n) as it acts, in at least float32: of an nn.Linear or what stands in its place."""
    return Substitute.acting(module)


def replace_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule of full dotted name `name` is, in the same train/eval mode.
    AttributeError if there is none.
    """
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, module)
