"""LoRA recovery of a compressed model: adapters on everything that is stored, one Lightning run,
merged (methods/lora.py).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from specomp.cache import digest
from specomp.compression.run import Run
from specomp.compression.spectra import stored_numbers
from specomp.models.modules import replace_linear
from specomp.slots import describe
from specomp.training.distill import DistillationModule
from specomp.training.fit import Result, fit, trained_once
from specomp.training.phases import LoRASettings, Phase
from specomp.training.teacher import TeacherStates

log = logging.getLogger(__name__)
# Bumped whenever the same settings would train other adapters.
VERSION = 1


class AdapterModule(DistillationModule):
    """The student: the compressed model with adapters in it."""

    stored = ("lora_A", "lora_B")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay, as for gates; `base_lr` is what the schedule multiplies."""
        settings = self.settings
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        group = {
            "params": parameters,
            "lr": settings.learning_rate,
            "base_lr": settings.learning_rate,
        }
        return torch.optim.AdamW([group], betas=settings.betas, weight_decay=0.0)

    def training_step(self, batch: int, batch_idx: int) -> torch.Tensor:
        """The distillation loss: there is no budget left to meet."""
        return self.step_performance(batch_idx)

    def on_train_start(self) -> None:
        """Where it starts from, unless it goes on from a checkpoint."""
        if not self.boundaries:
            self.boundaries.append({"phase": "start", "step": 0, "kl": self.held_out()})

    def end_phase(self, name: str, phase: Phase) -> None:
        """And where it has come to."""
        self.boundaries.append(
            {"phase": name, "step": self.trainer.global_step, "kl": self.held_out()}
        )
        log.info(
            "%s: held-out KL %.3f before, %.3f after.",
            name,
            self.boundaries[0]["kl"],
            self.boundaries[-1]["kl"],
        )


def recover(run: Run, settings: LoRASettings, teacher: TeacherStates) -> dict[str, Any]:
    """Train adapters, or take them from the cache, and merge them into the model in place. Returns
    how it went; `curve` included.

    teacher: made while the model was dense.
    """
    matrices = stored_matrices(run)
    key = digest(
        {
            "version": VERSION,
            "settings": describe(settings),
            "samples": run.training_samples.hash,
            "teacher": teacher.key,
            "half": run.half_forward,
            "seed": run.seed,
            "stored": stored_numbers(run),
            "torch": torch.__version__,
        }
    )
    # The adapters' own start is random: the seed alone decides it, not what was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=matrices)  # type: ignore[arg-type]
        run.model.requires_grad_(False)
        inject_adapter_in_model(config, run.model)
    run.model.train(run.model.training)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft gives them the dtype of the matrix

    def fitted(folder: Path) -> Result:
        module = AdapterModule(run, settings, teacher)
        return fit(
            run, module, folder, f"adapters of rank {settings.rank} on {len(matrices)} matrices"
        )

    adapters, report = trained_once(run.cache, key, "adapters", run.progress.curve_file, fitted)
    unexpected = run.model.load_state_dict(adapters, strict=False).unexpected_keys
    assert not unexpected, unexpected
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
