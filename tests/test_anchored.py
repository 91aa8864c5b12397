"""The anchored target: reduced-rank regression of dense outputs on compressed inputs, and the two
streams that it reads.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import examples, make, product, symmetric_root
from running import compose_run, make_run
from test_stages import assert_close, dense_needs, method, ranks_of, run_method

from specomp.cache import Cache
from specomp.compression.stream import HiddenStream
from specomp.errors import UserError
from specomp.methods.anchored import DenseOutput
from specomp.methods.kronecker import KroneckerWhitening
from specomp.numerics.factors import GramNorm, truncate
from specomp.numerics.statistics import CrossGram, Gram, OutputGradGram, Stats

KRONECKER = KroneckerWhitening(fit="independent", damping=1e-2, solve="float64")
TINY_DAMPING = 1e-12


def anchored(mix: float = 1.0, damping: float = TINY_DAMPING) -> DenseOutput:
    return DenseOutput(mix=mix, damping=damping)


def drift(seed: int, m: int = 9, n: int = 12, rank: int = 4):
    """W (m, n), dense inputs X (n, tokens) and compressed inputs X' of the same tokens."""
    problem = make(m, n, rank, seed, 60)
    return problem.W, problem.X, problem.X + 0.5 * make(m, n, rank, seed + 1000, 60).X


def stats(X: torch.Tensor, Y: torch.Tensor) -> Stats:
    return Stats({Gram(): Y @ Y.T, CrossGram(): X @ Y.T})


@examples
@given(st.integers(0, 400), st.integers(1, 8))
def test_truncating_it_is_reduced_rank_regression(seed, rank):
    """methods.md F6: the best rank-r W' for ||W' X' - W X||_F, with its loss in closed form; no
    other objective does better on it.
    """
    W, X, Y = drift(seed)
    G, R = Y @ Y.T, symmetric_root(Y @ Y.T)
    M = W @ (X @ Y.T) @ torch.linalg.inv(R).T
    s = torch.linalg.svdvals(M)
    bound = (W @ X).square().sum() - M.square().sum() + s[rank:].square().sum()
    best = product(
        truncate(GramNorm(G, solve="float64").decompose(anchored()(W, stats(X, Y))), rank)
    )
    loss = (best @ Y - W @ X).square().sum()
    assert float(loss) == pytest.approx(float(bound), rel=1e-4)
    for gram in (X @ X.T, G):  # input-aware, shift-aware
        other = product(truncate(GramNorm(gram, solve="float64").decompose(W), rank))
        assert float(loss) <= float((other @ Y - W @ X).square().sum()) * (1 + 1e-6)


def test_without_drift_and_without_mix_it_is_the_weight():
    W, X, Y = drift(0)
    assert torch.allclose(anchored()(W, stats(X, X)), W, atol=1e-8)
    assert torch.equal(anchored(mix=0)(W, stats(X, Y)), W)
    half, whole = anchored(mix=0.5)(W, stats(X, Y)), anchored()(W, stats(X, Y))
    assert torch.allclose(half, (W + whole) / 2)
    aimed = W @ (0.5 * X + 0.5 * Y)  # the outputs between both
    assert torch.allclose(half @ Y @ Y.T, aimed @ Y.T, rtol=1e-6)


def test_directions_without_data_keep_their_weight():
    W, X, Y = drift(1)
    Y[3:] = 0  # a singular G'
    T = anchored(damping=1e-2)(W, stats(X, Y))
    assert torch.allclose(T[:, 3:], W[:, 3:]) and not torch.allclose(T[:, :3], W[:, :3], rtol=1e-2)
    assert torch.isfinite(anchored(damping=1e6)(W, stats(X, Y))).all()
    assert torch.allclose(anchored(damping=1e6)(W, stats(X, Y)), W, atol=1e-4)


