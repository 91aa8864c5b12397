"""The schedule of phases, driven by a fake trainer and module: order, boundaries, learning rates,
convergence, resuming.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from specomp.methods.soco import Recovery
from specomp.training.phases import Convergence, Cosine, Phase
from specomp.training.schedule import PhaseSchedule

RATES = {"scores": 0.05, "deviation": 0.002}


@dataclass
class FakeModule:
    """Says what it is told and remembers what it was asked."""

    losses: list[float] = field(
        default_factory=list
    )  # of every optimizer step; the last one repeats
    met: tuple[float, float] = (0.5, 0.6)
    phase: Phase | None = None
    progress: float = -1.0
    ended: list[tuple[str, Phase]] = field(default_factory=list)
    asked: int = 0

    def performance(self) -> float:
        self.asked += 1
        return self.losses[min(self.asked, len(self.losses)) - 1] if self.losses else 1.0

    def budget_met(self) -> tuple[float, float]:
        return self.met

    def end_phase(self, name: str, phase: Phase) -> None:
        self.ended.append((name, phase))


def recovery(steps: int, until: Convergence | None = None) -> Recovery:
    return Recovery(steps=steps, until=until, prune_margin=None, cut_losers=False)


def fake_trainer() -> Any:
    groups = [{"lr": -1.0, "base_lr": rate} for rate in RATES.values()]
    return SimpleNamespace(
        global_step=0, should_stop=False, optimizers=[SimpleNamespace(param_groups=groups)]
    )


def drive(
    schedule: PhaseSchedule, module: FakeModule, trainer: Any, *, steps: int, accumulate: int = 1
) -> list[tuple[Any, ...]]:
    """Batches of up to `steps` optimizer steps; what each forward pass saw: step, phase, progress
    and the first learning rate.
    """
    seen = []
    for batch in range(steps * accumulate):
        if trainer.should_stop or schedule.finished:
            break
        schedule.on_train_batch_start(trainer, module, None, batch)
        seen.append(
            (
                trainer.global_step,
                schedule.names[schedule.index],
                module.progress,
                trainer.optimizers[0].param_groups[0]["lr"],
            )
        )
        assert module.phase is schedule.phases[schedule.index]
        trainer.global_step += (batch + 1) % accumulate == 0
        schedule.on_train_batch_end(trainer, module, None, None, batch)
    return seen


def make(
    *, until: Convergence | None = None, steps: tuple[int, ...] = (2, 3, 1), warmup: float = 0.0
) -> PhaseSchedule:
    phases: dict[str, Phase] = {
        name: recovery(count, until) for name, count in zip("abc", steps, strict=False)
    }
    return PhaseSchedule(phases, Cosine(warmup, 0.1))


def test_order_and_boundaries():
    schedule, module, trainer = make(), FakeModule(), fake_trainer()
    seen = drive(schedule, module, trainer, steps=100)
    assert schedule.total == 6
    assert [x[:2] for x in seen] == [(0, "a"), (1, "a"), (2, "b"), (3, "b"), (4, "b"), (5, "c")]
    assert [x[2] for x in seen] == pytest.approx([0, 1 / 2, 0, 1 / 3, 2 / 3, 0])
    assert trainer.should_stop
    assert trainer.global_step == schedule.total


def test_every_phase_ends_once():
    schedule, module, trainer = make(), FakeModule(), fake_trainer()
    drive(schedule, module, trainer, steps=100)
    assert module.ended == list(zip("abc", schedule.phases, strict=True))
    assert module.asked == schedule.total, (
        "performance closes the account of each step, so it is asked once"
    )


def test_the_run_goes_on_until_the_last_phase_ends():
    schedule, module, trainer = make(), FakeModule(), fake_trainer()
    drive(schedule, module, trainer, steps=5)
    assert not trainer.should_stop
    assert not schedule.finished
    assert [name for name, _ in module.ended] == ["a", "b"]
    assert schedule.name == "c"
    drive(schedule, module, trainer, steps=1)
    assert trainer.should_stop
    assert schedule.finished


def test_a_finished_run_that_is_resumed_does_nothing():
    """Its last checkpoint is there, its result was not stored yet."""
    schedule, module, trainer = make(), FakeModule(), fake_trainer()
    drive(schedule, module, trainer, steps=100)
    again, fresh, idle = make(), fake_trainer(), FakeModule()
    again.load_state_dict(schedule.state_dict())
    fresh.global_step = trainer.global_step
    again.on_train_batch_start(fresh, idle, None, 6)
    again.on_train_batch_end(fresh, idle, None, None, 6)
    assert again.finished
    assert again.name == "c"
    assert (idle.asked, idle.ended, idle.phase) == (0, [], None)


@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_learning_rates_are_the_base_times_the_planned_share(warmup):
    rate = Cosine(warmup, 0.1)
    schedule, module, trainer = make(warmup=warmup), FakeModule(), fake_trainer()
    for step in range(schedule.total):
        schedule.on_train_batch_start(trainer, module, None, step)
        found = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert found == pytest.approx(
            [base * rate(step / schedule.total) for base in RATES.values()]
        )
        trainer.global_step += 1
        schedule.on_train_batch_end(trainer, module, None, None, step)
    assert [group["base_lr"] for group in trainer.optimizers[0].param_groups] == list(
        RATES.values()
    ), "never multiplied twice"


def test_a_phase_that_ends_early_hands_its_place_in_the_plan_on():
    """The next phase starts where it was planned to, in learning rate too."""
    schedule = make(until=Convergence(window=2, tolerance=0.01), steps=(10, 10))
    module = FakeModule(losses=[1.0])
    trainer = fake_trainer()
    seen = drive(schedule, module, trainer, steps=100)
    assert [x[1] for x in seen] == ["a"] * 4 + ["b"] * 4
    rate = Cosine(0.0, 0.1)
    assert seen[4] == (4, "b", 0.0, pytest.approx(RATES["scores"] * rate(0.5)))
    assert trainer.should_stop


@pytest.mark.parametrize("accumulate", [2, 3])
def test_batches_that_accumulate_change_nothing(accumulate):
    plain, accumulated = FakeModule(), FakeModule()
    first = drive(make(), plain, fake_trainer(), steps=100)
    second = drive(make(), accumulated, fake_trainer(), steps=100, accumulate=accumulate)
    assert second == [x for x in first for _ in range(accumulate)]
    assert [name for name, _ in accumulated.ended] == [name for name, _ in plain.ended]
    assert accumulated.asked == plain.asked


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("until", [None, Convergence(window=2, tolerance=0.01)])
@pytest.mark.parametrize("stop", range(1, 16))
def test_a_resumed_schedule_goes_on_as_if_nothing_had_happened(stop, until, accumulate):
    """A checkpoint at every optimizer step, in the middle of phases and at their edges."""
    steps, losses = (7, 5, 3), [3.0, 2.0, 1.0]  # flat from the third step on
    whole, trainer = FakeModule(losses=losses), fake_trainer()
    expected = drive(
        make(until=until, steps=steps), whole, trainer, steps=100, accumulate=accumulate
    )
    first = make(until=until, steps=steps)
    module = FakeModule(losses=losses)
    trainer = fake_trainer()
    seen = drive(first, module, trainer, steps=stop, accumulate=accumulate)
    again, fresh = make(until=until, steps=steps), fake_trainer()
    again.load_state_dict(first.state_dict())
    fresh.global_step = trainer.global_step
    seen += drive(again, module, fresh, steps=100, accumulate=accumulate)
    assert seen == expected
    assert (
        [name for name, _ in module.ended] == [name for name, _ in whole.ended] == ["a", "b", "c"]
    )
    assert again.finished


def test_the_state_in_the_middle_of_a_phase():
    schedule = make()
    drive(schedule, FakeModule(losses=[5.0, 4.0, 3.0, 2.0]), fake_trainer(), steps=4)
    state = schedule.state_dict()
    assert state == {"index": 1, "start": 2, "history": [3.0, 2.0]}
    again = make()
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.history.append(0.0)
    assert state["history"] == [3.0, 2.0], "the loaded state is a copy"


# --- convergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "hard", "reached"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, True),
        ([1.0, 1.0, 1.0], 0.5, False),  # not twice the window yet
        ([1.0, 1.0, 1.0, 1.0], 0.7, False),  # over budget
        ([1.0, 1.0, 1.0, 1.0], 0.6, True),  # exactly at budget
        ([1.0, 1.0, 0.9, 0.9], 0.5, False),  # falls by a tenth
        ([1.0, 1.0, 0.96, 0.96], 0.5, True),  # falls, by less than the tolerance
        ([1.0, 1.0, 1.5, 1.5], 0.5, True),  # rises
        ([9.0, 1.0, 1.0, 1.0, 1.0], 0.5, True),  # what was before does not count
        ([1.4, 0.6, 0.6, 1.4], 0.5, True),  # means, not values
    ],
)
def test_convergence(history, hard, reached):
    assert Convergence(window=2, tolerance=0.05).reached(history, hard, 0.6) is reached


def test_convergence_needs_a_window():
    with pytest.raises(ValidationError):
        Convergence(window=1, tolerance=0.1)
    with pytest.raises(ValidationError):
        Convergence(window=2, tolerance=-0.1)


def test_a_phase_over_budget_uses_all_its_steps():
    schedule = make(until=Convergence(window=2, tolerance=0.01), steps=(6,))
    module = FakeModule(met=(0.7, 0.6))
    trainer = fake_trainer()
    assert len(drive(schedule, module, trainer, steps=100)) == 6


@pytest.mark.parametrize("change", [{"steps": 0}, {"prune_margin": 0.9}, {"unknown": 1}])
def test_a_phase_checks_its_settings(change):
    with pytest.raises(ValidationError):
        Recovery(**{"steps": 1, "until": None, "prune_margin": None, "cut_losers": True} | change)


# --- the learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "final", "done", "value"),
    [
        (0.0, 0.1, 0.0, 1.0),
        (0.0, 0.1, 0.5, 0.55),
        (0.0, 0.1, 1.0, 0.1),
        (0.2, 0.1, 0.0, 0.0),
        (0.2, 0.1, 0.1, 0.5),
        (0.2, 0.1, 0.2, 1.0),
        (0.2, 0.0, 0.6, 0.5),
        (0.2, 0.0, 1.0, 0.0),
        (0.0, 1.0, 0.7, 1.0),
    ],
)
def test_cosine(warmup, final, done, value):
    assert Cosine(warmup, final)(done) == pytest.approx(value)


def test_cosine_rises_then_falls():
    rate = Cosine(0.25, 0.1)
    values = [rate(i / 100) for i in range(100)]
    assert values[:26] == sorted(values[:26])
    assert values[25:] == sorted(values[25:], reverse=True)
