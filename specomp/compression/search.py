"""The smallest model that is close enough to the dense one: a search over budgets of bits.

What is asked for is measured, not predicted: KL(dense || compressed) of the next token, in nats, on
samples of the calibration set that nothing else reads. Every try allocates and stores the whole
model at some bits a weight; from one to the next the logarithm of the KL is nearly straight in the
bits (methods.md 9), so few tries are needed. The menu is made once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specomp.compression.ledger import measure
from specomp.compression.report import LinearReport
from specomp.compression.run import Run
from specomp.data.calibration import CalibrationSet
from specomp.errors import UserError
from specomp.evaluation.divergence import compared, logits_of
from specomp.forms.options import Menu
from specomp.forms.prices import Bits, Budget
from specomp.models.family import Unit
from specomp.models.modules import evaluating, replace_linear
from specomp.progress import track
from specomp.slots import Choice

# What a bit a weight does to ln KL where only one is known (CHOICE: SmolLM2-135M, experiments/
# specomp_bits); a try within this share below what is asked for, or this close to one above, ends
# the search.
SLOPE, NEAR, CLOSE = -1.2, 0.93, 0.02
# Budgets that are asked for at most, for each model that may be stored: most buy something new.
GUESSES = 8

Store = Callable[[Mapping[Unit, Choice]], list[LinearReport]]
"""Puts choices into the model."""
Choose = Callable[[float], dict[Unit, Choice]]
"""What a share of the price of all dense units buys."""


def apart(samples: CalibrationSet, budget: Budget) -> tuple[CalibrationSet, CalibrationSet | None]:
    """What is calibrated on, and what a search measures on: the last samples. Raises UserError
    where nothing would be left.
    """
    held = budget.held_out
    if not held:
        return samples, None
    if held >= samples.num_samples:
        raise UserError(
            f"{budget.setting} measures on {held} samples that nothing is calibrated on, and there"
            f" are {samples.num_samples}: calibrate on more, or lower ratio.held_out."
        )
    left = samples.num_samples - held
    told = samples.description | {"held_out": held, "of": samples.num_samples}
    rest = CalibrationSet(
        samples.tokens[left:].clone(),  # type: ignore[arg-type]
        description=told,
        batch_size=samples.batch_size,
    )
    return samples.subset(left), rest


def besides(samples: CalibrationSet, more: CalibrationSet, count: int) -> CalibrationSet:
    """The last samples of a larger set that are not among these. Raises UserError where it has
    fewer.
    """
    known = {tuple(x) for x in samples.tokens.tolist()}
    rest = [i for i, x in enumerate(more.tokens.tolist()) if tuple(x) not in known][-count:]
    if len(rest) < count:
        raise UserError(
            f"The text has only {len(rest)} samples beside the {samples.num_samples} that are"
            f" calibrated on, {count} are to be held out: lower calibration.num_samples or"
            " ratio.held_out."
        )
    return CalibrationSet(
        more.tokens[rest],  # type: ignore[arg-type]
        description=more.description | {"held_out": count},
        batch_size=samples.batch_size,
    )


@dataclass(frozen=True)
class Try:
    """One model: bits a weight that are stored of its linears, and the KL that was measured."""

    bits: float
    kl: float
    modules: Mapping[str, nn.Module]
    reports: list[LinearReport]
    choices: Mapping[Unit, Choice]


class Close:
    """The model while it is dense: what it says, and how to get it back."""

    def __init__(self, run: Run) -> None:
        assert run.held_out is not None, "a budget that measures"
        self.run, self.held = run, run.held_out
        self.dense = self._modules()
        self.states = [x.cpu() for x in self._hidden("dense model")]

    def put_back(self, found: Try | None = None) -> None:
        """As it was, or as a try left it."""
        for name, module in (self.dense if found is None else found.modules).items():
            replace_linear(self.run.model, name, module)

    def tried(self, choices: Mapping[Unit, Choice], reports: list[LinearReport]) -> Try:
        """What the model is now, measured."""
        counted = measure(self.run.model, self.run.linears)
        bits = counted.linear_bits / sum(x.params for x in self.run.linears)
        head, total = partial(logits_of, self.run.model), 0.0
        for dense, own in zip(self.states, self._hidden(f"KL at {bits:.2f} bits"), strict=True):
            total += compared(head, dense.to(own.device), own)[0]
        kl = total / self.held.tokens.numel()
        return Try(bits, kl, self._modules(), reports, choices)

    def _modules(self) -> dict[str, nn.Module]:
        return {x.name: self.run.model.get_submodule(x.name) for x in self.run.linears}

    @torch.no_grad()
    def _hidden(self, label: str) -> list[Tensor]:
        """Last hidden states (length, hidden) of every sample."""
        model, found = self.run.model, list[Tensor]()
        decoder, batches = self.run.family.decoder(model), self.held.batches()
        with evaluating(model):
            for batch in track(batches, label, len(batches)):
                seen: Any = decoder(input_ids=batch.to(model.device), use_cache=False)
                found += seen.last_hidden_state
        return found


def searched(run: Run, menu: Menu, choose: Choose, store: Store) -> tuple[Try, Bits]:
    """The smallest try whose KL is below what the budget asks for, in the model; and its budget.
    Raises UserError where no try is, with the model as it was.
    """
    asked, most = run.budget.most, 8.0 * run.model.dtype.itemsize
    weights = sum(x.params for unit in menu for x in unit.linears)
    low = sum(float(x.prices[0]) for x in menu.values()) / weights  # nothing is smaller
    high = most  # dense, whose KL is 0
    close, tries, best = Close(run), list[Try](), None
    bits, refused = max(low * 1.02, run.budget.share(run.model.dtype) * most), ""
    for _ in range(GUESSES * run.budget.tries):
        found = None
        try:
            choices = choose(bits / most)
            found = next((x for x in tries if x.choices == choices), None)
            new = found is None
        except UserError as error:  # an allocation that cannot pay every unit
            new, refused = False, str(error)
        if new:
            close.put_back()
            found = close.tried(choices, store(choices))
            tries.append(found)
        if found is not None and found.kl <= asked:
            best = found if best is None or found.bits < best.bits else best
            high = min(high, bits)
        else:
            low = max(low, bits)
        if high - low <= CLOSE or (best is not None and best.kl >= NEAR * asked):
            break
        if new and len(tries) == run.budget.tries:
            break
        # a budget that buys what another bought says nothing about the line
        guess = following([(x.bits, x.kl) for x in tries], asked) if new else (low + high) / 2
        edge = min(CLOSE / 2, (high - low) / 4)
        bits = min(max(guess, low + edge), high - edge)
    said = ", ".join(f"{x.bits:.2f} bits {x.kl:.4g}" for x in tries)
    close.put_back(best)
    if best is None:
        raise UserError(
            f"{run.budget.setting}: no model that was tried stays below it ({said or refused}): ask"
            " for more, raise ratio.tries, or use a quantizer of more bits."
        )
    run.progress.note(
        f"a KL of {asked:g} to the dense model was asked for, measured on"
        f" {close.held.num_samples} x {close.held.length} held-out tokens of the calibration text:"
        f" {said}; taken: {best.bits:.2f} bits"
    )
    return best, Bits(bits=best.bits)


def following(tries: list[tuple[float, float]], asked: float) -> float:
    """Bits at which ln KL should be a little below what is asked for: on the line through the two
    tries nearest to it, or of the usual slope through the only one.
    """
    wanted = math.log(asked * (1 + NEAR) / 2)
    known = [(x, math.log(max(y, 1e-12))) for x, y in tries if math.isfinite(y)]
    if not known:
        return tries[-1][0] + 1
    near = sorted(known, key=lambda x: abs(x[1] - wanted))[:2]
    (x0, y0), slope = near[0], SLOPE
    if len(near) == 2 and near[1][0] != x0:
        slope = min((near[1][1] - y0) / (near[1][0] - x0), SLOPE / 4)
    return x0 + (wanted - y0) / slope
