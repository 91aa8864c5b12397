"""The core against whole forward passes and hand-made gradients: streams, ranges of layers, cache,
passes counted, nothing trained."""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import make_run, random_tokens
from tiny import FAMILY_NAMES

from specomp import api, rows
from specomp.cache import Cache, digest
from specomp.compression.calibrate import Statistics, calibrate, part_name, statistic_key
from specomp.compression.evidence import DenseEvidence
from specomp.compression.loop import compress, compress_layers, dense_spectra
from specomp.compression.module import CalibrationOnlyModule
from specomp.compression.observe import LayerObserver
from specomp.compression.probe import Probe
from specomp.compression.report import LinearReport
from specomp.compression.route import Route
from specomp.compression.run import Run
from specomp.compression.spectra import Spectra
from specomp.compression.stream import HiddenStream
from specomp.compression.workers import foretold, forks, one_thread_each
from specomp.data.calibration import CalibrationSet
from specomp.errors import UserError
from specomp.forms.factors import Factors, LowRankLinear
from specomp.forms.prices import Bits, Numbers
from specomp.methods.adasvd import AdaComp, AdaCR
from specomp.methods.fwsvd import FisherWhitening
from specomp.methods.kronecker import KroneckerWhitening
from specomp.methods.svd import (
    NoCompensation,
    NoRefinement,
    NoTraining,
    NoWhitening,
    UniformAllocation,
    Weight,
)
from specomp.methods.svd_llm import GramWhitening, UpdateU
from specomp.models.modules import weight_of
from specomp.numerics.statistics import (
    AbsMean,
    Fisher,
    Gram,
    IOCosine,
    OutputGradGram,
    StackedGram,
    TokenWeightedGram,
)
from specomp.quantization.none import NoQuantizer
from specomp.slots import Choice, Method
from specomp.training.spectrum import stored_as

SITE_STATISTICS = (Gram(), AbsMean(), StackedGram(2), IOCosine())


def method(**slots) -> Method:
    """SVD-LLM with slots exchanged."""
    plain = {
        "name": "test",
        "target": Weight(),
        "whitening": GramWhitening(solve="float64"),
        "allocation": UniformAllocation(exact_budget=False),
        "compensation": NoCompensation(),
        "refinement": NoRefinement(),
        "training": NoTraining(),
        "packing": Factors(),
        "rounding": NoQuantizer(),
    }
    return Method(**plain | slots)


ADACOMP = AdaComp(
    iterations=1,
    update="pseudo_inverse",
    stack_of_batch="gram",
    num_buckets=2,
    upstream="compressed",
)
ADACR = AdaCR(min_retention_gap=0.1, importance="block_influence", budget="water_filling")


def run_method(
    run: Run, chosen: Method, compression: float = 0.4, ranks: dict[str, int] | None = None
) -> list[LinearReport]:
    """Another method on a run's model and tokens; ranks: by linear, instead of the allocation's."""
    own = replace(run, method=chosen, budget=Numbers(compression=compression))
    statistics = calibrate(own)
    if ranks is None:
        return compress(own, statistics).linears
    choices = {unit: stored_as(own, unit, ranks[unit.name]) for unit in own.units}
    return compress_layers(own, choices, statistics, dense_spectra(own, statistics))


def ranks_of(run: Run, rank: int) -> dict[str, int]:
    return {unit.name: rank for unit in run.units}


def full_ranks(run: Run) -> dict[str, int]:
    return {x.name: min(x.m, x.n) for x in run.linears}


def spectra_of(run: Run, chosen: Method) -> Spectra:
    """Those of the dense model in the norm of a method."""
    statistics = calibrate(run, chosen.whitening.needs)
    return Spectra(run, chosen.target, chosen.whitening, statistics, complete=False)


def dense_needs(chosen: Method, upstream: str) -> frozenset:
    """Statistics of the dense model that a method reads; the others are taken on the way."""
    return Route.of(chosen, upstream, 5).dense


def by_lightning(run: Run, statistics) -> Statistics:
    """Each pass in a predict loop of Lightning, as run.py takes it."""
    return calibrate(run, statistics, drive=CalibrationOnlyModule(run)._drive)


LOOPS = pytest.mark.parametrize("loop", [calibrate, by_lightning], ids=["plain", "lightning"])


def count_layers(run) -> Counter:
    """Executions of each decoder layer from now on."""
    counts: Counter = Counter()
    for index, layer in enumerate(run.layers):
        layer.register_forward_hook(lambda *_, index=index: counts.update([index]))
    return counts


def all_values(run, statistics) -> dict[str, torch.Tensor]:
    dense = Statistics(run, statistics)
    return {
        f"{index}/{name}": value.clone()
        for index in range(len(run.layers))
        for name, value in dense.layer(index).items()
    }


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