@pytest.mark.parametrize("family_name", ["llama", "opt"])
def test_both_streams_see_what_both_models_feed(tmp_path, monkeypatch, family_name):
    """Cross-Grams against whole forward passes of the dense and of the finished compressed
    model.
    """
    found = {}
    original = HiddenStream.observe_beside
    monkeypatch.setattr(
        HiddenStream,
        "observe_beside",
        lambda self, index, *x: found.setdefault(index, original(self, index, *x)),
    )
    inputs: dict[str, dict[str, torch.Tensor]] = {"dense": {}, "compressed": {}}

    def listen(run, where):
        for linear in run.linears:
            module = run.model.get_submodule(linear.name)

            def flat(_, args, name=linear.name):
                inputs[where][name] = args[0].flatten(0, -2)

            module.register_forward_pre_hook(flat)
        with torch.no_grad():
            run.model(input_ids=run.samples.tokens)

    listen(make_run(family_name, Cache(tmp_path / "a")), "dense")
    run = make_run(family_name, Cache(tmp_path / "b"), upstream="compressed")
    run_method(run, method(target=anchored(damping=1e-3)), ranks=ranks_of(run, 5))
    listen(run, "compressed")
    for linear in run.linears:
        x, y = inputs["dense"][linear.name], inputs["compressed"][linear.name]
        place = f"site{linear.site}"
        if linear.decoder_layer == 0 and linear.site == 0:  # nothing before it is compressed
            assert_close(
                {"": found[0][f"{place}:cross_gram"]}, {"": found[0][f"{place}:gram"]}, 1e-6
            )
        if (
            linear.site == 0
        ):  # what a decoder layer's first site sees has no part of that layer in it
            cross, gram = x.T @ y, y.T @ y
            assert_close(
                {"": found[linear.decoder_layer][f"{place}:cross_gram"]}, {"": cross}, 1e-4
            )
            assert_close({"": found[linear.decoder_layer][f"{place}:gram"]}, {"": gram}, 1e-4)


def test_it_brings_the_compressed_model_closer_to_the_dense_one(tmp_path):
    """Hidden states at the end, on the calibration set itself."""
    errors = {}
    for name, target in (
        ("weight", method().target),
        ("anchored", anchored(mix=1.0, damping=1e-3)),
    ):
        run = make_run(
            "llama", Cache(tmp_path / name), num_samples=24, length=32, upstream="compressed"
        )
        with torch.no_grad():
            dense = run.family.decoder(run.model)(input_ids=run.samples.tokens).last_hidden_state
            run_method(run, method(target=target), ranks=ranks_of(run, 6))
            own = run.family.decoder(run.model)(input_ids=run.samples.tokens).last_hidden_state
        errors[name] = float((own - dense).norm() / dense.norm())
    assert errors["anchored"] < 0.98 * errors["weight"]


def test_gradients_are_the_dense_models_and_the_rest_is_streamed(tmp_path):
    chosen = method(target=anchored(), whitening=KRONECKER)
    assert dense_needs(chosen, "compressed") == {OutputGradGram()}
    run = make_run("llama", Cache(tmp_path), upstream="compressed")
    reports = run_method(run, chosen, ranks=ranks_of(run, 5))
    assert all(x.loss_over_bound == pytest.approx(1, abs=1e-3) for x in reports)


def test_dense_inputs_alone_have_nothing_to_compare():
    with pytest.raises(UserError, match=r"calibration\.upstream=compressed"):
        dense_needs(method(target=anchored()), "dense")


def test_from_the_command_line(tmp_path):
    typed = [
        "method=specomp",
        "method/target=dense_output",
        "calibration.upstream=compressed",
        "ratio=cr40",
    ]
    record = compose_run(tmp_path, *typed)
    assert record.status == "ok"
    assert record.counted.measured_retention == pytest.approx(0.6, abs=0.02)
    assert record.identity["method"]["target"] == {
        "class": "DenseOutput",
        "mix": 0.5,
        "damping": 0.01,
    }
    assert compose_run(tmp_path, *typed, "method.target.mix=0").metrics != record.metrics
