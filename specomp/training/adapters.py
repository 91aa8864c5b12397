"""LoRA recovery of a compressed model: adapters on everything that is stored, one Lightning run,
merged (methods/lora.py).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from specomp.compression.run import Run
from specomp.models.modules import replace_linear
from specomp.training.recovery import recovered
from specomp.training.teacher import TeacherStates


@dataclass(frozen=True)
class Adapters:
    """LoRA on every stored matrix; matrices: their full names."""

    rank: int
    alpha: float
    seed: int
    matrices: tuple[str, ...]
    part: ClassVar[str] = "adapters"
    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    version: ClassVar[int] = 1

    @property
    def what(self) -> str:
        """For the log."""
        return f"adapters of rank {self.rank} on {len(self.matrices)} matrices"

    def put_in(self, model: nn.Module) -> None:
        """Their own start is random: the seed alone decides it, not what was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                target_modules=list(self.matrices),
            )
            inject_adapter_in_model(config, model)
        model.train(model.training)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # peft gives them the dtype of the matrix

    def take_out(self, model: nn.Module, *, keep: bool) -> None:
        """Merged, or not."""
        if keep:
            merge(model)
        else:
            without(model)


def adapted(run: Run, settings: Any, teacher: TeacherStates) -> dict[str, Any]:
    """Train adapters and merge them into the model in place. See `recovered`.

    settings: a methods.lora.LoRA.
    """
    matrices = tuple(stored_matrices(run))
    adapters = Adapters(settings.rank, settings.alpha, run.seed, matrices)
    return recovered(run, settings, teacher, adapters)


def stored_matrices(run: Run) -> list[str]:
    """Full names of the nn.Linear that the compressible linears consist of by now."""
    return [
        f"{x.name}.{part}".rstrip(".")
        for x in run.linears
        for part, module in run.model.get_submodule(x.name).named_modules()
        if isinstance(module, nn.Linear)
    ]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its matrix and take it out again."""
    for module in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        module.merge()  # type: ignore[operator]
    without(model)


def without(model: nn.Module) -> None:
    """Take adapters out, merged or not."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        replace_linear(model, name, module.get_base_layer())
    model.requires_grad_(False)
    vars(model).pop("peft_config", None)  # it has no adapters any more
