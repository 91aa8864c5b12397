"""INT4 end to end: every quantizer on tiny models, its record, its folder in a process without
specomp, and what is refused.
"""

import statistics
import subprocess
import sys
import textwrap

import pytest
import torch
from running import CONF, compose_config, compose_run
from safetensors import safe_open
from test_methods import IDS, MODELS, compressed, logits

import specomp
from specomp import rows
from specomp.compression.route import Route
from specomp.errors import UserError, find_spec
from specomp.experiment.config import build
from specomp.methods.adasvd import AdaComp
from specomp.models.modules import CodedLinear, GridLinear
from specomp.models.packed import grid_linears
from specomp.models.save import substitutes
from specomp.numerics.statistics import Gram
from specomp.quantization.factors import FactorQuantizer
from specomp.quantization.scaled import ScaledLinear

QUANTIZERS = sorted(
    path.stem
    for path in (CONF / "quantizer").glob("*.yaml")
    if path.stem not in ("none", "grids")  # the latter: tests/unit/test_gridded.py
)
SMALL_GROUPS = "quantizer.group_size=16"


def bytes_on_disk(folder) -> int:
    with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("packing", ["factors", "pivoted"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("model_name", ["llama_gqa", "opt"])
def test_contract(tmp_path, model_name, quantizer, packing):
    """Finite, counted, stored as counted, reloaded bit for bit; ranks as without quantization."""
    options = (*MODELS[model_name], "method=svd_llm", "ratio=cr40", f"method/packing={packing}")
    _, plain_record, plain, _, plain_linears = compressed(tmp_path, *options)
    _, record, model, _, linears = compressed(tmp_path, *options, f"quantizer={quantizer}")
    found, sizes, before = logits(model), record.counted.compressed, plain_record.counted.compressed
    assert torch.isfinite(found).all()
    assert not torch.equal(found, logits(plain))
    assert record.key != plain_record.key
    assert [x.rank for x in linears] == [x.rank for x in plain_linears]
    assert sizes.linear_params == before.linear_params
    grid = rows.slot("quantizer", quantizer).grid
    scales = [x.scale for x in model.modules() if isinstance(x, ScaledLinear)]
    held = before.model_bytes + sum(x.nbytes for x in scales)
    assert sizes.held_bytes == (held if grid.simulated else sizes.model_bytes)
    assert sizes.model_bytes == bytes_on_disk(record.model_folder)
    assert (sizes.model_bytes < sizes.held_bytes) is grid.simulated
    assert sizes.linear_bits < before.linear_bits
    assert before.linear_bits - sizes.linear_bits == 8 * (before.model_bytes - sizes.model_bytes)
    assert torch.equal(logits(specomp.load(record.model_folder).model), found)
    low = [x for x in linears if not x.dense]
    on_grid = (GridLinear, CodedLinear)
    assert sum(isinstance(x, on_grid) for x in model.modules()) == 2 * len(low) > 0
    assert all(0 < x.quantization_error < 0.5 for x in low)
    asked = 0.01 if "gptq" in quantizer else 0.0
    assert all(x.quantization_damping == asked for x in low)
    said = "simulated" if grid.simulated else "held as they are stored"
    assert any(f"{grid.bits} bits" in note and said in note for note in record.notes)


@pytest.mark.parametrize("method", ["svd", "svd_llm_update", "adasvd", "fwsvd", "asvd"])
def test_the_gram_is_there_for_every_method(tmp_path, method):
    """Methods that read no Gram get one; gptq beats the nearest in the loss it minimizes or comes
    close in another norm.
    """
    errors = {}
    options = (f"method={method}", "ratio=cr40", "quantizer=gptq_int4", SMALL_GROUPS)
    for algorithm in ("gptq", "rtn"):
        linears = compressed(tmp_path, *options, f"quantizer.algorithm={algorithm}")[-1]
        errors[algorithm] = sum(x.quantization_error for x in linears if not x.dense)
    if method in ("svd_llm_update", "adasvd"):
        assert errors["gptq"] < errors["rtn"]


def test_trained_methods_are_quantized_too(tmp_path):
    options = (
        "method=soco",
        "method.training.steps_factor=0.02",
        "ratio=cr40",
        "quantizer=gptq_int4",
        SMALL_GROUPS,
    )
    _, record, model, _, linears = compressed(tmp_path, *options)
    assert len(grid_linears(model)) == 2 * sum(not x.dense for x in linears) > 0
    assert torch.equal(logits(specomp.load(record.model_folder).model), logits(model))
    assert record.counted.compressed.model_bytes == bytes_on_disk(record.model_folder)


def test_whose_inputs_the_quantizer_sees():
    """Those of the compressed model where the method looks at them, else the dense model's."""
    settings = {
        "bits": 4,
        "group_size": None,
        "symmetric": False,
        "act_order": True,
        "damping": 0.01,
    }
    gptq = FactorQuantizer(algorithm="gptq", order="faithful", rebalance=False, **settings)
    settings = {
        "iterations": 1,
        "update": "pseudo_inverse",
        "stack_of_batch": "gram",
        "num_buckets": 4,
    }
    repair = AdaComp(upstream="compressed", **settings)

    def route(upstream: str, **slots) -> Route:
        return Route.of(specomp.method("svd", **slots), upstream, 8)

    plain = route("dense", quantizer=gptq)
    assert plain.rounds == "whitening"
    assert plain.dense == {Gram()}
    assert not plain.whitening.streamed and not plain.stream_samples
    streamed = route("compressed", quantizer=gptq)
    assert streamed.rounds == "whitening"
    assert streamed.whitening.streamed == {Gram()}
    assert streamed.dense == frozenset()
    repaired = route("dense", quantizer=gptq, compensation=repair)
    assert repaired.rounds == "compensation"
    assert repaired.compensation.streamed == {Gram()}
    assert repaired.dense == frozenset()
    both = route("compressed", quantizer=gptq, compensation=repair)
    assert both.rounds == "whitening"
    assert both.whitening.streamed == {Gram()}
    trained = Route.of(specomp.method("soco", quantizer=gptq), "dense", 8)
    assert Gram() in trained.dense
    assert not trained.stream_samples
    unrounded = route("compressed", compensation=repair)
    assert not unrounded.whitening.streamed
    assert unrounded.dense == frozenset()


def test_streamed_and_dense_inputs_round_differently(tmp_path):
    """svd reads no inputs itself, so only the quantizer can see the difference."""
    found = {}
    for upstream in ("dense", "compressed"):
        options = (
            "method=svd",
            "ratio=cr60",
            "quantizer=gptq_int4",
            SMALL_GROUPS,
            f"calibration.upstream={upstream}",
        )
        _, _, model, _, _ = compressed(tmp_path, *options)
        found[upstream] = {name: x.merged_weight() for name, x in substitutes(model).items()}
    moved = {
        x: float((found["dense"][x] - found["compressed"][x]).norm() / found["dense"][x].norm())
        for x in found["dense"]
    }
    first, last = ([v for x, v in moved.items() if f"layers.{i}." in x] for i in (0, 2))
    # The first decoder layer sees the same inputs, up to the order of summation, which may move a
    # number across a rounding edge.
    assert statistics.median(first) < 1e-3 < statistics.median(last)


def test_a_fresh_process_without_specomp_gives_the_same_logits(tmp_path):
    _, record, model, _, _ = compressed(
        tmp_path,
        "model=tiny_llama",
        "method=svd_llm",
        "ratio=cr40",
        "quantizer=gptq_int4",
        SMALL_GROUPS,
    )
    torch.save(logits(model), tmp_path / "expected.pt")
    code = f"""
        import sys; sys.modules["specomp"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        with torch.no_grad():
            logits = model(torch.arange({IDS[0, 0]}, {IDS[0, -1] + 1})[None]).logits
        print("difference", (logits - torch.load("expected.pt")).abs().max().item())
    """
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", textwrap.dedent(code), str(record.model_folder)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "difference 0.0" in done.stdout, done.stderr


def test_a_stored_model_is_evaluated_again_from_its_folder(tmp_path):
    """A second benchmark reads the packed folder, and another run of the first is not needed."""
    options = (
        "model=tiny_llama",
        "method=svd_llm",
        "ratio=cr40",
        "quantizer=gptq_int4",
        SMALL_GROUPS,
    )
    first = compose_run(tmp_path, *options)
    second = compose_run(tmp_path, *options, "benchmark.window=48")
    assert first.key == second.key
    (new,) = set(second.metrics) - set(first.metrics)
    assert second.metrics[new]["ppl"] > 0
    assert second.ledger == first.ledger


def test_without_compressed_tensors_saving_is_refused_before_any_work(
    tmp_path, monkeypatch, no_weights_read
):
    monkeypatch.setattr(
        "specomp.errors.find_spec",
        lambda name: None if name == "compressed_tensors" else find_spec(name),
    )
    with pytest.raises(UserError, match=r"pip install 'specomp\[int4\]', or set save=false"):
        build(compose_config(tmp_path, "method=svd", "quantizer=gptq_int4"))
    assert build(
        compose_config(tmp_path, "method=svd", "quantizer=gptq_int4", "options.save=false")
    )
    assert build(
        compose_config(tmp_path, "method=svd", "quantizer=gptq_int4", "options.export=dense")
    )
    assert build(compose_config(tmp_path, "method=svd"))


@pytest.mark.parametrize(
    "override",
    [
        "quantizer.bits=1",
        "quantizer.bits=16",
        "quantizer.group_size=0",
        "quantizer.damping=2",
        "quantizer.order=x",
    ],
)
def test_a_wrong_value_is_one_line_with_its_key(tmp_path, override):
    with pytest.raises(UserError, match=override.split("=")[0]) as caught:
        build(compose_config(tmp_path, "method=svd", "quantizer=gptq_int4", override))
    assert "\n" not in str(caught.value)


def test_a_dense_row_says_that_it_is_not_quantized(tmp_path, caplog):
    packing = "method/packing=factors"  # in full, which is its own, it is
    build(compose_config(tmp_path, "method=dense", packing, "quantizer=gptq_int4"))
    assert "quantizer is not used" in caplog.text
