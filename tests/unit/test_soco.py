"""The losses of SoCo's phases from hand-made terms, the settings of a training, and the linear
whose components are gated.
"""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError
from running import CONF
from torch import Tensor, nn

from specomp.methods.soco import (
    AlternatingOptimization,
    CoarseCompression,
    Recovery,
    Sparsification,
    excess,
    polarization,
)
from specomp.methods.spectrum import SpectrumTraining
from specomp.numerics.factors import GramNorm
from specomp.numerics.gates import MAPPINGS
from specomp.training.gated import GatedLinear
from specomp.training.phases import LossTerms

PLAIN = {"steps": 10, "until": None, "prune_margin": None}
PERFORMANCE, TARGET, INITIAL = 0.7, 0.6, 1.5
COARSE = CoarseCompression(price=10.0, **PLAIN)
ALTERNATE = AlternatingOptimization(price=10.0, **PLAIN)
SPARSIFY = Sparsification(price=10.0, polarization=2.0, margin=0.1, fade=0.5, **PLAIN)


def terms(*, soft: float = 0.5, hard: float = 0.5, gates: Tensor | None = None) -> LossTerms:
    return LossTerms(
        performance=torch.tensor(PERFORMANCE, requires_grad=True),
        soft_retention=torch.tensor(soft, requires_grad=True),
        hard_retention=hard,
        gates=torch.tensor([0.1, 1.0]) if gates is None else gates,
        threshold=0.5,
        target=TARGET,
        initial=INITIAL,
    )


# --- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "wanted"), [(0.0, 1.5), (0.5, 1.05), (0.9, 0.69), (1.0, 0.6)])
def test_the_coarse_budget_tightens_linearly(progress, wanted):
    for soft in (wanted - 0.2, wanted + 0.2):
        loss = COARSE.loss(terms(soft=soft, hard=0.9), progress).item()
        assert loss == pytest.approx(PERFORMANCE + 10 * max(0.0, soft - wanted) / 0.4, rel=1e-4)


def test_under_the_budget_the_hinge_neither_costs_nor_pulls():
    given = terms(soft=0.5, hard=0.9)
    COARSE.loss(given, 1.0).backward()
    assert float(given.soft_retention.grad) == 0
    assert float(given.performance.grad) == 1
    over = terms(soft=0.7, hard=0.9)
    COARSE.loss(over, 1.0).backward()
    assert float(over.soft_retention.grad) == pytest.approx(10 / 0.4)
    assert COARSE.loss(terms(soft=0.7, hard=TARGET), 1.0).item() == pytest.approx(PERFORMANCE), (
        "pruning now would meet the budget"
    )


@pytest.mark.parametrize(
    ("hard", "soft", "priced"),
    [
        (0.61, 0.9, True),
        (0.6, 0.9, False),
        (0.59, 0.9, False),
        (0.61, 0.5, True),
        (0.59, 0.5, False),
    ],
)
def test_alternation_compresses_only_while_pruning_now_would_miss_the_budget(hard, soft, priced):
    """The hard count decides, whatever the soft one says; and a compressing step pulls below the
    budget too, or it would never cross it.
    """
    given = terms(hard=hard, soft=soft)
    loss = ALTERNATE.loss(given, 0.3)
    assert loss.item() == pytest.approx(PERFORMANCE + priced * 10 * (soft - TARGET) / 0.4)
    loss.backward()
    assert (given.soft_retention.grad is not None) == priced
    if priced:
        assert float(given.soft_retention.grad) == pytest.approx(25.0)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_polarization_is_ramped(progress):
    gates = torch.tensor([0.1, 0.45, 0.55, 1.2])
    expected = (0.1 + 0.45 + (0.6 - 0.55) + 0.0) / 4
    loss = SPARSIFY.loss(terms(soft=0.5, gates=gates), progress).item()
    assert loss == pytest.approx(PERFORMANCE + 2.0 * progress * expected, rel=1e-5)


