"""What a plan says, a run does: passes, tokens, bytes carried, spectra and statistics written,
stages.
"""

import functools
import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from running import CONF, make_run, trainer_factory

from specomp import rows
from specomp.cache import Cache
from specomp.compression import stream
from specomp.compression.calibrate import Observation, calibrate
from specomp.compression.checks import check_method
from specomp.compression.loop import compress
from specomp.compression.run import Progress
from specomp.errors import UserError
from specomp.forms.prices import Bits, Numbers
from specomp.pricing import planned

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
QUICK = {"asvd_strs": {"allocation": {"candidates": [0.1, 0.6]}}}
TRAININGS = {
    "none": {},
    "lora": {"training": rows.slot("training", "lora", steps=2, rank=2)},
    "polish": {"training": rows.slot("training", "polish", stages={"polish": {"steps": 2}})},
}
AXES = {
    "method": METHODS,
    "upstream": ["dense", "compressed"],
    "quantizer": ["none", "gptq_int4", "rtn_int4", "grids"],
    "packing": ["factors", "pivoted", "whole"],
    "training": list(TRAININGS),
    "refinement": ["none", "block_refine"],
    "compensation": ["own", "update_u"],
    "units": ["none", "cut", "cut_all"],
}


DRAWN = 4000


def pairwise(points, seed=0):
    """Some of the points in which every pair of values occurs that occurs in all: greedy, from a
    fixed shuffle.
    """
    points = list(points)
    random.Random(seed).shuffle(points)
    held = [set(itertools.combinations(sorted(x.items()), 2)) for x in points]
    left, chosen = set().union(*held), []
    while left:
        best = max(range(len(points)), key=lambda i: len(held[i] & left))
        left -= held[best]
        chosen.append(points[best])
    return chosen


def possible():
    """Points that are not refused, of some thousands of all: in them every pair of values that
    there can be comes up.
    """
    dice = random.Random(0)
    for _ in range(DRAWN):
        values = [dice.choice(x) for x in AXES.values()]
        point = dict(zip(AXES, values, strict=True))
        others = {k: v for k, v in point.items() if k not in ("method", "quantizer", "packing")}
        if point["method"] == "dense" and set(others.values()) != {"none", "dense", "own"}:
            continue
        # V2 divides by log(loss), and in full on a grid a tiny linear loses less than 1
        if point["method"] == "svd_llm_v2" and point["quantizer"] == "grids":
            continue
        try:
            check_method(method_of(point), budget_of(point), point["upstream"], 5, 1, "float32")
        except UserError:
            continue
        yield point


def budget_of(point):
    return Bits(bits=6.0) if point["quantizer"] == "grids" else Numbers(compression=0.4)


def method_of(point):
    return made(
        *(
            point[x]
            for x in (
                "method",
                "quantizer",
                "packing",
                "training",
                "refinement",
                "compensation",
                "units",
            )
        )
    )


row = functools.cache(lambda name: rows.method(name, **QUICK.get(name, {})))
slot = functools.cache(rows.slot)


@functools.cache
def made(name, quantizer, packing, training, refinement, compensation, units):
    slots = dict(TRAININGS[training])
    if training == "none" and name == "soco":
        slots["training"] = slot("training", "soco", steps_factor=0.005)
    if compensation != "own":
        slots["compensation"] = slot("compensation", compensation)
    if refinement != "none":
        slots["refinement"] = slot("refinement", "block_refine", steps=1)
    return replace(
        row(name),
        rounding=slot("quantizer", quantizer),
        packing=slot("packing", packing),
        units=slot("units", units),
        **slots,
    )


