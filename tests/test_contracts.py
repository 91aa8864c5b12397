"""Every protocol with a minimal class of somebody's own, through a whole compression: nothing in
the package knows it.
"""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from running import ROOT, compose_run, random_tokens
from strangers import Halves, HalvesForm
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import specomp
from specomp.forms.prices import bits, numbers, parts_of
from specomp.models.modules import Substitute
from specomp.numerics.factors import GramNorm, LowRankFactors
from specomp.slots import SLOTS, Rounded

TOKENS = random_tokens(5, 24)
NONE = frozenset()


def compressed(name="svd", ratio=0.4, **slots):
    model = tiny_model("llama")
    report = specomp.compress(
        model, TOKENS, specomp.method(name, **slots), ratio, calibration={"batch_size": 2}
    )
    return model, report


@dataclass(frozen=True)
class Doubled:
    """A target: twice the weight."""

    needs: ClassVar = NONE

    def __call__(self, W, stats):
        return 2 * W


def test_a_target():
    model, report = compressed(target=Doubled())
    plain, _ = compressed()
    ours, theirs = (x.get_submodule(report.linears[0].name).merged_weight() for x in (model, plain))
    assert torch.allclose(ours, 2 * theirs, atol=1e-5)


@dataclass(frozen=True)
class FirstInputs:
    """A norm in which only the first inputs count."""

    needs: ClassVar = NONE

    def __call__(self, stats):
        return OnlyFirst()


class OnlyFirst:
    def decompose(self, target, keep=None):
        weights = torch.full((target.shape[1],), 1e-4)
        weights[:4] = 1
        return GramNorm(weights).decompose(target, keep)

    def loss(self, error):
        return float(error[:, :4].norm())


def test_a_whitening():
    model, report = compressed(whitening=FirstInputs())
    dense = tiny_model("llama")
    for x in report.linears[:4]:
        error = model.get_submodule(x.name).merged_weight() - dense.get_submodule(x.name).weight
        assert error[:, :4].norm() < 0.05 * error.norm()


@dataclass(frozen=True)
class EveryOther:
    """An allocation: rank 3 for every other unit."""

    needs: ClassVar = NONE
    compresses: ClassVar = True
    needs_spectra: ClassVar = False

    def __call__(self, menu, share, reads):
        found = {}
        for index, (unit, options) in enumerate(menu.items()):
            rank = options.sizes.tolist().index(3)
            found[unit] = options.choice(options.last if index % 2 else rank)
        return found


def test_an_allocation():
    _, report = compressed(allocation=EveryOther())
    assert [x.dense for x in report.linears[:4]] == [False, True, False, True]
    assert {x.rank for x in report.linears if not x.dense} == {3}


@dataclass(frozen=True)
class Halved:
    """A compensation: half of U."""

    active: ClassVar = True
    upstream: ClassVar = "dense"
    needs: ClassVar = frozenset(
        {specomp.rows.importlib.import_module("specomp.numerics.statistics").AbsMean()}
    )
    num_samples: ClassVar = None

    def __call__(self, target, factors, stats):
        assert stats
        return LowRankFactors(factors.U / 2, factors.Vt)

    def loss(self, error, stats):
        return float(error.norm())


def test_a_compensation():
    model, report = compressed(compensation=Halved())
    plain, _ = compressed()
    name = report.linears[0].name
    ours, theirs = (x.get_submodule(name).merged_weight() for x in (model, plain))
    assert torch.allclose(ours, theirs / 2)
    assert all(x.compensation_gain > 1 for x in report.linears)  # it does harm, and says so


@dataclass(frozen=True)
class Zeroed:
    """A refinement: biases and weights of a decoder layer become zero; says that half of the loss
    is left.
    """

    active: ClassVar = True
    steps: ClassVar = 1
    moves_stored: ClassVar = True

    def __call__(self, index, parameters, batches):
        assert batches.output(0).shape == batches.wanted(0).shape
        assert len(batches) == 3
        for parameter in parameters:
            parameter.data.zero_()
        return 0.5


def test_a_refinement():
    model, report = compressed(refinement=Zeroed())
    assert not any(model.get_submodule(x.name).merged_weight().any() for x in report.linears)
    assert {x.compensation_gain for x in report.linears} == {0.5}
    with pytest.raises(specomp.UserError, match="Zeroed moves numbers off the grid"):
        compressed(refinement=Zeroed(), quantizer="rtn_int4")


@dataclass(frozen=True)
class Told:
    """A training without a gradient step: it sees the dense model, then what is stored, and negates
    that.
    """

    active: ClassVar = True
    chooses: ClassVar = False
    moves_stored: ClassVar = True
    adds_bias: ClassVar = False
    work: ClassVar = None

    def samples_of(self, calibration):
        return calibration

    def check(self, method, budget, num_samples, processes, dtype):
        if num_samples < 2:
            raise specomp.UserError("too few")

    def before(self, run):
        assert run.is_dense
        return "prepared"

    def forms(self, run, prepared, choices, statistics, spectra):
        assert prepared == "prepared"

    def after(self, run, prepared):
        assert not run.is_dense
        for linear in run.linears:
            run.model.get_submodule(linear.name).u_proj.weight.data.neg_()
        return {"told": prepared}