# --- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "batch_size"), [(4, 2), (5, 2), (3, 1), (3, 8)])
@pytest.mark.parametrize("family_name", FAMILY_NAMES)
def test_decoder_layer_by_decoder_layer_equals_the_whole_forward(
    cache, family_name, num_samples, batch_size
):
    """Length 40 is beyond the sliding windows (16) of mistral and gemma2, so their masks matter."""
    run = make_run(family_name, cache, num_samples=num_samples, batch_size=batch_size, length=40)
    with torch.no_grad():
        whole = run.family.decoder(run.model)(
            input_ids=run.samples.tokens, use_cache=False, output_hidden_states=True
        ).hidden_states
    stream = HiddenStream(run, run.samples)
    assert torch.equal(torch.cat(stream.hidden), whole[0])
    for index in range(len(run.layers)):
        if index + 1 < len(run.layers):  # the last of the whole forward's is after the final norm
            assert (torch.cat(list(stream.run(index))) - whole[index + 1]).abs().max() <= 1e-6
        stream.advance(index)
    with torch.no_grad():
        decoder = run.family.decoder(run.model)
        norm = getattr(decoder, "norm", None) or decoder.final_layer_norm
        assert (norm(torch.cat(stream.hidden)) - whole[-1]).abs().max() <= 1e-6


def test_masks_matter_in_that_test(cache):
    """Without its sliding window mistral gives something else, so the recorded masks were
    needed.
    """
    run = make_run("mistral", cache, length=40)
    stream = HiddenStream(run, run.samples)
    masked = torch.cat(list(stream.run(0)))
    for calls in stream.calls.values():
        for _, kwargs in calls:
            kwargs["attention_mask"] = None
    assert (torch.cat(list(stream.run(0))) - masked).abs().max() > 1e-3


def test_the_model_is_untouched_by_recording(cache):
    run = make_run("gemma2", cache)
    layers = run.layers
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    HiddenStream(run, run.samples)
    assert all(before is after for before, after in zip(layers, run.layers, strict=True))
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in state.items())


def test_the_model_gets_its_layers_back_when_recording_fails(cache, monkeypatch):
    run = make_run("llama", cache)
    layers = run.layers
    monkeypatch.setattr(type(run.samples), "batches", lambda _: [torch.full((1, 4), 10**6)])
    with pytest.raises(IndexError):
        HiddenStream(run, run.samples)
    assert all(before is after for before, after in zip(layers, run.layers, strict=True))


@pytest.mark.parametrize("family_name", FAMILY_NAMES)
def test_streamed_statistics_of_the_dense_model_equal_the_dense_pass(cache, family_name):
    run = make_run(family_name, cache, length=40)
    calibrate(run, SITE_STATISTICS)
    expected = all_values(run, SITE_STATISTICS)
    stream = HiddenStream(run, run.samples)
    found = {}
    for index in range(len(run.layers)):
        found |= {
            f"{index}/{name}": value
            for name, value in stream.observe(index, SITE_STATISTICS).items()
        }
        stream.advance(index)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("limit", "batch_size", "length"),
    [(1, 2, 24), (3, 2, 24), (4, 2, 24), (5, 2, 24), (3, 8, 24), (3, 5, 5), (1, 5, 5)],
)
@pytest.mark.parametrize("family_name", ["llama", "mistral", "opt"])
def test_the_first_samples_are_the_first_samples(cache, family_name, limit, batch_size, length):
    """A limit inside a batch cuts hidden states and masks alike, also where the length equals the
    batch size.
    """
    run = make_run(family_name, cache, num_samples=5, batch_size=batch_size, length=length)
    stream = HiddenStream(run, run.samples)
    whole = torch.cat(list(stream.run(0)))
    part = torch.cat(list(stream.run(0, num_samples=limit)))
    assert part.shape[0] == limit
    assert (part - whole[:limit]).abs().max() <= 1e-6


# --- ranges of decoder layers, and dtypes ---------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("family_name", ["llama", "opt", "gemma2"])
def test_any_number_of_layers_at_once_gives_the_same_statistics(tmp_path, family_name, loop):
    statistics = (*SITE_STATISTICS, Fisher("in"), Fisher("out"), OutputGradGram())
    whole = make_run(family_name, Cache(tmp_path))
    calibrate(whole, statistics)
    expected = all_values(whole, statistics)
    for size in (1, 2, 7):
        run = make_run(family_name, Cache(tmp_path / str(size)), layers_at_once=size)
        loop(run, statistics)
        assert_close(all_values(run, statistics), expected, 1e-6)


def test_lightning_sees_the_same_bits(tmp_path):
    statistics, found = (*SITE_STATISTICS, Fisher("in"), OutputGradGram()), []
    for loop in (calibrate, by_lightning):
        run = make_run("llama", Cache(tmp_path / loop.__name__))
        loop(run, statistics)
        found.append(all_values(run, statistics))
    assert_close(*found, 0.0)


