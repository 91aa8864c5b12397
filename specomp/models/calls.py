"""What decoder layers are called with, and what they return: masks and position embeddings are
recorded by running the model with recorders in place of its decoder layers. No per-family forward
code, no exceptions, no weights touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specomp.models.family import ModelFamily

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Calls:
    """Of one batch: the hidden states before the first decoder layer, and what else each layer is
    called with.
    """

    hidden: Tensor
    layers: list[Call]


def recorded(model: nn.Module, family: ModelFamily, ids: Tensor) -> Calls:
    """The calls of a model's decoder layers for a batch of token ids (batch, length)."""
    recorders = [_Recorder(layer) for layer in family.layers(model)]
    with replaced(model, family, recorders), torch.no_grad():
        decoder: Any = family.decoder(model)
        decoder(input_ids=ids, use_cache=False)
    assert recorders[0].hidden is not None, "the decoder called its first layer"
    return Calls(recorders[0].hidden, [(x.args, x.kwargs) for x in recorders])


@contextmanager
def replaced(model: nn.Module, family: ModelFamily, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Other decoder layers while the block runs."""
    parent, _, name = family.decoder_layers.rpartition(".")
    container = model.get_submodule(parent)
    own = getattr(container, name)
    setattr(container, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(container, name, own)


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states a decoder layer was called with."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def hidden_output(output: Any) -> Tensor:
    """The hidden states a decoder layer returned, whether alone or first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def on_device(value: Any, device: torch.device) -> Any:
    """The tensors in arguments of a call, wherever they are nested, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {name: on_device(item, device) for name, item in value.items()}
    return value


class _StandIn(nn.Module):
    """In place of a decoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Models choose a decoder layer's mask by its attention type.
        for attribute in ("attention_type", "layer_idx", "is_sliding", "sliding_window"):
            if hasattr(layer, attribute):
                setattr(self, attribute, getattr(layer, attribute))


class _Recorder(_StandIn):
    """Remembers its call, passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The input, unchanged."""
        self.hidden = hidden_input(args, kwargs)
        self.args = args[1:]
        self.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return self.hidden


class Given(_StandIn):
    """Returns what it was given, whatever it is called with."""

    def __init__(self, layer: nn.Module, hidden: Tensor) -> None:
        super().__init__(layer)
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The hidden states of the constructor."""
        return self.hidden