def test_sparsification_still_holds_the_budget():
    given = terms(soft=0.8)
    SPARSIFY.loss(given, 0.0).backward()
    assert float(given.soft_retention.grad) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("progress", "cut"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0), (0.999, 1.0)]
)
def test_losers_fade_out_and_then_are_out(progress, cut):
    assert SPARSIFY.cut(progress) == pytest.approx(cut)


def test_without_fading_nothing_is_cut():
    sparsify = Sparsification(price=1.0, polarization=1.0, margin=0.1, fade=0.0, **PLAIN)
    assert [sparsify.cut(x) for x in (0.0, 0.5, 0.99)] == [0.0] * 3


def test_the_first_stages_cut_nothing():
    assert [phase.cut(x) for phase in (COARSE, ALTERNATE) for x in (0.0, 0.5, 0.99)] == [0.0] * 6


@pytest.mark.parametrize("cut_losers", [True, False])
def test_recovery_is_the_performance_alone(cut_losers):
    recovery = Recovery(cut_losers=cut_losers, **PLAIN)
    given = terms(soft=2.0, hard=2.0)
    assert recovery.loss(given, 0.5) is given.performance
    assert recovery.cut(0.0) == recovery.cut(0.9) == float(cut_losers)


def test_excess_is_a_share_of_what_the_target_removes():
    assert excess(terms(soft=1.0), TARGET).item() == pytest.approx(1.0)
    assert excess(terms(soft=0.6), TARGET).item() == pytest.approx(0.0, abs=1e-6)


def test_signs_of_the_polarization_gradient():
    """Descending: losers fall, winners inside the band rise, winners beyond it rest."""
    gates = torch.tensor([0.01, 0.49, 0.5, 0.51, 0.59, 0.61, 1.5], requires_grad=True)
    polarization(gates, 0.5, 0.1).backward()
    assert (gates.grad * len(gates)).tolist() == pytest.approx(
        [1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 0.0]
    )


def test_polarization_is_zero_once_the_band_is_empty():
    assert float(polarization(torch.tensor([0.0, 0.0, 0.6001, 1.7]), 0.5, 0.1)) == 0


# --- settings -------------------------------------------------------------------------------------


def training(**changes) -> SpectrumTraining:
    """conf/method/training/soco.yaml, with changes."""
    return instantiate(
        OmegaConf.merge(OmegaConf.load(CONF / "method" / "training" / "soco.yaml"), changes)
    )


def test_the_default_is_the_papers_three_stages():
    settings = training()
    assert list(settings.schedule) == ["coarse", "alternate", "sparsify"]
    assert [type(x) for x in settings.schedule.values()] == [
        CoarseCompression,
        AlternatingOptimization,
        Sparsification,
    ]
    assert settings.gate is MAPPINGS["two_sigmoid"]


@pytest.mark.parametrize(
    "phases", [["coarse"], ["coarse", "alternate"], ["polish"], ["sparsify", "coarse"]]
)
def test_phases_are_chosen_by_name_and_in_order(phases):
    assert list(training(phases=phases).schedule) == phases