class Watched(Progress):
    """Names of the stages as they run."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def stage(self, name):
        self.stages.append(name)
        return super().stage(name)


@pytest.fixture
def executed(monkeypatch):
    """Counts of what a run does."""
    counts = Counter()
    enter, observe = Observation.__enter__, Observation.observe
    save, make, twin = Cache.save, stream.HiddenStream.__init__, stream.HiddenStream.twin

    def entered(self):
        counts["gradient passes" if self.job.gradients else "passes"] += 1
        return enter(self)

    def observed(self, batch):
        counts["gradient tokens" if self.job.gradients else "tokens"] += batch.numel()
        return observe(self, batch)

    def saved(self, kind, key, part, tensors):
        counts[kind] += sum(x.numel() * x.element_size() for x in tensors.values())
        return save(self, kind, key, part, tensors)

    def carried(made):
        counts["carried"] += sum(x.numel() * x.element_size() for x in made.hidden)
        return made

    def made(self, *arguments):
        make(self, *arguments)
        carried(self)

    monkeypatch.setattr(Observation, "__enter__", entered)
    monkeypatch.setattr(Observation, "observe", observed)
    monkeypatch.setattr(Cache, "save", saved)
    monkeypatch.setattr(stream.HiddenStream, "__init__", made)
    monkeypatch.setattr(stream.HiddenStream, "twin", lambda self: carried(twin(self)))
    return counts


@pytest.mark.parametrize("point", pairwise(possible()), ids=lambda x: "-".join(x.values()))
def test_a_run_does_what_its_plan_says(tmp_path, executed, point):
    progress, method = Watched(), method_of(point)
    torch.manual_seed(0)
    # V2 divides by log(loss), which grows with the number of tokens.
    size = (
        {"num_samples": 48, "length": 96, "batch_size": 16}
        if point["method"] == "svd_llm_v2"
        else {}
    )
    upstream = point["upstream"]
    run = make_run(
        "llama_gqa", Cache(tmp_path), method=method, progress=progress, upstream=upstream, **size
    )
    run = replace(run, trainer=trainer_factory(), budget=budget_of(point))
    spec, samples = run.calibration, run.samples
    plan = planned(
        run.model.config, "float32", method, run.budget, spec, samples.num_samples, samples.length
    )
    if method.is_dense:
        assert plan.route.stages == () and plan.route.dense == frozenset()
        return
    with progress.stage("calibrate"):
        statistics = calibrate(run)
    report = compress(run, statistics)

    passes = Counter(gradients for gradients, _ in plan.passes)
    tokens = sum(n for gradients, n in plan.passes if not gradients)
    assert executed["passes"] == passes[False]
    assert executed["gradient passes"] == passes[True]
    assert executed["tokens"] == tokens
    assert executed["gradient tokens"] == sum(n for gradients, n in plan.passes if gradients)
    assert executed["statistics"] == plan.statistics_cached
    assert executed["units"] == plan.units_cached
    assert executed["carried"] == plan.hidden_carried
    assert executed["teacher"] == plan.teacher_cached
    assert list(dict.fromkeys(progress.stages)) == list(dict.fromkeys(plan.route.stages))
    if method.training.chooses and plan.ordered:  # sizes of what is cut are known in a run alone
        assert executed["spectra"] <= plan.spectra_cached
    elif plan.asked in (None, "spectra", "trials", "a training"):
        assert executed["spectra"] == plan.spectra_cached
    if plan.asked is None:
        assert report.ledger.compressed == plan.compressed
        refined = {unit.decoder_layer for unit in plan.low} if run.route.refines else ()
        gains = 8 * len(refined)  # one number beside each layer's
        assert executed["refined"] == plan.refined_cached + gains


def test_the_drift_that_was():
    """Rounding that reads compressed inputs makes the norm's spectra the stream's, not the
    cache's.
    """
    method = rows.method("svd", quantizer="gptq_int4")
    run = make_run("llama_gqa", Cache("unused"), method=method, upstream="compressed")
    plan = planned(run.model.config, "float32", method, run.budget, run.calibration, 4, 32)
    assert plan.spectra_cached == 0
    assert plan.hidden_carried == 4 * 32 * 32 * 4
