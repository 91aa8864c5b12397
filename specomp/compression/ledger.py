"""What compression kept, counted on the modules as they are: parameters, bits, bytes,
multiply-adds.

Two scopes, never mixed: `linears` is the decoder layers' linear weights, which is what the papers'
ratios count; `model` is everything, embeddings and head included (tied weights once).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from specomp.forms.prices import Budget, bits, numbers, parts_of
from specomp.models.family import LinearSpec
from specomp.models.modules import Substitute


@dataclass(frozen=True, kw_only=True)
class Size:
    """Counts of one model. Multiply-adds per token: every linear and the head, without attention
    scores, which depend on the context.

    linear_bits: all that is stored of the linears' weights. model_bytes: what a folder of factors
    stores, with scales and zeros where weights are integers. held_bytes: what the parameters took
    while the model was evaluated, which is more where the integers are simulated (their values held
    in the model's dtype).
    """

    linear_params: int
    model_params: int
    model_bytes: int
    held_bytes: int
    macs_per_token: int
    linear_bits: int = 0


def measure(model: nn.Module, linears: Sequence[LinearSpec]) -> Size:
    """Count a model; `linears` are the compressible ones. Biases are not weights: they count in the
    model, not in the linears.
    """
    parameters = list(model.parameters())  # each shared tensor once
    modules = [model.get_submodule(x.name) for x in linears]
    parts = {
        f"{x.name}.{name}": part
        for x, module in zip(linears, modules, strict=True)
        for name, part in parts_of(module).items()
    }
    dtypes = [p.dtype for x in modules for p in x.parameters()]
    stored, counted = bits(parts, (dtypes or [parameters[0].dtype])[0]), numbers(parts)
    weights = [
        p for x in modules for name, p in x.named_parameters() if name.rpartition(".")[2] != "bias"
    ]
    kept = [(x.state_dict().keys(), dict(x.named_buffers())) for x in modules]
    buffers = [value for names, x in kept for name, value in x.items() if name in names]
    held = sum(x.nbytes for x in (*parameters, *buffers))
    return Size(
        linear_params=counted,
        model_params=sum(p.numel() for p in parameters) - sum(p.numel() for p in weights) + counted,
        model_bytes=held - sum(x.nbytes for x in (*weights, *buffers)) + stored // 8,
        held_bytes=held,
        macs_per_token=_macs(model),
        linear_bits=stored,
    )


def _macs(module: nn.Module) -> int:
    if isinstance(module, Substitute):
        return module.macs()
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    return sum(map(_macs, module.children()))


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Target and measured retention, with the dense and the compressed counts they come from."""

    target_retention: float
    measured_retention: float
    measured_retention_model: float
    dense: Size
    compressed: Size
    target_compression: float | None = None  # of a budget of parameters
    target_bits: float | None = None  # a weight, of a budget of bits
    # nats a token on held-out samples, of a budget that is met by a search
    target_kl: float | None = None
    measured_kl: float | None = None
    num_linears: int = 0
    num_dense: int = 0
    packing: str = "factors"
    norm_error: float | None = (
        None  # mean over the factorized linears, relative, in the method's norm
    )
    compensation_gain: float | None = None  # mean over them: what compensation left of the loss

    @property
    def deviation(self) -> float:
        """What was spent over what might be, minus 1, in the budget's currency."""
        if self.target_bits is not None:
            return self.measured_bits / self.target_bits - 1
        return self.measured_retention / self.target_retention - 1

    @property
    def spent(self) -> str:
        """What was measured beside what was asked for, in the budget's currency."""
        if self.target_bits is not None:
            return f"measured {self.measured_bits:.4f} bits a weight, target {self.target_bits:.4f}"
        return (
            f"measured retention {self.measured_retention:.4f}, target {self.target_retention:.4f}"
        )

    @property
    def in_bits(self) -> bool:
        """Whether few bits were asked for, not few parameters: by a budget, or of a row that keeps
        every linear in full on a grid.
        """
        rounded = self.compressed.linear_bits < self.dense.linear_bits
        return self.target_bits is not None or (self.target_retention == 1 and rounded)

    @property
    def measured_bits(self) -> float:
        """Stored bits a weight of the linears."""
        return self.compressed.linear_bits / self.dense.linear_params

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what is unknown is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Ledger":
        """As a record stores it."""

        def known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
            return {x.name: values[x.name] for x in fields(kind) if x.name in values}

        def size(values: Mapping[str, Any]) -> Size:
            # the first records had no held_bytes
            return Size(**{"held_bytes": values["model_bytes"]} | known(Size, values))

        sizes = {name: size(content[name]) for name in ("dense", "compressed")}
        return cls(**known(cls, content) | sizes)


def ledger(budget: Budget | None, dense: Size, compressed: Size, **more: Any) -> Ledger:
    """Compare two counts; budget None: nothing was to be compressed."""
    target: dict[str, Any] = {"target_retention": 1.0, "target_compression": 0.0}
    if budget is not None:
        target = budget.ledger(dense.linear_bits / dense.linear_params)
    return Ledger(
        measured_retention=compressed.linear_params / dense.linear_params,
        measured_retention_model=compressed.model_params / dense.model_params,
        dense=dense,
        compressed=compressed,
        **target,
        **more,
    )
