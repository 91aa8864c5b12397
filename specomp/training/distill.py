"""Training against the dense model: what every such module does, whatever its gradient steps move
(gated.py, adapters.py).

The loss of a step is computed once, from the student's last hidden states and the cached ones of
the dense model; a callback decides where in the schedule it is. Checkpoints hold what trains, the
optimizer, the schedule and the curve.
"""

import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from specomp.compression.run import Run
from specomp.disk import atomic_path
from specomp.errors import UserError
from specomp.progress import track
from specomp.training.phases import Cosine, Distillation, Phase
from specomp.training.schedule import PhaseSchedule
from specomp.training.teacher import TeacherStates, distillation, head_of


class DistillationModule(L.LightningModule):
    """The student: the model in `setup`, in which a subclass has put what trains."""

    strict_loading = False  # checkpoints leave out everything that is frozen
    stored: tuple[str, ...]  # parts of the names of what a checkpoint keeps
    settings: Distillation

    def __init__(self, run: Run, settings: Distillation, teacher: TeacherStates) -> None:
        super().__init__()
        self.student = run.model
        # Lightning must not see what is not the student's.
        self._context = (run, teacher)
        self.settings, self.seed, self.curve_file = settings, run.seed, run.progress.curve_file
        self.schedule = PhaseSchedule(
            dict(settings.schedule), Cosine(settings.warmup, settings.learning_rate_final)
        )
        self.phase: Phase = next(iter(settings.schedule.values()))
        self.progress = self.position = 0.0
        self.sums: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.curve: list[dict[str, Any]] = []
        self.boundaries: list[dict[str, Any]] = []
        self._tokens, self._since = 0, time.perf_counter()

    @property
    def decoder(self) -> nn.Module:
        """The student without its LM head."""
        return self._context[0].family.decoder(self.student)

    @property
    def layers(self) -> list[nn.Module]:
        """The student's decoder layers."""
        return self._context[0].layers

    # --- one step

    def samples_of(self, batch_idx: int) -> list[int]:
        """Indices of the samples of one forward pass: a function of its number, the process and the
        seed alone.
        """
        size, held_out = self.settings.micro_batch_size, self.settings.held_out
        count = self._context[0].training_samples.num_samples - held_out
        first = (batch_idx * self.trainer.world_size + self.trainer.global_rank) * size
        return [
            self._order(position // count, count)[position % count]
            for position in range(first, first + size)
        ]

    def _order(self, epoch: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).tolist()

    def performance_of(self, indices: list[int]) -> Tensor:
        """The distillation loss on samples."""
        run, teacher = self._context
        settings, device = self.settings, next(self.student.parameters()).device
        ids = run.training_samples.tokens[indices].to(device)
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return distillation(
            hidden,
            teacher(indices).to(device),
            head_of(self.student),
            settings.token_chunk,
            ids,
            settings.label_weight,
        )

    def step_performance(self, batch_idx: int) -> Tensor:
        """The distillation loss of one forward pass, entered into the step's account. Raises
        UserError when it diverges.
        """
        settings, indices = self.settings, self.samples_of(batch_idx)
        performance = self.performance_of(indices)
        if not math.isfinite(float(performance)) or float(performance) > settings.divergence:
            raise UserError(
                f"Training diverged at step {self.trainer.global_step}: KL {float(performance):.4g}"
                f" per token (limit method.training.divergence={settings.divergence:g}). Lower"
                " method.training.learning_rate or the price of the phase; the last checkpoint is"
                " kept."
            )
        self._tokens += (
            len(indices) * self._context[0].training_samples.length * self.trainer.world_size
        )
        self.account(kl=float(performance), count=1.0)
        return performance

    def account(self, **terms: float) -> None:
        """Add to the sums that the step's means are made of."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    # --- what the schedule and the logs ask

    def performance(self) -> float:
        """Mean of the step's forward passes, over all processes; closes the step's account."""
        values = {
            name: value / self.sums["count"] for name, value in self.sums.items() if name != "count"
        }
        if self.trainer.world_size > 1:
            values["kl"] = float(
                self.trainer.strategy.reduce(
                    torch.tensor(values["kl"], device=self.device), reduce_op="mean"
                )
            )
        self.sums = {}
        rate = self._tokens / max(1e-9, time.perf_counter() - self._since)
        self._tokens, self._since = 0, time.perf_counter()
        self.last = values
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        row = {
            "step": self.trainer.global_step,
            "phase": self.schedule.name,
            **values,
            "lr": lr,
            "tokens_per_second": rate,
        }
        row |= self.counts()
        self.curve.append(row)
        if self.trainer.is_global_zero and self.curve_file is not None:
            write_curve(self.curve_file, self.curve)
        for logger in self.loggers:
            logger.log_metrics(
                {f"train/{x}": y for x, y in row.items() if not isinstance(y, str)},
                step=row["step"],
            )
        return values["kl"]

    def counts(self) -> dict[str, Any]:
        """What a row of the curve has besides."""
        return {}

    def budget_met(self) -> tuple[float, float]:
        """Hard retention, wanted retention: met, where nothing is pruned."""
        return 0.0, 0.0

    def end_phase(self, name: str, phase: Phase) -> None:
        """Called once when a phase is over."""

    def status(self) -> str:
        """For the progress bar."""
        if not self.curve:
            return ""
        now = self.curve[-1]
        return f"{now['phase']}: KL {now['kl']:.3f}, {now['tokens_per_second']:.0f} tokens/s"

    @torch.no_grad()
    def held_out(self) -> float:
        """KL on the samples kept aside."""
        count = self._context[0].training_samples.num_samples
        indices = list(range(count - self.settings.held_out, count))
        with self._autocast():
            return sum(float(self.performance_of([i])) for i in indices) / len(indices)

    def _autocast(self) -> Any:
        if self.settings.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    # --- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without what is frozen, by name: a phase may have switched gradients off."""
        return {
            name: value
            for name, value in super().state_dict(*args, **kwargs).items()
            if set(self.stored) & set(name.split("."))
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the report is made of goes along."""
        checkpoint["curve"], checkpoint["boundaries"] = self.curve, self.boundaries

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back."""
        self.curve, self.boundaries = list(checkpoint["curve"]), list(checkpoint["boundaries"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """A finished run that is resumed has nothing to do."""
        return -1 if self.schedule.finished else None


def write_curve(path: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """One csv line per optimizer step, written anew each time: a resumed run starts with the lines
    of its checkpoint.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]))
        writer.writeheader()
        writer.writerows(
            {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
            for row in curve
        )


class Batches:
    """Numbers of forward passes, with progress: which samples they stand for is the module's
    affair, so a resumed run needs no state.
    """

    def __init__(self, total: int, module: DistillationModule) -> None:
        self.total, self.module = total, module

    def __iter__(self) -> Iterator[int]:
        first = len(self.module.curve) * self.total // self.module.schedule.total
        yield from track(range(first, self.total), "train", self.total - first, self.module.status)

    def __len__(self) -> int:
        return self.total