@LOOPS
def test_a_range_of_layers_costs_one_pass_each(tmp_path, loop):
    for size, passes in ((None, 1), (2, 2), (1, 3)):
        run = make_run("llama", Cache(tmp_path / str(size)), layers_at_once=size)
        counts = count_layers(run)
        loop(run, {Gram()})
        assert counts == dict.fromkeys(range(3), 3 * passes)  # 5 samples in batches of 2


def test_grams_are_what_their_definition_says(cache):
    """Against inputs recorded by hand from one whole forward."""
    run = make_run("llama_gqa", cache)
    seen = {}
    handles = [
        run.model.get_submodule(x.name).register_forward_pre_hook(
            lambda _, args, name=x.name: seen.update({name: args[0].flatten(0, 1)})
        )
        for x in run.linears
    ]
    with torch.no_grad():
        run.model(input_ids=run.samples.tokens)
    for handle in handles:
        handle.remove()
    dense = calibrate(run, {Gram(), AbsMean()})
    for linear in run.linears:
        stats, x = dense(linear), seen[linear.name]
        assert (stats[Gram()] - x.T @ x).norm() <= 1e-5 * stats[Gram()].norm()
        assert (stats[AbsMean()] - x.abs().mean(0)).norm() <= 1e-5 * stats[AbsMean()].norm()


def test_bfloat16_products_agree_with_float32_to_a_percent(tmp_path):
    values = {}
    for precision in ("float32", "bfloat16"):
        run = make_run(
            "llama", Cache(tmp_path / precision), precision=precision, num_samples=16, length=64
        )
        calibrate(run, {Gram()})
        values[precision] = all_values(run, {Gram()})
    assert_close(values["bfloat16"], values["float32"], 1e-2)
    assert any(
        not torch.equal(value, values["float32"][name])
        for name, value in values["bfloat16"].items()
    )
    assert all(value.dtype == torch.float32 for value in values["bfloat16"].values())


def test_products_of_gradients_are_never_rounded_to_half_precision(tmp_path):
    """A bfloat16 forward pass leaves autocast on in its hooks. What it must not round: a Gram of T
    < m gradients has rank T, to float32.
    """
    run = make_run("llama", Cache(tmp_path), precision="bfloat16", num_samples=2, length=8)
    calibrate(run, {OutputGradGram(), TokenWeightedGram("in")})
    for name, value in all_values(run, {OutputGradGram(), TokenWeightedGram("in")}).items():
        values = torch.linalg.eigvalsh(value.double())
        assert len(values) > 16, name
        assert float(values[:-16].abs().max()) <= 1e-5 * float(values[-1]), name


def test_float64_sums_are_float64(cache):
    run = make_run("llama", cache, accumulate="float64")
    calibrate(run, {Gram()})
    assert all(value.dtype == torch.float64 for value in all_values(run, {Gram()}).values())


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family_name", ["llama_gqa", "opt", "phi3"])
def test_fisher_is_the_mean_squared_gradient_of_the_shifted_loss(cache, family_name):
    run = make_run(family_name, cache, num_samples=3)
    dense = calibrate(run, {Fisher("in"), Fisher("out")})
    expected = {x.name: 0.0 for x in run.linears}
    for x in run.linears:
        run.model.get_submodule(x.name).weight.requires_grad_(True)
    for sequence in run.samples.tokens.split(1):
        logits = run.model(input_ids=sequence).logits
        loss = torch.nn.functional.cross_entropy(
            logits[0, :-1], sequence[0, 1:]
        )  # token t predicts t + 1, once
        gradients = torch.autograd.grad(
            loss, [run.model.get_submodule(x.name).weight for x in run.linears]
        )
        for x, gradient in zip(run.linears, gradients, strict=True):
            expected[x.name] = expected[x.name] + gradient.square() / 3
    for x in run.linears:
        stats = dense(x)
        assert stats[Fisher("in")].shape == (x.n,)
        assert stats[Fisher("out")].shape == (x.m,)
        assert (stats[Fisher("in")] - expected[x.name].sum(0)).norm() <= 1e-4 * stats[
            Fisher("in")
        ].norm()
        assert (stats[Fisher("out")] - expected[x.name].sum(1)).norm() <= 1e-4 * stats[
            Fisher("out")
        ].norm()


