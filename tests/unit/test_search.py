"""A budget by quality: the smallest model that was tried and is close enough, whatever is wrong
with the others.
"""

import math

import pytest
import torch
from running import random_tokens
from tiny import tiny_model

import specomp
from specomp import rows
from specomp.compression.search import Try, apart, besides, following
from specomp.data.calibration import CalibrationSet
from specomp.errors import UserError
from specomp.forms.prices import Divergence

TOKENS = random_tokens(12, 24)


def asked(kl, **settings):
    return Divergence(**{"kl": kl, "held_out": 8, "tries": 6, "start": 4.0, **settings})


def kl_to(dense, model, tokens):
    with torch.no_grad():
        wanted, got = (torch.log_softmax(x(tokens).logits.double(), -1) for x in (dense, model))
    return float((wanted.exp() * (wanted - got)).sum() / tokens.numel())


@pytest.mark.parametrize(
    ("row", "quantizer", "kl"),
    [("specomp_low_rank", None, 0.01), ("svd_llm", "none", 0.15), ("svd_llm", "gptq_int4", 0.2)],
)
def test_what_is_promised_is_measured(row, quantizer, kl):
    model, dense = tiny_model("llama"), tiny_model("llama")
    budget = asked(kl, start=20.0 if quantizer == "none" else 4.0)
    report = specomp.compress(model, TOKENS, row, budget, quantizer=quantizer)
    found = kl_to(dense, model, TOKENS[4:])
    assert found == pytest.approx(report.ledger.measured_kl, rel=1e-3) and found <= kl
    assert report.ledger.target_kl == kl
    assert report.ledger.measured_bits <= report.ledger.target_bits * 1.001
    assert report.made["calibration"]["samples"] == 4 and report.made["kl"] == kl
    (said,) = [x for x in report.notes if "held-out" in x]
    tries = said.split("calibration text: ")[1].split("; taken")[0].split(", ")
    pairs = [tuple(float(y) for y in x.split(" bits ")) for x in tries]
    good = [bits for bits, lost in pairs if lost <= kl]
    assert min(good) == pytest.approx(report.ledger.target_bits, abs=0.006)


def test_only_what_is_not_held_out_is_calibrated_on():
    """The same weights as on those samples alone, at the bits that were found."""
    model, again = tiny_model("llama"), tiny_model("llama")
    method = specomp.method("specomp_low_rank")
    report = specomp.compress(model, TOKENS, method, asked(0.01))
    bits = specomp.Bits(bits=report.ledger.target_bits)
    specomp.compress(again, TOKENS[:4], method, bits)
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_a_budget_that_no_try_meets_leaves_the_model_as_it_was():
    model, dense = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(UserError, match="ratio.kl=1e-12: no model that was tried.*ratio.tries"):
        specomp.compress(model, TOKENS, "svd_llm", asked(1e-12, tries=2), quantizer="gptq_int4")
    assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)
    assert all(isinstance(model.get_submodule(n), torch.nn.Linear) for n in ["lm_head"])


WHOLE = {
    "packing": "whole",
    "quantizer": rows.slot("quantizer", "grids", whole=[[x, 8] for x in (3, 4, 5, 6, 8)]),
}


