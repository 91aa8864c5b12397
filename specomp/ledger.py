"""What compression kept, counted on the modules as they are: parameters, bytes, multiply-adds.

Two scopes, never mixed: `linears` is the decoder layers' linear weights, which is what the papers' ratios count; `model` is everything,
embeddings and head included (tied weights once).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from specomp.models.family import LinearSpec
from specomp.modules import GridLinear, PivotedLinear


@dataclass(frozen=True, kw_only=True)
class Size:
    """Counts of one model. Multiply-adds per token: every linear and the head, without attention scores, which depend on the context.

    model_bytes: what a folder of factors stores, with scales and zeros where weights are integers. held_bytes: what the parameters took
    while the model was evaluated, which is more where the integers are simulated (their values held in the model's dtype).
    """

    linear_params: int
    model_params: int
    model_bytes: int
    held_bytes: int
    macs_per_token: int


def measure(model: nn.Module, linears: Sequence[LinearSpec]) -> Size:
    """Count a model; `linears` are the compressible ones. Biases are not weights: they count in the model, not in the linears."""
    parameters = list(model.parameters())  # each shared tensor once
    macs = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    held = sum(p.numel() * p.element_size() for p in [*parameters, *_index_buffers(model)])
    on_grids = [module for module in model.modules() if isinstance(module, GridLinear)]
    saved = sum(x.weight.numel() * x.weight.element_size() - x.grid.num_bytes(x.out_features, x.in_features) for x in on_grids)
    return Size(
        linear_params=sum(_weights(model.get_submodule(linear.name)) for linear in linears),
        model_params=sum(p.numel() for p in parameters),
        model_bytes=held - saved,
        held_bytes=held,
        macs_per_token=macs,
    )


def _index_buffers(model: nn.Module) -> list[Tensor]:
    """Where pivoted linears find their outputs: no parameters, but stored."""
    return [module.order for module in model.modules() if isinstance(module, PivotedLinear)]


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias"))


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Target and measured retention, with the dense and the compressed counts they come from."""

    target_retention: float
    measured_retention: float
    measured_retention_model: float
    dense: Size
    compressed: Size

    @property
    def deviation(self) -> float:
        """Measured over target retention of the linears, minus 1."""
        return self.measured_retention / self.target_retention - 1

    def as_dict(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self)


def ledger(target_retention: float, dense: Size, compressed: Size) -> Ledger:
    """Compare two counts."""
    return Ledger(
        target_retention=target_retention,
        measured_retention=compressed.linear_params / dense.linear_params,
        measured_retention_model=compressed.model_params / dense.model_params,
        dense=dense,
        compressed=compressed,
    )
