"""The classes of a compressed model, made from those of any causal LM of transformers.

The source of both functions and of the low-rank modules is copied into every export (export.py::modelling_source), so that a compressed
folder also loads where specomp is not installed: they may use nothing but torch, transformers and each other.
"""

from typing import Any

import torch

from specomp.modules import LowRankLinear, PivotedLinear


def low_rank_config(base: Any, compressed_type: str) -> Any:
    """The config class of `base` with a model_type of its own, and by full module name the rank of every low-rank linear, which of them
    are pivoted, and which linears have a bias that those of `base` have not."""

    class LowRankConfig(base):  # type: ignore[misc]
        model_type = compressed_type  # unknown to a stock transformers: a clear error there, never random weights
        lowrank_ranks: dict[str, int] | None = None
        lowrank_biases: list[str] | None = None
        lowrank_pivoted: list[str] | None = None

    LowRankConfig.__name__ = LowRankConfig.__qualname__ = f"Specomp{base.__name__}"
    return LowRankConfig


def low_rank_model(base: Any, low_rank_config_class: Any) -> Any:
    """The model class of `base` whose linears named in config.lowrank_ranks are LowRankLinear or PivotedLinear modules."""

    class LowRankModel(base):  # type: ignore[misc]
        config_class = low_rank_config_class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            added = set(config.lowrank_biases or ())
            for name in added:
                linear = self.get_submodule(name)
                linear.bias = torch.nn.Parameter(linear.weight.new_zeros(linear.out_features))
            pivoted = set(config.lowrank_pivoted or ())
            for name, rank in (config.lowrank_ranks or {}).items():
                dense = self.get_submodule(name)
                place = {"dtype": dense.weight.dtype, "device": dense.weight.device}  # the meta device while weights are being loaded
                kind = PivotedLinear if name in pivoted else LowRankLinear
                module = kind(dense.in_features, dense.out_features, rank, bias=dense.bias is not None, **place)
                parent, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(parent), leaf, module)

    LowRankModel.__name__ = LowRankModel.__qualname__ = f"Specomp{base.__name__}"
    return LowRankModel
