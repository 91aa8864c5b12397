"""LoRA recovery of a compressed model: adapters on everything that is stored, one Lightning run,
merged (methods/lora.py).
"""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from specomp.compression.run import Run
from specomp.models.modules import replace_linear
from specomp.training.recovery import recovered
from specomp.training.teacher import TeacherStates

# Bumped whenever the same settings would train other adapters.
VERSION = 1


def adapted(run: Run, settings: Any, teacher: TeacherStates) -> dict[str, Any]:
    """Train adapters, or take them from the cache, and merge them into the model in place. Returns
    how it went; `curve` included.

    settings: a methods.lora.LoRA; teacher: made while the model was dense.
    """
    matrices = stored_matrices(run)

    def put_in() -> None:
        # The adapters' own start is random: the seed alone decides it, not what was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=matrices)
            inject_adapter_in_model(config, run.model)
        run.model.train(run.model.training)
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # peft gives them the dtype of the matrix

    report = recovered(
        run,
        settings,
        teacher,
        put_in,
        part="adapters",
        trains=("lora_A", "lora_B"),
        what=f"adapters of rank {settings.rank} on {len(matrices)} matrices",
        version=VERSION,
    )
    merge(run.model)
    return report


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
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        module.merge()  # type: ignore[operator]
        replace_linear(model, name, module.get_base_layer())
    model.requires_grad_(False)
    vars(model).pop("peft_config")  # it has no adapters any more