def test_a_phase_used_twice_is_numbered():
    schedule = training(phases=["coarse", "alternate", "coarse", "coarse"]).schedule
    assert len(schedule) == 4
    assert [type(x).__name__ for x in schedule.values()] == [
        "CoarseCompression",
        "AlternatingOptimization",
    ] + ["CoarseCompression"] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"phases": ["coarse", "corase"]},
            (
                r"phases \['corase'\] are none of the stages \['alternate', 'coarse', 'polish',"
                r" 'sparsify'\]"
            ),
        ),
        ({"phases": []}, "phases"),
        (
            {"batch_size": 3, "micro_batch_size": 2},
            "batch_size 3 is not a multiple of micro_batch_size 2",
        ),
        ({"batch_size": 1, "micro_batch_size": 2}, "batch_size 1 is not a multiple"),
        ({"mapping": "softplus"}, "mapping"),
        ({"threshold": 0.0}, "threshold"),
        ({"temperature_end": 0.0}, "temperature_end"),
        ({"label_weight": -0.1}, "label_weight"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate_final": 1.5}, "learning_rate_final"),
        ({"warmup": 1.0}, "warmup"),
        ({"betas": [0.9, 1.5]}, "betas"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"precision": "float16"}, "precision"),
        ({"held_out": 0}, "held_out"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"divergence": 0}, "divergence"),
        ({"pruning": {"order": "random"}}, "order"),
        ({"pruning": {"ranks": "fixed"}}, "ranks"),
        ({"stages": {"coarse": {"price": -1.0}}}, "price"),
        ({"stages": {"coarse": {"steps": 0}}}, "steps"),
        ({"stages": {"sparsify": {"fade": 1.5}}}, "fade"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(Exception, match=said) as caught:
        training(**changes)
    cause = caught.value if isinstance(caught.value, ValidationError) else caught.value.__cause__
    assert isinstance(cause, ValidationError)


def test_gradient_clipping_can_be_off():
    assert training(gradient_clip=None).gradient_clip is None


# --- the gated linear -----------------------------------------------------------------------------

SHAPES = [(6, 10), (10, 6), (8, 8)]


def gated_of(
    m: int,
    n: int,
    *,
    bias: bool = True,
    deviation: bool = True,
    mapping: str = "two_sigmoid",
    whitened: bool = False,
) -> tuple[nn.Linear, GatedLinear, Tensor]:
    """A linear, its gated components, and inputs (batch, tokens, n)."""
    generator = torch.Generator().manual_seed(m * 100 + n)
    dense = nn.Linear(n, m, bias=bias)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 7, n, generator=generator)
    flat = x.flatten(0, 1).double()
    norm = GramNorm(flat.T @ flat if whitened else None, solve="float64")
    spectrum = norm.decompose(dense.weight.detach())
    chosen = MAPPINGS[mapping]
    U = spectrum.U.contiguous()  # as it comes from the cache
    gated = GatedLinear(
        U,
        spectrum.rows.contiguous(),
        dense.bias,
        to_gate=chosen.to_gate,
        start=chosen.start,
        deviation=deviation,
    )
    return dense, gated, x