@pytest.mark.parametrize("family_name", ["llama_gqa", "opt", "phi3", "gemma2"])
def test_gram_matrices_of_output_gradients_against_their_definition(cache, family_name):
    run = make_run(family_name, cache, num_samples=3)
    statistics = [OutputGradGram(), TokenWeightedGram("in"), TokenWeightedGram("out")]
    dense = calibrate(run, statistics)
    expected = {(x.name, statistic): 0.0 for x in run.linears for statistic in statistics}
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def remember(name, args, output):
        inputs[name], outputs[name] = args[0].detach(), output

    handles = [
        run.model.get_submodule(x.name).register_forward_hook(
            lambda _, args, output, name=x.name: remember(name, args, output)
        )
        for x in run.linears
    ]
    run.model.get_input_embeddings().weight.requires_grad_(True)
    for sequence in run.samples.tokens.split(1):
        logits = run.model(input_ids=sequence).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], sequence[0, 1:])
        for name, gradient in zip(
            outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True
        ):
            g, x = (y.reshape(-1, y.shape[-1]) for y in (gradient, inputs[name]))
            weights = [torch.ones(len(g)), g.square().sum(1), x.square().sum(1)]
            for statistic, own, weight in zip(statistics, (g, x, g), weights, strict=True):
                expected[name, statistic] = expected[name, statistic] + own.T @ (
                    weight[:, None] * own
                )
    for handle in handles:
        handle.remove()
    for x in run.linears:
        for statistic, size in zip(statistics, (x.m, x.n, x.m), strict=True):
            found = dense(x)[statistic]
            assert found.shape == (size, size)
            assert (found - expected[x.name, statistic]).norm() <= 1e-4 * found.norm()


def test_output_gradients_make_no_gradient_of_a_weight(cache, monkeypatch):
    run = make_run("llama", cache)
    asked = []
    original = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda loss: (
            asked.extend(p.requires_grad for p in run.model.parameters()),
            original(loss),
        ),
    )
    calibrate(run, {OutputGradGram()})
    assert asked and not any(asked)
    assert not any(p.requires_grad or p.grad is not None for p in run.model.parameters())


@LOOPS
def test_no_gradient_and_no_trainable_parameter_is_left(cache, loop):
    run = make_run("llama", cache)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    loop(run, {Fisher("in"), Gram()})
    assert not any(p.requires_grad or p.grad is not None for p in run.model.parameters())
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in before.items())


def test_gradient_statistics_do_not_exist_for_compressed_inputs():
    with pytest.raises(UserError, match=r"calibration\.upstream=dense"):
        dense_needs(
            method(whitening=KroneckerWhitening(fit="nearest", damping=1e-2, solve="auto")),
            "compressed",
        )
    fisher = FisherWhitening(side="in", eps=1e-6, solve="auto")
    assert dense_needs(method(whitening=fisher), "dense") == {Fisher("in")}
    with pytest.raises(UserError, match=r"calibration\.upstream=dense"):
        dense_needs(method(whitening=fisher), "compressed")


def test_dense_needs_are_the_union_of_what_is_read_from_the_dense_model():
    whole = method(allocation=ADACR, compensation=ADACOMP)
    assert dense_needs(whole, "dense") == {Gram(), IOCosine()}
    assert dense_needs(whole, "compressed") == {IOCosine()}
    assert dense_needs(
        method(compensation=UpdateU(upstream="dense", num_samples=None)), "compressed"
    ) == {Gram()}
    with pytest.raises(UserError, match="num_samples=null"):
        dense_needs(method(compensation=UpdateU(upstream="dense", num_samples=2)), "dense")


# --- compressed upstream --------------------------------------------------------------------------


