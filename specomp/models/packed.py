"""Rounded weights on disk: integers packed by compressed-tensors, which transformers unpacks when
it loads the folder.

Every weight on a grid becomes weight_packed (int32 words), weight_scale (16 bits), weight_shape
and, where it has zeros, weight_zero_point (int8); config.json says under quantization_config which
weights have which grid. Symmetric groups that divide their rows are the format's strategy `group`;
all else is declared as blocks of 1 x group_size, because the last block may be short (ranks are
what they are), and because compressed-tensors 0.20 packs the zeros of groups but expects them
unpacked when transformers loads them. compressed-tensors is imported only where packed weights are
written or read: it is the extra `int4`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specomp.errors import UserError, needed
from specomp.models.modules import GridLinear, replace_linear
from specomp.numerics.grid import Grid


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the weight of every GridLinear packed. Raises UserError when a weight has
    left its grid.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    state = dict(model.state_dict())
    for name, module in grid_linears(model).items():
        grid, weight = module.grid, state.pop(f"{name}.weight")
        integers = grid.integers(weight)
        if not torch.equal(grid.values(integers).to(weight.dtype), weight):
            raise UserError(
                f"{name}: the weight was changed after it was quantized: quantize last, or save"
                " with export=dense."
            )
        state[f"{name}.weight_packed"] = pack_to_int32(integers, grid.bits)
        state[f"{name}.weight_scale"] = grid.scales
        state[f"{name}.weight_shape"] = torch.tensor(weight.shape)
        if grid.zeros is not None:
            state[f"{name}.weight_zero_point"] = grid.zeros
    return state


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of the packed weights: one group of names for each kind of grid."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, module in grid_linears(model).items():
        kinds.setdefault(_kind(module), []).append(name)
    groups = {
        f"group_{i}": {"targets": names, "weights": dict(kind)}
        for i, (kind, names) in enumerate(kinds.items())
    }
    method = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
    }
    return method | {"config_groups": groups, "ignore": []}


def in_plain_groups(model: nn.Module) -> bool:
    """Whether every packed weight has the format's strategy `group`, symmetric: what engines have
    kernels for.
    """
    return all(("strategy", "group") in _kind(x) for x in grid_linears(model).values())


@contextmanager
def unpacking() -> Iterator[None]:
    """Around from_pretrained of a packed folder: no advice about short blocks. Raises UserError
    without compressed-tensors.
    """
    needed("compressed_tensors", "int4", "Reading a folder of packed integers")
    from loguru import logger

    logger.disable("compressed_tensors")
    try:
        yield
    finally:
        logger.enable("compressed_tensors")


def unpack_model(model: PreTrainedModel) -> None:
    """Replace in place what transformers made of packed weights by GridLinear modules: the model
    that was saved.
    """
    packed = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "weight_packed")
    ]
    for name, module in packed:
        linear: Any = module
        args = linear.quantization_scheme.weights
        dtype, zeros = linear.weight_scale.dtype, getattr(linear, "weight_zero_point", None)
        grid = Grid(
            # As they were stored: transformers casts them to the model's dtype.
            scales=linear.weight_scale.detach().to(
                dtype if dtype == torch.bfloat16 else torch.float16
            ),
            zeros=None if zeros is None else zeros.detach(),
            bits=args.num_bits,
            group_size=args.group_size or args.block_structure[1],
        )
        weight = _values(grid, linear.weight_packed, linear.weight_shape).to(dtype)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        replace_linear(model, name, GridLinear.of(plain, grid))
    hook: Any = model.ct_decompress_hook
    hook.remove()
    del model.ct_decompress_hook, model.hf_quantizer, model.config.quantization_config


def grids_of(quantization: Any) -> dict[str, tuple[int, int]]:
    """(bits, group size) of every packed linear, from what `quantization_config` wrote. Raises
    UserError for what is packed otherwise.
    """
    content = quantization if isinstance(quantization, dict) else quantization.to_dict()
    found: dict[str, tuple[int, int]] = {}
    try:
        # transformers wraps what config.json says
        for group in (content.get("quantization_config") or content)["config_groups"].values():
            weights = group["weights"]
            size = weights.get("group_size") or weights["block_structure"][1]
            found |= dict.fromkeys(group["targets"], (weights["num_bits"], size))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "This quantization_config was not written by specomp: its weights cannot be streamed."
        ) from error
    return found


def unpacked(grid: tuple[int, int], part: Callable[[str], Tensor | None]) -> Tensor:
    """A weight (m n) in float32. part: what is stored as weight_packed,
    weight_scale, weight_shape and weight_zero_point, by the last word.
    """
    needed("compressed_tensors", "int4", "Reading a folder of packed integers")
    bits, group_size = grid
    words, scales, shape = (part(name) for name in ("packed", "scale", "shape"))
    assert words is not None and scales is not None and shape is not None, "a packed weight"
    whole = Grid(scales=scales, zeros=part("zero_point"), bits=bits, group_size=group_size)
    return _values(whole, words, shape)


def _values(grid: Grid, words: Tensor, shape: Tensor) -> Tensor:
    """The weight (m n) in float32 that packed words stand for; shape: (m, n) as it is stored."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    return grid.values(unpack_from_int32(words, grid.bits, torch.Size(shape.tolist())))


def grid_linears(model: nn.Module) -> dict[str, GridLinear]:
    """Every GridLinear by its full dotted name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, GridLinear)
    }


def _kind(module: GridLinear) -> tuple[tuple[str, Any], ...]:
    """The arguments of compressed-tensors that a weight's grid needs."""
    grid, n = module.grid, module.in_features
    args: tuple[tuple[str, Any], ...] = (
        ("num_bits", grid.bits),
        ("type", "int"),
        ("symmetric", grid.zeros is None),
    )
    if grid.zeros is None and n % grid.group_size == 0:
        return (*args, ("strategy", "group"), ("group_size", grid.group_size))
    return (*args, ("strategy", "block"), ("block_structure", (1, grid.group_size)))
