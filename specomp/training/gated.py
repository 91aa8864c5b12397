"""Training the spectrum: every linear as gated components, one Lightning run through the phases,
the dense model as the teacher.

The module computes the loss terms once per step; the current phase weighs them. Trainable are the
gates' scores and the output biases d.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specomp.compression.run import Run
from specomp.forms.prices import numbers
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.gates import GateBudget, Price
from specomp.slots import Form
from specomp.training.distill import DistillationModule
from specomp.training.phases import LossTerms, Phase, SpectrumSettings
from specomp.training.sharded import each_whole
from specomp.training.teacher import TeacherStates

log = logging.getLogger(__name__)
# Bins and upper end of the histograms of gates.
HISTOGRAM = (40, 2.0)


class GatedLinear(nn.Module):
    """y = U (g * (R x)) + b + d: a linear as its singular components, each with a trainable gate g
    = to_gate(score) (SoCo).

    U (m, a) and R (a, n) are frozen, a the components that still exist of the k there were; scores
    (k,) and the deviation d (m) train. `mask` (a,), where set, multiplies the gates: how a schedule
    fades components out. Scores of components that no longer exist rest.
    """

    def __init__(
        self,
        U: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        *,
        to_gate: Callable[[Tensor], Tensor],
        start: float,
        deviation: bool,
    ) -> None:
        super().__init__()
        self.to_gate = to_gate
        self.alive: Tensor
        self.existing: Tensor
        self.U = nn.Parameter(U, requires_grad=False)
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.scores = nn.Parameter(
            torch.full((len(rows),), start, dtype=torch.float32, device=U.device)
        )
        self.deviation = (
            nn.Parameter(torch.zeros(len(U), dtype=torch.float32, device=U.device))
            if deviation
            else None
        )
        self.register_buffer("alive", torch.ones(len(rows), dtype=torch.bool, device=U.device))
        # Where `alive` is true. Reading by a mask would make a GPU wait for the host, four times
        # per linear and step.
        self.register_buffer("existing", torch.arange(len(rows), device=U.device), persistent=False)
        self.mask: Tensor | None = None

    def gates(self) -> Tensor:
        """g (a,) of the components that exist, without the mask."""
        return self.to_gate(self.scores.index_select(0, self.existing))

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Drop components physically; keep (a,) is over those that exist."""
        self.U.data = self.U.data[:, keep].contiguous()
        self.rows.data = self.rows.data[keep].contiguous()
        self.existing = self.existing[keep]
        self.alive.zero_()[self.existing] = True
        self.mask = None

    def forward(self, x: Tensor) -> Tensor:
        """x (... n) -> y (... m)."""
        gates = self.gates() if self.mask is None else self.gates() * self.mask
        hidden = nn.functional.linear(x.to(self.rows.dtype), self.rows)
        out = nn.functional.linear(hidden * gates.to(hidden.dtype), self.U)
        for addend in (self.bias, self.deviation):
            out = out if addend is None else out + addend.to(out.dtype)
        return out


def price_of(form: Form) -> Price:
    """What a form stores of m x n matrices at ranks, all of which may be tensors; it can be sent to
    another process.
    """
    return partial(_price, form)


def _price(form: Form, m: Tensor, n: Tensor, rank: Tensor) -> Tensor:
    linear = LinearSpec("", m, n, 0, 0, "")  # type: ignore[arg-type]
    return numbers(form.parts(Unit("", "linear", (linear,)), rank))  # type: ignore[arg-type, return-value]


