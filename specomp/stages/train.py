"""Training the spectrum: every linear as gated components, one Lightning run through the phases, the dense model as the teacher.

The module computes the loss terms once per step; the current phase weighs them. Trainable are the gates' scores and the output biases d;
checkpoints hold these, the optimizer and the schedule.
"""

import csv
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from specomp.cache import atomic_path
from specomp.errors import UserError
from specomp.gates import GateBudget
from specomp.methods.spectrum import SpectrumTraining
from specomp.modules import GatedLinear
from specomp.phases import Cosine, LossTerms, Phase, PhaseSchedule
from specomp.progress import track
from specomp.ratio import Cost, Ratio
from specomp.stages.setup import Setup
from specomp.stages.sharded import each_whole
from specomp.stages.teacher import TeacherStates, distillation, head_of

log = logging.getLogger(__name__)
# Bins and upper end of the histograms of gates.
HISTOGRAM = (40, 2.0)


class SpectrumModule(L.LightningModule):
    """The student: the model with its linears replaced by GatedLinear."""

    strict_loading = False  # checkpoints leave out everything that is frozen

    def __init__(
        self,
        setup: Setup,
        training: SpectrumTraining,
        ratio: Ratio,
        teacher: TeacherStates,
        gated: Mapping[str, GatedLinear],
        *,
        cost: Cost,
        seed: int,
        curve_file: Path | None = None,
    ) -> None:
        super().__init__()
        self.student = setup.model
        # Lightning must not see what is not the student's.
        self._context = (setup, teacher)
        self.settings, self.target, self.seed = training, ratio.retention, seed
        self.gated, self.cost = dict(gated), cost
        self.linears = [x for x in setup.linears if x.name in self.gated]
        self.schedule = PhaseSchedule(training.schedule, Cosine(training.warmup, training.learning_rate_final))
        self.phase: Phase = next(iter(training.schedule.values()))
        self.progress = self.position = 0.0
        self.budget = self._budget()
        with torch.no_grad():
            self.initial = float(self.budget.soft_retention(self.flat_gates(), training.threshold, training.temperature_start))
        self.sums: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.curve: list[dict[str, Any]] = []
        self.curve_file = curve_file
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

    def _budget(self) -> GateBudget:
        counts = [len(self.gated[x.name].rows) for x in self.linears]
        return GateBudget(self.linears, counts, next(self.student.parameters()).device, self.cost)

    def flat_gates(self) -> Tensor:
        """(K,) of all components that exist."""
        return torch.cat([self.gated[x.name].gates() for x in self.linears])

    def on_fit_start(self) -> None:
        """The loop may have moved the student."""
        self.budget = self._budget()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay; `base_lr` is what the schedule multiplies."""
        settings = self.settings
        groups = [{"params": [x.scores for x in self.gated.values()], "lr": settings.learning_rate, "base_lr": settings.learning_rate}]
        deviations = [x.deviation for x in self.gated.values() if x.deviation is not None]
        if deviations:
            rate = settings.learning_rate_deviation
            groups.append({"params": deviations, "lr": rate, "base_lr": rate})
        return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=0.0)

    # --- one step

    def samples_of(self, batch_idx: int) -> list[int]:
        """Indices of the samples of one forward pass: a function of its number, the process and the seed alone."""
        size, held_out = self.settings.micro_batch_size, self.settings.held_out
        count = self._context[0].samples.num_samples - held_out
        first = (batch_idx * self.trainer.world_size + self.trainer.global_rank) * size
        return [self._order(position // count, count)[position % count] for position in range(first, first + size)]

    def _order(self, epoch: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).tolist()

    def performance_of(self, indices: list[int]) -> Tensor:
        """The distillation loss on samples."""
        setup, teacher = self._context
        settings, device = self.settings, next(self.student.parameters()).device
        ids = setup.samples.tokens[indices].to(device)
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return distillation(hidden, teacher(indices).to(device), head_of(self.student), settings.token_chunk, ids, settings.label_weight)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Loss terms once; the phase weighs them."""
        settings, gates = self.settings, self.flat_gates()
        self._fade(gates, self.phase.cut(self.progress))
        performance = self.performance_of(self.samples_of(batch_idx))
        if not math.isfinite(float(performance)) or float(performance) > settings.divergence:
            raise UserError(
                f"Training diverged at step {self.trainer.global_step}: KL {float(performance):.4g} per token (limit "
                f"method.training.divergence={settings.divergence:g}). Lower method.training.learning_rate or the price of the phase; "
                "the last checkpoint is kept."
            )
        terms = LossTerms(
            performance=performance,
            soft_retention=self.budget.soft_retention(gates, settings.threshold, self._temperature()),
            hard_retention=self.budget.hard_retention(gates, settings.threshold),
            gates=gates,
            threshold=settings.threshold,
            target=self.target,
            initial=self.initial,
        )
        self._tokens += len(self.samples_of(batch_idx)) * self._context[0].samples.length * self.trainer.world_size
        self._account(terms)
        return self.phase.loss(terms, self.progress)

    def _temperature(self) -> float:
        settings = self.settings
        return float(settings.temperature_start * (settings.temperature_end / settings.temperature_start) ** self.position)

    def _fade(self, gates: Tensor, cut: float) -> None:
        """Set the masks: losers at the cut threshold count 1 - cut."""
        masks: list[Tensor] | list[None] = [None] * len(self.linears)
        if cut > 0:
            kept = self.budget.kept(gates, self.cut_threshold(gates)).float()
            masks = list((1 - cut * (1 - kept)).split(self.budget.counts))
        for linear, mask in zip(self.linears, masks, strict=True):
            self.gated[linear.name].mask = mask

    def cut_threshold(self, gates: Tensor) -> float:
        """Where the hard cut is made."""
        settings = self.settings
        return self.budget.threshold_for(gates, self.target) if settings.pruning.exact_budget else float(settings.threshold)

    # --- what the schedule and the logs ask

    def _account(self, terms: LossTerms) -> None:
        for name, value in (("kl", float(terms.performance)), ("soft", float(terms.soft_retention)), ("hard", terms.hard_retention)):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["count"] = self.sums.get("count", 0.0) + 1

    def performance(self) -> float:
        """Mean of the step's forward passes, over all processes; closes the step's account."""
        values = {name: value / self.sums["count"] for name, value in self.sums.items() if name != "count"}
        if self.trainer.world_size > 1:
            values["kl"] = float(self.trainer.strategy.reduce(torch.tensor(values["kl"], device=self.device), reduce_op="mean"))
        self.sums = {}
        rate = self._tokens / max(1e-9, time.perf_counter() - self._since)
        self._tokens, self._since = 0, time.perf_counter()
        self.last = values
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        row = {"step": self.trainer.global_step, "phase": self.schedule.name, **values, "lr": lr, "tokens_per_second": rate}
        row |= {f"kept/{kind}": count for kind, count in self.kept_by_kind().items()}
        self.curve.append(row)
        if self.trainer.is_global_zero and self.curve_file is not None:
            write_curve(self.curve_file, self.curve)
        for logger in self.loggers:
            logger.log_metrics({f"train/{x}": y for x, y in row.items() if not isinstance(y, str)}, step=row["step"])
        return values["kl"]

    def kept_by_kind(self) -> dict[str, int]:
        """Components at or above the threshold, per type of linear."""
        counts: dict[str, int] = {}
        for linear, rank in zip(self.linears, self.budget.ranks(self.flat_gates(), self.settings.threshold).tolist(), strict=True):
            counts[linear.kind] = counts.get(linear.kind, 0) + int(rank)
        return counts

    def budget_met(self) -> tuple[float, float]:
        """Hard retention, wanted retention."""
        return self.last["hard"], self.target

    def status(self) -> str:
        """For the progress bar."""
        if not self.curve:
            return ""
        now = self.curve[-1]
        return (
            f"{now['phase']}: KL {now['kl']:.3f}, retention {now['soft']:.3f} soft {now['hard']:.3f} hard, "
            f"{now['tokens_per_second']:.0f} tokens/s"
        )

    def end_phase(self, name: str, phase: Phase) -> None:
        """Measure with and without the hard cut, then drop the losers if the phase says so."""
        gates = self.flat_gates()
        state: dict[str, Any] = {"phase": name, "step": self.trainer.global_step, **self.measure(), "histograms": self.histograms()}
        if phase.prune_margin is not None:
            threshold = self.budget.threshold_for(gates, phase.prune_margin * self.target)
            state["existing_before"] = len(gates)
            keeps = self.budget.kept(gates, threshold).split(self.budget.counts)
            self._prune({self.gated[x.name]: keep for x, keep in zip(self.linears, keeps, strict=True)})
            state["existing"] = len(self.flat_gates())
        self.boundaries.append(state)
        log.info(
            "phase %s ended at step %d: held-out KL %.3f uncut, %.3f cut at %.3f (retention %.4f; %.4f at %.2f)",
            *(name, state["step"], state["kl"], state["kl_cut"], state["threshold"], state["retention"]),
            *(state["retention_at_fixed"], self.settings.threshold),
        )

    def _prune(self, keeps: dict[nn.Module, Tensor]) -> None:
        for layer in each_whole(self.trainer.strategy, self.layers):
            for module in layer.modules():
                if isinstance(module, GatedLinear):
                    module.prune(keeps.pop(module))
        assert not keeps, "every gated linear is in a decoder layer"
        self.budget = self._budget()

    @torch.no_grad()
    def histograms(self) -> dict[str, list[int]]:
        """Gates per type of linear, counted in equal bins of HISTOGRAM; larger ones fall into the last."""
        bins, top = HISTOGRAM
        found: dict[str, Tensor] = {}
        for linear in self.linears:
            gates = self.gated[linear.name].gates().clamp(0, top).cpu()
            found[linear.kind] = found.get(linear.kind, 0) + torch.histc(gates, bins, 0, top)
        return {kind: [int(x) for x in counts.tolist()] for kind, counts in found.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """KL on the held-out samples as trained and after the hard cut, and what that cut keeps."""
        settings, gates = self.settings, self.flat_gates()
        count = self._context[0].samples.num_samples
        indices = list(range(count - settings.held_out, count))
        threshold, values = self.cut_threshold(gates), {}
        for name, cut in (("kl", 0.0), ("kl_cut", 1.0)):
            self._fade(gates, cut)
            with self._autocast():
                values[name] = sum(float(self.performance_of([i])) for i in indices) / len(indices)
        self._fade(gates, 0.0)
        return values | {
            "threshold": threshold,
            "retention": self.budget.retention_of(self.budget.ranks(gates, threshold)),
            "retention_at_fixed": self.budget.hard_retention(gates, settings.threshold),
        }

    def _autocast(self) -> Any:
        if self.settings.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    # --- checkpoints: the trainable parameters, which components exist, the schedule

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without what is frozen, by name: a phase may have switched gradients off."""
        kept = ("scores", "deviation", "alive")
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name.rpartition(".")[2] in kept}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the report is made of goes along."""
        checkpoint["curve"], checkpoint["boundaries"] = self.curve, self.boundaries

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Prune physically what had been pruned."""
        self.curve, self.boundaries = list(checkpoint["curve"]), list(checkpoint["boundaries"])
        for name, gated in self.gated.items():
            alive = checkpoint["state_dict"][f"student.{name}.alive"].to(gated.alive.device)
            gated.prune(alive[gated.alive])
        self.budget = self._budget()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """A finished run that is resumed has nothing to do."""
        return -1 if self.schedule.finished else None


def write_curve(path: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """One csv line per optimizer step, written anew each time: a resumed run starts with the lines of its checkpoint."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]))
        writer.writeheader()
        writer.writerows({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in curve)


class Batches:
    """Numbers of forward passes, with progress: which samples they stand for is the module's affair, so a resumed run needs no state."""

    def __init__(self, total: int, module: SpectrumModule) -> None:
        self.total, self.module = total, module

    def __iter__(self) -> Iterator[int]:
        first = len(self.module.curve) * self.total // self.module.schedule.total
        yield from track(range(first, self.total), "train", self.total - first, self.module.status)

    def __len__(self) -> int:
        return self.total