@pytest.fixture
def observed(monkeypatch):
    """Everything HiddenStream.observe returned, by decoder layer."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    original = HiddenStream.observe

    def remember(self, index, *args, **options):
        found[index] = original(self, index, *args, **options)
        return found[index]

    monkeypatch.setattr(HiddenStream, "observe", remember)
    return found


@pytest.mark.parametrize("family_name", ["llama", "opt", "mistral"])
def test_a_compression_that_keeps_everything_streams_the_calibrate(cache, observed, family_name):
    run = make_run(family_name, cache, upstream="compressed", length=40)
    calibrate(run, {Gram()})
    reports = run_method(run, method(), ranks=full_ranks(run))
    assert all(x.dense for x in reports)
    found = {
        f"{index}/{name}": value
        for index, values in observed.items()
        for name, value in values.items()
    }
    assert_close(found, all_values(run, {Gram()}), 1e-5)


def test_an_exact_low_rank_compression_streams_the_calibrate(cache, observed):
    """Weights of rank 6 are cut at rank 6: modules are replaced and still nothing changes for the
    decoder layers behind them.
    """
    run = make_run("llama_gqa", cache, upstream="compressed")
    with torch.no_grad():
        for x in run.linears:
            weight = run.model.get_submodule(x.name).weight
            U, s, Vt = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(U[:, :6] * s[:6] @ Vt[:6])
        before = run.model(input_ids=run.samples.tokens).logits
    calibrate(run, {Gram()})
    expected = all_values(run, {Gram()})
    reports = run_method(run, method(compensation=ADACOMP), ranks=ranks_of(run, 6))
    assert not any(x.dense for x in reports)
    assert all(isinstance(run.model.get_submodule(x.name), LowRankLinear) for x in run.linears)
    found = {
        f"{index}/{name}": value
        for index, values in observed.items()
        for name, value in values.items()
    }
    assert_close(found, expected, 1e-3)
    with torch.no_grad():
        assert (
            run.model(input_ids=run.samples.tokens).logits - before
        ).abs().max() < 1e-3 * before.abs().max()


def test_a_lossy_compression_streams_other_statistics_behind_the_first_decoder_layer(
    cache, observed
):
    run = make_run("llama", cache, upstream="compressed")
    calibrate(run, {Gram()})
    expected = all_values(run, {Gram()})
    run_method(run, method(), ranks=ranks_of(run, 4))
    relative = {
        (index, name): float((value - expected[f"{index}/{name}"]).norm() / value.norm())
        for index, values in observed.items()
        for name, value in values.items()
    }
    assert max(value for (index, _), value in relative.items() if index == 0) < 1e-5
    assert min(value for (index, _), value in relative.items() if index > 0) > 1e-3


def test_whitening_on_compressed_inputs_sees_what_the_compressed_model_feeds(cache, observed):
    """The Gram used for decoder layer 1 is that of the finished compressed model's own
    input to it.
    """
    run = make_run("llama", cache, upstream="compressed")
    run_method(run, method(), ranks=ranks_of(run, 5))
    seen = {}
    linear = next(x for x in run.linears if x.decoder_layer == 1)
    module = run.model.get_submodule(linear.name)
    module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    with torch.no_grad():
        run.model(input_ids=run.samples.tokens)
    gram = seen["x"].T @ seen["x"]
    assert (observed[1][f"site{linear.site}:gram"] - gram).norm() <= 1e-5 * gram.norm()


def test_whitening_on_compressed_inputs_gives_other_weights_than_on_dense_ones(tmp_path):
    weights = {}
    for upstream in ("dense", "compressed"):
        run = make_run("llama", Cache(tmp_path / upstream), upstream=upstream)
        run_method(run, method(), ranks=ranks_of(run, 5))
        weights[upstream] = [run.model.get_submodule(x.name).merged_weight() for x in run.linears]
    pairs = list(zip(run.linears, weights["dense"], weights["compressed"], strict=True))
    assert all(
        torch.allclose(a, b, atol=1e-5) for x, a, b in pairs if x.decoder_layer == 0 and x.site == 0
    )
    assert all((a - b).norm() > 1e-4 * a.norm() for x, a, b in pairs if x.decoder_layer > 0)


def test_a_repair_reads_only_the_samples_it_asks_for(cache, observed):
    """SVD-LLM's update of U on two samples equals the same update with a calibration set of those
    two.
    """
    run = make_run("llama", cache, num_samples=5)
    run_method(
        run,
        method(compensation=UpdateU(upstream="compressed", num_samples=2)),
        ranks=ranks_of(run, 4),
    )
    first = dict(observed)
    observed.clear()
    run = make_run("llama", cache, num_samples=5)
    run_method(
        run,
        method(compensation=UpdateU(upstream="compressed", num_samples=None)),
        ranks=ranks_of(run, 4),
    )
    token_share = {
        index: float(first[index]["site0:gram"].trace() / observed[index]["site0:gram"].trace())
        for index in range(len(run.layers))
    }
    assert all(share == pytest.approx(2 / 5, abs=0.05) for share in token_share.values())


@pytest.mark.parametrize(
    ("chosen", "upstream", "streams"),
    [
        (method(), "dense", 0),
        (method(whitening=NoWhitening(solve="auto")), "compressed", 0),
        (method(), "compressed", 2),
        (method(allocation=ADACR, compensation=ADACOMP), "dense", 2),
        (method(allocation=ADACR, compensation=ADACOMP), "compressed", 2),
        (method(compensation=AdaComp(**{**vars(ADACOMP), "upstream": "dense"})), "dense", 0),
    ],
)
def test_decoder_layers_run_once_for_dense_statistics_and_twice_along_the_stream(
    cache, chosen, upstream, streams
):
    run = make_run("llama", cache, upstream=upstream)
    counts = count_layers(run)
    batches = len(run.samples.batches())
    needs = dense_needs(chosen, upstream)
    run_method(run, chosen)
    dense_passes = 1 if needs else 0
    assert counts.total() <= (dense_passes + streams) * len(run.layers) * batches
    assert counts.total() >= (dense_passes + bool(streams)) * len(run.layers) * batches - batches
    assert max(counts.values(), default=0) - min(counts.values(), default=0) <= batches, (
        "no decoder layer is favoured: no quadratic cost"
    )


@pytest.mark.parametrize("stack_of_batch", ["mean", "off"])
def test_both_other_readings_of_stack_of_batch_run_on_the_stream(cache, stack_of_batch):
    run = make_run("llama", cache)
    repair = AdaComp(**{**vars(ADACOMP), "stack_of_batch": stack_of_batch})
    reports = run_method(run, method(compensation=repair), compression=0.6)
    gains = [x.compensation_gain for x in reports if not x.dense]
    assert gains
    # adaComp's U step alone is a least-squares optimum, so it cannot lose on what it was fitted to
    assert max(gains) <= 1 + 1e-3


# --- certificate ----------------------------------------------------------------------------------


class Damaged(Factors):
    """Stores other factors than it was given."""

    def __init__(self, damage):
        object.__setattr__(self, "damage", damage)

    def module(self, linear, rank, evidence):
        made = super().module(linear, rank, evidence)
        with torch.no_grad():
            self.damage(made.u_proj.weight, made.v_proj.weight)
        return made


DAMAGES = {
    "scaled": lambda U, Vt: U.mul_(1.5),
    "lost_component": lambda U, Vt: U[:, 0].zero_(),
    "first_input": lambda U, Vt: Vt[:, 0].add_(0.5),
    "last_input": lambda U, Vt: Vt[:, -1].add_(0.5),
    "one_output": lambda U, Vt: U[-1].add_(0.5),
}


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_the_certificate_measures_what_is_stored(cache, damage):
    """Whatever is wrong with the stored factors, loss_over_bound rises by as much as outputs on the
    calibration set go wrong.
    """
    run = make_run("llama_gqa", cache)
    dense = calibrate(run, {Gram()})
    grams = {x.name: dense(x)[Gram()].double() for x in run.linears}
    weights = {
        x.name: run.model.get_submodule(x.name).weight.detach().double().clone()
        for x in run.linears
    }
    reports = run_method(
        run,
        method(packing=Damaged(DAMAGES[damage]) if damage else Factors()),
        ranks=ranks_of(run, 5),
    )
    for report in reports:
        W = weights[report.name]
        S = torch.linalg.cholesky(
            grams[report.name] + 1e-9 * torch.eye(report.n, dtype=torch.float64)
        )
        stored = run.model.get_submodule(report.name).merged_weight().double()
        bound = float(torch.linalg.svdvals(W @ S)[5:].norm())
        assert report.loss_over_bound == pytest.approx(
            float(((stored - W) @ S).norm()) / bound, rel=1e-3
        )
        assert (
            report.loss_over_bound > 1.01
            if damage
            else report.loss_over_bound == pytest.approx(1, abs=1e-3)
        )


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_trials_of_grids_by_processes_are_those_of_one(tmp_path, two_threads):
    few = {"whole": [[3, 32], [4, 32]], "factors": [[4, 32]], "units": [[4, 32]]}
    grids = rows.slot("quantizer", "grids", **few)
    method = api.method_of("specomp", grids, Bits(bits=3.0))
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made = make_run("llama", Cache(tmp_path / str(threads)), method=method)
        run = replace(made, budget=Bits(bits=3.0))
        assert forks(run) == (threads == 2)
        report = compress(run, calibrate(run))
        stored = {x.name: weight_of(run.model.get_submodule(x.name)) for x in run.linears}
        told = [(x.name, x.rank, dict(x.facts)) for x in report.linears]
        found[threads] = (told, stored, run.cache.hits, run.cache.misses)
    (one, weights, *counts), (two, others, *theirs) = found[1], found[2]
    assert one == two and counts == theirs and counts[1]["units"] > 14
    assert all(torch.equal(weights[x], others[x]) for x in weights)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("end", ["raise", "die", "both"])
def test_what_a_process_could_not_do_is_done_here(cache, two_threads, end):
    run, here = make_run("llama", cache), os.getpid()
    units = run.units[:5]

    def work(unit):
        run.cache.count("units", hit=False)
        if unit == units[2] and (os.getpid() != here or end == "both"):
            if end == "die":
                os._exit(1)
            raise UserError(f"not {unit.name}")
        return unit.name, os.getpid() == here

    if end == "both":
        with pytest.raises(UserError, match="not"):
            list(foretold(run, work, units))
    else:
        assert list(foretold(run, work, units)) == [(x.name, True) for x in units]
        assert run.cache.misses == {"units": 5}
    assert not multiprocessing.active_children()


def test_the_longest_units_start_first_and_reports_keep_their_order(cache):
    units = make_run("llama", cache).units[:6]
    together, started = threading.Barrier(2), []

    def work(unit):
        started.append((unit.name, torch.get_num_threads()))
        together.wait(timeout=60)
        return unit.name

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread_each(units, torch.device("cpu")) as side_by_side:
            assert list(side_by_side(work, units)) == [x.name for x in units]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    sizes = {x.name: x.params for x in units}
    assert len(set(sizes.values())) > 1
    assert [sizes[name] for name, _ in started] == sorted(sizes.values(), reverse=True)
    assert {count for _, count in started} == {1}


# --- cache ----------------------------------------------------------------------------------------


def test_the_second_call_computes_nothing(cache):
    run = make_run("llama", cache)
    calibrate(run, {Gram(), Fisher("in")})
    counts = count_layers(run)
    again = calibrate(run, {Gram(), Fisher("in")})
    assert again(run.linears[0])[Gram()].shape == (32, 32)
    assert counts.total() == 0
    assert cache.hits == {"statistics/gram": 1, "statistics/fisher_in": 1}
    assert cache.misses == {"statistics/gram": 1, "statistics/fisher_in": 1}


def test_only_what_is_missing_is_computed(cache):
    run = make_run("llama", cache)
    calibrate(run, {Gram()})
    stamp = cache.path("statistics", statistic_key(run, Gram()), part_name(0)).stat().st_mtime_ns
    calibrate(run, {Gram(), AbsMean()})
    assert (
        cache.path("statistics", statistic_key(run, Gram()), part_name(0)).stat().st_mtime_ns
        == stamp
    )
    assert cache.misses == {"statistics/gram": 1, "statistics/abs_mean": 1}


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_entry_is_logged_and_made_again(cache, caplog, damage):
    run = make_run("llama", cache)
    calibrate(run, {Gram()})
    expected = all_values(run, {Gram()})
    path = cache.path("statistics", statistic_key(run, Gram()), part_name(1))
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    else:
        path.unlink()
    counts = count_layers(run)
    dense = calibrate(run, {Gram()})
    found = {
        f"{i}/{name}": value.clone() for i in range(3) for name, value in dense.layer(i).items()
    }
    assert_close(found, expected, 0.0)
    assert counts.total() > 0
    assert cache.load("statistics", statistic_key(run, Gram()), part_name(1)) is not None
    if damage != "delete":
        assert f"{path} is damaged" in caplog.text


def test_methods_that_need_the_same_statistic_share_it(tmp_path):
    first = make_run("llama", Cache(tmp_path))
    run_method(first, method())
    second = make_run("llama", Cache(tmp_path))
    counts = count_layers(second)
    run_method(
        second,
        method(name="other", allocation=UniformAllocation(exact_budget=True)),
        compression=0.7,
    )
    assert counts.total() == 0
    assert second.cache.hits["statistics/gram"] == 1
    assert second.cache.hits["spectra"] == len(second.linears), "spectra know no ratio"
    assert "spectra" not in second.cache.misses


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"num_samples": 4}, False),
        ({"length": 23}, False),
        ({"seed": 1}, False),
        ({"precision": "bfloat16"}, False),
        ({"accumulate": "float64"}, False),
        ({"family_name": "llama_gqa"}, False),
        ({"batch_size": 3}, True),
        ({"layers_at_once": 1}, True),
        ({"upstream": "compressed"}, True),
    ],
)
def test_what_a_cached_statistic_depends_on(tmp_path, change, shared):
    calibrate(make_run("llama", Cache(tmp_path)), {Gram()})
    other = make_run(**{"family_name": "llama", "cache": Cache(tmp_path)} | change)
    calibrate(other, {Gram()})
    assert other.cache.hits == ({"statistics/gram": 1} if shared else {})


def test_other_tokens_of_the_same_shape_are_another_calibration_set(cache):
    keys = set()
    for seed in (0, 1):
        run = make_run("llama", cache)
        tokens = random_tokens(5, 24, seed=seed)
        samples = CalibrationSet(
            tokens, description={"tokenizer": {"sha256": "tiny"}}, batch_size=2
        )
        keys.add(statistic_key(replace(run, samples=samples), Gram()))
    assert len(keys) == 2


def test_warm_and_cold_caches_give_the_same_bits(tmp_path):
    """A spectrum from the cache and a fresh one truncate to the same factors: nothing depends on
    what ran before.
    """
    states = []
    for _ in range(2):
        run = make_run("opt", Cache(tmp_path))
        run_method(run, method(compensation=ADACOMP), compression=0.5)
        states.append(run.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- calibration only -----------------------------------------------------------------------------


def test_the_module_has_no_optimizer_and_no_parameters_of_its_own(cache):
    run = make_run("llama", cache, method=method(compensation=ADACOMP))
    module = CalibrationOnlyModule(run)
    with pytest.warns(UserWarning, match="`configure_optimizers` must be implemented"):
        assert module.configure_optimizers() is None
    assert not {"training_step", "configure_optimizers"} & set(vars(type(module)))
    assert list(module.parameters()) == [] and list(module.children()) == []


def test_the_module_does_what_the_plain_loops_do(tmp_path):
    """Also where a warm cache leaves no batch to predict on."""
    chosen = method(allocation=ADACR, compensation=ADACOMP)
    plain = make_run("llama", Cache(tmp_path / "plain"))
    expected = run_method(plain, chosen)
    for _ in ("cold", "warm"):
        run = make_run("llama", Cache(tmp_path / "module"), method=chosen)
        module = CalibrationOnlyModule(run)
        module.calibrate()
        found = module.finish().linears
        assert [replace(x, seconds=0.0) for x in found] == [
            replace(x, seconds=0.0) for x in expected
        ]
        state, other = run.model.state_dict(), plain.model.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[x], other[x]) for x in other)


@pytest.mark.parametrize(
    "chosen",
    [method(whitening=NoWhitening(solve="auto")), method(allocation=ADACR, compensation=ADACOMP)],
)
def test_nothing_is_trainable_afterwards_whatever_the_cache_held(tmp_path, chosen):
    for _ in ("cold", "warm"):
        run = make_run("llama", Cache(tmp_path))
        run_method(run, chosen)
        assert not any(p.requires_grad or p.grad is not None for p in run.model.parameters())
        assert not run.model.training


def test_no_hook_stays_behind(cache):
    run = make_run("llama", cache)
    run_method(run, method(allocation=ADACR, compensation=ADACOMP))
    for module in run.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_observer_removes_its_hooks_after_an_error(cache):
    run = make_run("llama", cache)
    layer = run.layers[0]
    with (
        pytest.raises(RuntimeError, match="stop"),
        LayerObserver(layer, run.family, {Gram(), Fisher("in")}, run.precision, 5),
    ):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in layer.modules())
    assert not any(p.requires_grad for name, p in layer.named_parameters() if "proj" in name)


def test_the_lightning_loop_removes_its_hooks_after_an_error(cache, monkeypatch):
    run = make_run("llama", cache)
    monkeypatch.setattr(type(run.samples), "batches", lambda _: [torch.full((1, 4), 10**6)])
    with pytest.raises(IndexError):
        by_lightning(run, {Gram(), Fisher("in"), OutputGradGram()})
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in run.model.modules()
    )
    assert not any(p.requires_grad for p in run.model.parameters())


def test_the_probe_puts_the_linear_back(cache):
    run = make_run("llama", cache)
    spectra = spectra_of(run, method())
    probe = Probe(run, spectra.statistics, DenseEvidence(run, spectra)).probe
    unit = run.units[3]
    module = run.model.get_submodule(unit.name)
    whole, cut = probe(None, None), probe(unit, Choice(Factors(), 1))
    assert run.model.get_submodule(unit.name) is module
    assert probe(None, None) == whole
    assert cut != whole
    with torch.no_grad():
        expected = [
            float(run.model(input_ids=x, labels=x).loss) for x in run.samples.tokens.split(1)
        ]
    assert whole == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@LOOPS
def test_progress_is_logged_with_what_is_computed(cache, caplog, loop):
    run = make_run("llama", cache)
    with caplog.at_level(logging.INFO, logger="specomp"):
        loop(run, {Gram()})
    assert "calibrate gram, decoder layers 0-2: 5 samples of 24 tokens" in caplog.text


def test_no_gpu_is_said_to_be_unused(cache, monkeypatch):
    """The loop that feeds a calibration is on the CPU; the model it feeds is where it is."""
    monkeypatch.setattr(
        "lightning.pytorch.accelerators.cuda.CUDAAccelerator.is_available",
        staticmethod(lambda: True),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        by_lightning(make_run("llama", cache), {Gram()})
    assert not [x for x in said if "GPU" in str(x.message)]


def test_jobs_that_meet_at_a_linear_share_out_the_rest(tmp_path):
    """Where another process decomposes a linear, this one goes on from the other end until that is
    done.
    """
    run = make_run("llama", Cache(tmp_path))
    spectra = spectra_of(run, method())
    first, last = run.linears[0], run.linears[-1]
    lock = run.cache.root / "locks" / f"spectra-{digest([spectra.key, first.name])[:24]}.lock"
    with other_process_locks(lock) as release, ThreadPoolExecutor(1) as pool:
        found = pool.submit(spectra, first)
        wait_for(
            lambda: all(run.cache.has("spectra", spectra.key, x.name) for x in run.linears[1:])
        )
        assert not found.done() and not run.cache.has("spectra", spectra.key, first.name)
        release()
        spectrum = found.result(timeout=60)
    assert run.cache.misses["spectra"] == len(run.linears)
    again = spectra_of(make_run("llama", Cache(tmp_path / "alone")), method())
    for linear, own in ((first, spectrum), (last, spectra(last))):
        assert torch.equal(own.s, again(linear).s) and torch.equal(own.U, again(linear).U)


@contextmanager
def other_process_locks(path: Path):
    """A process that holds a lock until it is told to release it."""
    script = (
        f"from filelock import FileLock\nwith FileLock({str(path)!r}):\n    print('held',"
        " flush=True)\n    input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().strip() == "held"

        def release() -> None:
            process.stdin.write("\n")
            process.stdin.close()
            process.wait(30)

        yield release
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)