def test_a_training():
    model, report = compressed(training=Told())
    plain, _ = compressed()
    name = report.linears[0].name
    assert torch.equal(
        model.get_submodule(name).merged_weight(), -plain.get_submodule(name).merged_weight()
    )
    assert report.training == {"told": "prepared"}


@dataclass(frozen=True)
class Truncated:
    """A rounding: numbers to multiples of 1/8, on a grid that it does not describe."""

    grid: ClassVar = None
    grids: ClassVar = ()
    needs: ClassVar = NONE

    def single(self, packing):
        return [packing]

    def wide(self, forms):
        return forms

    def __call__(self, chain, stats, dtype):
        return tuple(Rounded((x * 8).round() / 8) for x in chain.matrices)

    def notes(self, damping):
        return []


def test_a_rounding():
    model, report = compressed(rounding=Truncated())
    weight = model.get_submodule(report.linears[0].name).u_proj.weight
    assert torch.equal(weight * 8, (weight * 8).round())


# --- a stranger's form: tests/strangers.py


def test_a_form_is_priced_chosen_saved_and_reloaded(tmp_path):
    model = tiny_model("llama_gqa")
    method = specomp.method("specomp_low_rank", packing=HalvesForm())
    report = specomp.compress(model, TOKENS, method, 0.4, calibration={"batch_size": 2})
    chosen = {x.name: x for x in report.linears if not x.dense}
    assert chosen and report.ledger.measured_retention == pytest.approx(0.6, abs=0.02)
    for x in chosen.values():
        module = model.get_submodule(x.name)
        assert isinstance(module, Halves)
        unit = next(u for u in specomp_units(model) if u.name == x.name)
        parts = HalvesForm().parts(unit, x.rank)
        assert numbers(parts) == numbers(parts_of(module)) == x.stored
        assert bits(parts, torch.float32) == bits(parts_of(module), torch.float32)
    assert any("halves" in note for note in report.notes)
    expected = logits(model)

    folder = specomp.save(model, tmp_path / "saved")
    assert torch.equal(logits(specomp.load(folder).model), expected)
    merged = specomp.save(model, tmp_path / "merged", form="dense")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not any(isinstance(x, Substitute) for x in plain.modules())
    assert torch.allclose(logits(plain), expected, atol=1e-4)
    assert remote_logits(folder, tmp_path) == pytest.approx(expected.flatten().tolist(), abs=1e-6)


def test_a_folder_of_an_unknown_form_says_what_to_do(tmp_path):
    model = tiny_model("llama_gqa")
    specomp.compress(model, TOKENS, specomp.method("svd", packing=HalvesForm()), 0.4)
    folder = specomp.save(model, tmp_path / "saved")
    code = f"import specomp; specomp.load({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "strangers.Halves" in done.stderr and "trust_remote_code" in done.stderr


def specomp_units(model):
    from specomp.models.families import family_of

    return family_of(model.config).units(model)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS[:1]).logits


def remote_logits(folder, tmp_path):
    """Of a process that cannot import specomp, nor the stranger's file."""
    (tmp_path / "ids.txt").write_text(" ".join(map(str, TOKENS[0].tolist())))
    code = f"""
import sys, json, torch
sys.modules["specomp"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
ids = torch.tensor([[int(x) for x in open({str(tmp_path / "ids.txt")!r}).read().split()]])
print(json.dumps(model(input_ids=ids).logits.flatten().tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return __import__("json").loads(done.stdout.strip().splitlines()[-1])


# --- labels, and what is lacking


def test_a_name_is_a_label(tmp_path):
    record = compose_run(tmp_path, "method=svd", "method.name=dense", "benchmark=none")
    assert record.counted.measured_retention < 0.7
    assert "dense" in record.model_folder


@pytest.mark.parametrize("slot", SLOTS)
def test_what_a_class_lacks_is_named(slot):
    with pytest.raises(
        specomp.UserError, match=rf"method\.{slot} is a Nothing, which is no .*lacks"
    ):
        specomp.method("svd", **{slot: Nothing()})


class Nothing:
    pass


@dataclass(frozen=True)
class Constant:
    """A benchmark that always says the same."""

    id: ClassVar = "constant@1"
    protocol: ClassVar = "constant@1"
    metric: ClassVar = "answer"
    volatile: ClassVar = False
    metrics: ClassVar = {"answer": None}

    def workload(self):
        return []

    def validate(self, max_length):
        pass

    def __call__(self, model, tokenizer):
        return {"answer": 42.0}


def test_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECOMP_ALLOW", "test_contracts")
    part = "+benchmark.parts.own={_target_: test_contracts.Constant}"
    record = compose_run(tmp_path, "method=svd", part)
    assert record.metrics["constant@1"] == {"answer": 42.0}
    assert record.dense_metrics["constant@1"] == {"answer": 42.0}
