"""What a GPU computes is what a CPU does, to rounding. `make test-gpu`; SPECOMP_GPU=cpu runs the
same on a CPU, where it says nothing.
"""

import os

import pytest
import torch
from running import compose_run, random_tokens
from tiny import FAMILY_NAMES, tiny_model

import specomp

DEVICE = os.environ.get("SPECOMP_GPU", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device on this machine"
    ),
]
ROWS = ("svd", "svd_llm", "adasvd", "specomp", "specomp_low_rank")
IDS = random_tokens(2, 24, seed=7)


def logits(model):
    model.eval()
    ids = IDS % model.config.get_text_config().vocab_size
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("row", ROWS)
def test_a_compression_is_the_same(family, row):
    """Ranks and sizes; logits, as far as float32 sums in another order allow."""
    found = {}
    for device in ("cpu", DEVICE):
        model = tiny_model(family).to(device)
        report = specomp.compress(model, random_tokens(6, 24), row, 0.4)
        ranks = [x.rank for x in report.linears]
        found[device] = ranks, report.ledger.measured_retention, logits(model)
    (ranks, kept, wanted), (own, own_kept, got) = found["cpu"], found[DEVICE]
    assert (own, own_kept) == (ranks, kept)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("row", ["soco", "specomp"])
def test_a_training_runs_and_is_saved(row, tmp_path):
    """SoCo's stages and the polish; the folder has the logits of the model that was measured."""
    training = [] if row == "soco" else ["method/training=polish"]
    record = compose_run(
        tmp_path, f"method={row}", *training, "ratio=cr40", f"model.device={DEVICE}"
    )
    assert record.status == "ok"
    loaded = specomp.load(record.model_folder, device=DEVICE)
    assert logits(loaded.model).isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """On the device it is made for."""
    model = tiny_model("llama").to(DEVICE, getattr(torch, dtype))
    specomp.compress(model, random_tokens(6, 24), "svd_llm", 0.4)
    assert logits(model).isfinite().all()


def test_speed_is_measured_with_cuda_graphs(tmp_path):
    """reduce-overhead captures them."""
    record = compose_run(
        tmp_path,
        "method=svd_llm",
        "ratio=cr40",
        f"model.device={DEVICE}",
        "benchmark=efficiency",
        "benchmark.parts.efficiency.compile=reduce-overhead",
        "benchmark.parts.efficiency.batch_sizes=[1]",
        "benchmark.parts.efficiency.prompt_tokens=8",
        "benchmark.parts.efficiency.new_tokens=4",
        "benchmark.parts.efficiency.repeats=1",
    )
    (values,) = record.metrics.values()
    assert values["decode_tokens_per_s_bs1"] > 0
