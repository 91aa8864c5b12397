"""The smallest model that is close enough to the dense one: a search over budgets of bits.

What is asked for is measured, not predicted: KL(dense || compressed) of the next token, in nats, on
samples of the calibration set that nothing else reads. Every try allocates and stores the whole
model at some bits a weight; from one to the next the logarithm of the KL is nearly straight in the
bits (methods.md 9), so few tries are needed. The menu is made once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
# Of what is left between too few bits and enough, the share at either end that no line may ask for.
EDGE = 0.05
TINY = 1e-12
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
    """One model: the bits a weight that were asked for and are stored, the KL that was measured."""

    asked: float
    bits: float
    kl: float
    choices: Mapping[Unit, Choice]
    reports: list[LinearReport]


class Close:
    """The model while it is dense: what it says, and how to get it back."""

    def __init__(self, run: Run) -> None:
        assert run.held_out is not None, "a budget that measures"
        self.run, self.held = run, run.held_out
        self.dense = self.modules()
        self.states = [x.cpu() for x in self._hidden("dense model")]

    def put_back(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        """As it was, or with these modules."""
        for name, module in (self.dense if modules is None else modules).items():
            replace_linear(self.run.model, name, module)

    def tried(
        self, asked: float, choices: Mapping[Unit, Choice], reports: list[LinearReport]
    ) -> Try:
        """What the model is now, measured; a KL that is no number is infinite."""
        counted = measure(self.run.model, self.run.linears)
        bits = counted.linear_bits / sum(x.params for x in self.run.linears)
        head, total = partial(logits_of, self.run.model), 0.0
        for dense, own in zip(self.states, self._hidden(f"KL at {bits:.2f} bits"), strict=True):
            total += compared(head, dense.to(own.device), own)[0]
        kl = total / self.held.tokens.numel()
        return Try(asked, bits, kl if math.isfinite(kl) else math.inf, choices, reports)

    def modules(self) -> dict[str, nn.Module]:
        """What stands where linears are."""
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
    Raises UserError where no try is, with the model as it was, as any other error leaves it.
    """
    close = Close(run)
    try:
        best = _searched(run, menu, choose, store, close)
    except BaseException:
        close.put_back()
        raise
    return best, Bits(bits=best.bits)


def _searched(run: Run, menu: Menu, choose: Choose, store: Store, close: Close) -> Try:
    asked, most = run.budget.most, 8.0 * run.model.dtype.itemsize
    weights = sum(x.params for unit in menu for x in unit.linears)
    low = sum(float(x.prices[0]) for x in menu.values()) / weights  # nothing is smaller
    high = most  # dense, whose KL is 0
    tries, best, kept, refused = list[Try](), None, {}, ""
    bits = max(low * 1.02, run.budget.share(run.model.dtype) * most)
    for _ in range(GUESSES * run.budget.tries):
        close.put_back()  # what an allocation measures is of the dense model
        found = None
        try:
            choices = choose(bits / most)
            found = next((x for x in tries if x.choices == choices), None)
            new = found is None
        except UserError as error:  # an allocation that cannot pay every unit
            new, refused = False, str(error)
        if new:
            found = close.tried(bits, choices, store(choices))
            tries.append(found)
            if found.kl <= asked and (best is None or found.bits < best.bits):
                best, kept = found, close.modules()
        if found is not None and found.kl <= asked:
            high = min(high, bits)
        else:
            low = max(low, bits)
        done = high - low <= CLOSE or (best is not None and best.kl >= NEAR * asked)
        if done or len(tries) == run.budget.tries:
            break
        # a budget that buys what another bought says nothing new about the line
        bits = following(tries, asked, low, high) if new else (low + high) / 2
    said = ", ".join(f"{x.bits:.2f} bits {x.kl:.4g}" for x in tries)
    if best is None:
        raise UserError(
            f"{run.budget.setting}: no model that was tried stays below it ({said or refused}): ask"
            " for more, raise ratio.tries, or use a quantizer of more bits."
        )
    close.put_back(kept)
    open_ = "" if done else f"; {low:.2f} to {high:.2f} bits are still open: raise ratio.tries"
    run.progress.note(
        f"a KL of {asked:g} to the dense model was asked for, measured on"
        f" {close.held.num_samples} x {close.held.length} held-out tokens of the calibration text:"
        f" {said}; taken: {best.bits:.2f} bits{open_}"
    )
    return best


def following(tries: Sequence[Try], asked: float, low: float, high: float) -> float:
    """Bits to ask for next, between too few and enough, where ln KL should be a bit below what is
    asked for: on the line between the nearest try of either kind; or through the last two of one
    kind, or of the usual slope through the only one, at most half way to the other end. Half way
    where a line says nothing, a quarter where it asks for an end.
    """
    wanted, middle = math.log(asked * (1 + NEAR) / 2), (low + high) / 2
    ordered = sorted((x.asked, math.log(max(x.kl, TINY))) for x in tries)
    bad = [x for x in ordered if x[1] > math.log(asked)]
    good = ordered[len(bad) :] if bad else ordered
    first, last, quarter = low, high, (high - low) / 4
    if bad and good:
        (x0, y0), (x1, y1) = bad[-1], good[0]
    elif len(ordered) > 2:
        return middle
    else:
        (x0, y0), *other = bad[::-1] or good
        slope = (other[0][1] - y0) / (other[0][0] - x0) if other else SLOPE
        x1, y1 = x0 + 1, y0 + min(slope, SLOPE / 4)
        first, last = (low, middle) if bad else (middle, high)
    if not (math.isfinite(y0) and math.isfinite(y1)) or y0 == y1:
        return middle
    guess = x0 + (wanted - y0) * (x1 - x0) / (y1 - y0)
    if bad and good and not low + EDGE * 4 * quarter < guess < high - EDGE * 4 * quarter:
        return low + quarter if guess < middle else high - quarter
    edge = min(CLOSE / 2, quarter)
    return min(max(guess, first + edge), last - edge)