class SpectrumModule(DistillationModule):
    """The student: the model with its linears replaced by GatedLinear."""

    stored = ("scores", "deviation", "alive")
    settings: SpectrumSettings

    def __init__(
        self,
        run: Run,
        settings: SpectrumSettings,
        teacher: TeacherStates,
        gated: Mapping[str, GatedLinear],
        target: float,
    ) -> None:
        """gated: by the name of its linear; target: the retention wanted."""
        super().__init__(run, settings, teacher)
        self.target, self.price = target, price_of(run.method.packing)
        self.gated = dict(gated)
        self.linears = [x for x in run.linears if x.name in self.gated]
        self.budget = self._budget()
        with torch.no_grad():
            self.initial = float(
                self.budget.soft_retention(
                    self.flat_gates(), settings.threshold, settings.temperature_start
                )
            )

    def _budget(self) -> GateBudget:
        counts = [len(self.gated[x.name].rows) for x in self.linears]
        sizes = [(x.m, x.n) for x in self.linears]
        return GateBudget(sizes, counts, self.price, next(self.student.parameters()).device)

    def flat_gates(self) -> Tensor:
        """(K,) of all components that exist."""
        return torch.cat([self.gated[x.name].gates() for x in self.linears])

    def on_fit_start(self) -> None:
        """The loop may have moved the student."""
        self.budget = self._budget()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay; `base_lr` is what the schedule multiplies."""
        settings = self.settings
        groups = [
            {
                "params": [x.scores for x in self.gated.values()],
                "lr": settings.learning_rate,
                "base_lr": settings.learning_rate,
            }
        ]
        deviations = [x.deviation for x in self.gated.values() if x.deviation is not None]
        if deviations:
            rate = settings.learning_rate_deviation
            groups.append({"params": deviations, "lr": rate, "base_lr": rate})
        return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=0.0)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Loss terms once; the phase weighs them."""
        settings, gates = self.settings, self.flat_gates()
        self._fade(gates, self.phase.cut(self.progress))
        terms = LossTerms(
            performance=self.step_performance(batch_idx),
            soft_retention=self.budget.soft_retention(
                gates, settings.threshold, self._temperature()
            ),
            hard_retention=self.budget.hard_retention(gates, settings.threshold),
            gates=gates,
            threshold=settings.threshold,
            target=self.target,
            initial=self.initial,
        )
        self.account(soft=float(terms.soft_retention), hard=terms.hard_retention)
        return self.phase.loss(terms, self.progress)

    def _temperature(self) -> float:
        settings = self.settings
        return float(
            settings.temperature_start
            * (settings.temperature_end / settings.temperature_start) ** self.position
        )

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
        return (
            self.budget.threshold_for(gates, self.target)
            if settings.pruning.exact_budget
            else float(settings.threshold)
        )

    # --- what the schedule and the logs ask

    def counts(self) -> dict[str, Any]:
        """Components at or above the threshold, per type of linear."""
        counts: dict[str, int] = {}
        for linear, rank in zip(
            self.linears,
            self.budget.ranks(self.flat_gates(), self.settings.threshold).tolist(),
            strict=True,
        ):
            counts[f"kept/{linear.kind}"] = counts.get(f"kept/{linear.kind}", 0) + int(rank)
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
            f"{now['phase']}: KL {now['kl']:.3f}, retention {now['soft']:.3f} soft"
            f" {now['hard']:.3f} hard, {now['tokens_per_second']:.0f} tokens/s"
        )

    def end_phase(self, name: str, phase: Phase) -> None:
        """Measure with and without the hard cut, then drop the losers if the phase says so."""
        gates = self.flat_gates()
        state: dict[str, Any] = {
            "phase": name,
            "step": self.trainer.global_step,
            **self.measure(),
            "histograms": self.histograms(),
        }
        if phase.prune_margin is not None:
            threshold = self.budget.threshold_for(gates, phase.prune_margin * self.target)
            state["existing_before"] = len(gates)
            keeps = self.budget.kept(gates, threshold).split(self.budget.counts)
            self._prune(
                {self.gated[x.name]: keep for x, keep in zip(self.linears, keeps, strict=True)}
            )
            state["existing"] = len(self.flat_gates())
        self.boundaries.append(state)
        log.info(
            "phase %s ended at step %d: held-out KL %.3f uncut, %.3f cut at %.3f (retention %.4f;"
            " %.4f at %.2f)",
            *(
                name,
                state["step"],
                state["kl"],
                state["kl_cut"],
                state["threshold"],
                state["retention"],
            ),
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
        """Gates per type of linear, counted in equal bins of HISTOGRAM; larger ones fall into the
        last.
        """
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
        threshold, values = self.cut_threshold(gates), {}
        for name, cut in (("kl", 0.0), ("kl_cut", 1.0)):
            self._fade(gates, cut)
            values[name] = self.held_out()
        self._fade(gates, 0.0)
        return values | {
            "threshold": threshold,
            "retention": self.budget.retention_of(self.budget.ranks(gates, threshold)),
            "retention_at_fixed": self.budget.hard_retention(gates, settings.threshold),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Prune physically what had been pruned."""
        super().on_load_checkpoint(checkpoint)
        for name, gated in self.gated.items():
            alive = checkpoint["state_dict"][f"student.{name}.alive"].to(gated.alive.device)
            gated.prune(alive[gated.alive])
        self.budget = self._budget()