@pytest.mark.parametrize("kl", [0.05, 0.01, 1e-4])
def test_steps_between_budgets_do_not_stop_a_search(kl):
    """Few options, each bought by many budgets; and budgets that cannot pay every linear."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    method = specomp.method("svd_llm", **WHOLE)
    report = specomp.compress(model, TOKENS, method, asked(kl, start=8.0))
    assert kl_to(dense, model, TOKENS[4:]) <= kl
    # the grid below is not good enough, or there is none
    fewer = specomp.Bits(bits=report.ledger.measured_bits - 0.5)
    again = tiny_model("llama")
    try:
        specomp.compress(again, TOKENS[:4], method, fewer)
    except UserError:
        return
    assert kl_to(dense, again, TOKENS[4:]) > kl


def trials(pairs):
    return [Try(bits, bits, kl, {}, []) for bits, kl in pairs]


def test_the_next_try_is_on_the_line():
    wanted = math.log(0.05 * 1.93 / 2)
    line = trials([(x, math.exp(2.0 - 1.5 * x)) for x in (3.0, 4.0)])  # 0.083 and 0.018
    assert following(line, 0.05, 3.0, 4.0) == pytest.approx((2.0 - wanted) / 1.5)
    assert 3.0 < following(line[:1], 0.05, 3.0, 16.0) < 4.5
    assert 2.0 < following(trials([(4.0, 0.0)]), 0.05, 2.0, 4.0) < 4.0  # nothing lost: fewer
    bad = trials([(4.0, math.inf)])
    assert following(bad, 0.05, 4.0, 16.0) == 10.0
    three = trials([(4.0, 0.2), (4.2, 0.19), (4.4, 0.18)])
    assert following(three, 0.05, 4.4, 16.0) == pytest.approx(10.2), "no creeping"
    edge = trials([(4.0, 0.0501), (8.0, 1e-9)])
    assert following(edge, 0.05, 4.0, 8.0) == pytest.approx(5.0), "nor at an edge"


@pytest.mark.parametrize("curve", [lambda b: 10 * (1 - b / 16) ** 3, lambda b: math.exp(3 - b)])
@pytest.mark.parametrize("asked_for", [0.02, 0.1, 1.0])
def test_a_search_ends_near_the_smallest(curve, asked_for):
    """Of any falling curve, after eight models."""
    low, high, tries, bits = 1.0, 16.0, [], 4.0
    for _ in range(8):
        tries.append(Try(bits, bits, curve(bits), {}, []))
        low, high = (low, bits) if curve(bits) <= asked_for else (bits, high)
        bits = following(tries, asked_for, low, high)
    best = min(x.bits for x in tries if x.kl <= asked_for)
    ideal = next(b / 100 for b in range(1601) if curve(b / 100) <= asked_for)
    assert best - ideal < 0.35


def test_a_search_that_is_stopped_leaves_the_model_as_it_was(monkeypatch):
    from specomp.compression import search

    model, dense = tiny_model("llama"), tiny_model("llama")

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.Close, "tried", stopped)
    with pytest.raises(KeyboardInterrupt):
        specomp.compress(model, TOKENS, "svd_llm", asked(0.1), quantizer="gptq_int4")
    assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)


def test_an_allocation_that_measures_sees_the_dense_model():
    method = specomp.method("asvd_strs", quantizer="none")
    report = specomp.compress(
        tiny_model("llama"), TOKENS, method, asked(0.15, start=20.0), quantizer="none"
    )
    assert report.ledger.measured_kl <= 0.15


def test_what_cannot_be_searched_for():
    samples = CalibrationSet(TOKENS, description={"tokenizer": {"sha256": ""}}, batch_size=2)
    with pytest.raises(UserError, match="measures on 12 samples.*there are 12.*ratio.held_out"):
        apart(samples, asked(0.1, held_out=12))
    more = samples.subset(10)
    assert torch.equal(besides(more, samples, 2).tokens, TOKENS[10:])
    with pytest.raises(UserError, match="only 2 samples beside the 10.*3 are to be held out"):
        besides(more, samples, 3)
    with pytest.raises(UserError, match="spends no budget"):
        specomp.compress(tiny_model("llama"), TOKENS, "dense", "kl0_05", quantizer="gptq_int4")
    with pytest.raises(UserError, match="would train 6 times.*such as specomp"):
        specomp.compress(
            tiny_model("llama"),
            TOKENS,
            specomp.method("svd_llm", training="lora"),
            "kl0_05",
            quantizer="none",
        )
    refined = specomp.method("svd_llm", refinement="block_refine")
    with pytest.raises(UserError, match="BlockRefine changes what every try.*refinement=none"):
        specomp.compress(tiny_model("llama"), TOKENS, refined, "kl0_05", quantizer="none")
    report = specomp.compress(tiny_model("llama"), TOKENS, "dense", "kl0_05")
    assert report.ledger.measured_kl is None, "its ratio is ignored"