@pytest.mark.parametrize("deviation", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_at_the_start_it_is_the_dense_linear(m, n, whitened, bias, deviation):
    dense, gated, x = gated_of(m, n, bias=bias, deviation=deviation, whitened=whitened)
    assert (gated(x) - dense(x)).abs().max() <= 1e-5 * dense(x).abs().max()


def test_only_scores_and_deviation_train():
    _, gated, x = gated_of(6, 10)
    gated(x).sum().backward()
    assert {name for name, p in gated.named_parameters() if p.requires_grad} == {
        "scores",
        "deviation",
    }
    assert {name for name, p in gated.named_parameters() if p.grad is not None} == {
        "scores",
        "deviation",
    }
    assert len(gated.scores) == 6
    assert len(gated.deviation) == 6
    _, gated, _ = gated_of(10, 6, deviation=False)
    assert {name for name, p in gated.named_parameters() if p.requires_grad} == {"scores"}
    assert len(gated.scores) == 6


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradient_of_the_gates_is_the_published_one(m, n):
    """methods.md F9: dL/dS_i = sigma_i u_i^T (dL/dW') v_i = sigma_i sum_t (v_i^T x_t)(u_i^T g_t),
    with the singular vectors of torch.
    """
    dense, gated, x = gated_of(m, n, mapping="identity")
    with torch.no_grad():
        gated.scores.uniform_(0.4, 1.6, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 7, m, generator=torch.Generator().manual_seed(2))

    def loss(y: Tensor) -> Tensor:
        return (weights * y.sin()).sum()

    loss(gated(x)).backward()
    U, sigma, Vt = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    W = ((U * (sigma * gated.scores.detach())) @ Vt).requires_grad_()
    y = nn.functional.linear(x, W, dense.bias.detach())
    y.retain_grad()
    loss(y).backward()
    by_weight = sigma * (U * (W.grad @ Vt.T)).sum(0)
    tokens, upstream = x.flatten(0, 1), y.grad.flatten(0, 1)
    by_tokens = sigma * ((tokens @ Vt.T) * (upstream @ U)).sum(0)
    for expected in (by_weight, by_tokens):
        assert (gated.scores.grad - expected).norm() <= 1e-4 * expected.norm()
    assert torch.allclose(gated.deviation.grad, upstream.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_gradient_of_the_scores_is_the_gates_times_the_slope(mapping):
    _, plain, x = gated_of(6, 10, mapping="identity")
    _, gated, _ = gated_of(6, 10, mapping=mapping)
    start = torch.full((6,), MAPPINGS[mapping].start, requires_grad=True)
    gates = MAPPINGS[mapping].to_gate(start)
    (slope,) = torch.autograd.grad(gates.sum(), start)
    with torch.no_grad():
        plain.scores.copy_(gates)
    for module in (plain, gated):
        module(x).square().sum().backward()
    assert torch.allclose(gated.scores.grad, slope * plain.scores.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whitened", [True, False])
def test_gates_scale_the_components(whitened):
    dense, gated, x = gated_of(6, 10, mapping="identity", whitened=whitened)
    gates = torch.linspace(0, 2, 6)
    with torch.no_grad():
        gated.scores.copy_(gates)
        gated.deviation.copy_(torch.arange(6.0))
    expected = nn.functional.linear(
        x, (gated.U * gates) @ gated.rows, dense.bias + torch.arange(6.0)
    )
    assert torch.allclose(gated(x), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_multiplies_the_gates():
    _, gated, x = gated_of(6, 10)
    mask = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, 0.0])
    gated.mask = mask
    expected = nn.functional.linear(x, (gated.U * mask) @ gated.rows, gated.bias)
    assert torch.allclose(gated(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(gated.gates(), torch.ones(6)), "the gates themselves are without it"
    gated(x).square().sum().backward()
    assert (gated.scores.grad[[3, 5]] == 0).all(), (
        "what is faded out entirely gets no gradient from the output"
    )
    assert (gated.scores.grad[[0, 1, 2, 4]] != 0).all()


def test_pruning_drops_components_physically():
    _, gated, x = gated_of(6, 10)
    with torch.no_grad():
        gated.scores.copy_(torch.linspace(-1, 1, 6))
    keep = torch.tensor([True, False, True, True, False, True])
    gated.mask = keep.float()
    masked = gated(x)
    gates = gated.gates()
    gated.prune(keep)
    assert torch.allclose(gated(x), masked, rtol=1e-5, atol=1e-5)
    assert torch.equal(gated.gates(), gates[keep])
    assert gated.U.shape == (6, 4)
    assert gated.rows.shape == (4, 10)
    assert gated.mask is None
    assert len(gated.scores) == 6, "the optimizer's state still fits"
    gated(x).square().sum().backward()
    assert (gated.scores.grad != 0).tolist() == keep.tolist()


def test_pruning_nothing_changes_no_bit():
    dense, gated, x = gated_of(8, 8)
    before = gated(x)
    gated.prune(torch.ones(8, dtype=torch.bool))
    assert torch.equal(gated(x), before)


def test_pruning_twice():
    _, gated, x = gated_of(6, 10)
    with torch.no_grad():
        gated.scores.copy_(torch.linspace(-1, 1, 6))
    gates, U, rows = gated.gates(), gated.U.clone(), gated.rows.clone()
    gated.prune(torch.tensor([True, False, True, True, False, True]))
    gated.prune(torch.tensor([False, True, True, True]))
    assert gated.alive.tolist() == [False, False, True, True, False, True]
    left = [2, 3, 5]
    expected = nn.functional.linear(x, (U[:, left] * gates[left]) @ rows[left], gated.bias)
    assert torch.allclose(gated(x), expected, rtol=1e-4, atol=1e-5)


def test_bases_in_bfloat16_keep_scores_in_float32():
    dense, _, x = gated_of(6, 10)
    _, full, _ = gated_of(6, 10)
    gated = GatedLinear(
        full.U.bfloat16(),
        full.rows.bfloat16(),
        dense.bias,
        to_gate=torch.exp,
        start=0.0,
        deviation=True,
    )
    y = gated(x)
    assert y.dtype == torch.bfloat16
    assert gated.scores.dtype == gated.deviation.dtype == torch.float32
    assert (y.float() - dense(x)).norm() <= 2e-2 * dense(x).norm()
