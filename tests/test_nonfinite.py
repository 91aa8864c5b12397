"""Numbers that are none, gradients that vanish, precisions that do not fit: said in one line, never
stored as a model.
"""

import pytest
import torch
from running import compose_config, make_run
from test_stages import method, ranks_of, run_method

from specomp.cache import Cache
from specomp.errors import UserError
from specomp.experiment import pipeline
from specomp.forms.pivoted import Pivoted, pivot_rows
from specomp.methods.fwsvd import FisherWhitening
from specomp.methods.svd import NoWhitening
from specomp.methods.svd_llm import GramWhitening
from specomp.numerics.statistics import Fisher


@pytest.mark.parametrize(
    ("whitening", "said"),
    [
        (NoWhitening(solve="auto"), "factors are not finite"),
        (GramWhitening(solve="auto"), "gram is not finite"),
    ],
    ids=["svd", "svd_llm"],
)
def test_a_weight_that_is_no_number_is_found_where_it_shows_first(tmp_path, whitening, said):
    run = make_run("llama", Cache(tmp_path))
    linear = next(x for x in run.linears if x.decoder_layer == 0 and x.name.endswith("v_proj"))
    run.model.get_submodule(linear.name).weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=said):
        run_method(run, method(whitening=whitening), ranks=ranks_of(run, 4))


def test_pivots_of_what_is_no_number_end():
    U = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U[3, 2] = torch.nan
    assert bool(pivot_rows(U, 1.05)[2].isnan().any())


def test_outputs_that_no_loss_depends_on_count_alike():
    norm = FisherWhitening(side="out", eps=1e-6, solve="auto")({Fisher("out"): torch.zeros(6)})
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    spectrum = norm.decompose(W)
    torch.testing.assert_close(spectrum.U @ spectrum.rows, W)
    assert norm.loss(W) == pytest.approx(float(W.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["method=soco", "method/whitening=gram", "calibration.upstream=compressed"],
            "calibration.upstream=dense",
        ),
        (["method=svd_llm", "method/training=lora", "model.dtype=float16"], "model.dtype=bfloat16"),
        (["method=soco", "model.dtype=float16"], "method.training.precision=float32"),
    ],
)
def test_trainings_that_cannot_be_are_refused_before_they_begin(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        pipeline.run(compose_config(tmp_path, *overrides))
    assert not (tmp_path / "cache" / "teacher").exists()


def test_packing_is_told_of_the_linear(tmp_path):
    run = make_run("llama", Cache(tmp_path))
    linear = next(x for x in run.linears if x.decoder_layer == 1)
    run.model.get_submodule(linear.name).weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match=linear.name):
        run_method(
            run,
            method(whitening=NoWhitening(solve="auto"), packing=Pivoted(max_growth=2.0)),
            ranks=ranks_of(run, 4),
        )
