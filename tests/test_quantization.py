"""INT4 end to end: every quantizer on tiny models, its record, its folder in a process without specomp, and what is refused."""

import importlib.util
import statistics
import subprocess
import sys
import textwrap

import pytest
import torch
from running import CONF, compose_config, compose_run, make_setup
from safetensors import safe_open
from test_methods import IDS, MODELS, compressed, logits

import specomp
from specomp.experiment.checks import find_spec
from specomp.errors import UserError
from specomp.methods.adasvd import AdaComp
from specomp.models.export import low_rank_linears
from specomp.models.packed import grid_linears
from specomp.experiment.pipeline import build
from specomp.quantization.factors import FactorQuantizer
from specomp.quantization.none import NoQuantizer
from specomp.compression.loop import dense_needs, quantizer_reads
from specomp.numerics.statistics import Gram

QUANTIZERS = sorted(path.stem for path in (CONF / "quantizer").glob("*.yaml") if path.stem != "none")
SMALL_GROUPS = "quantizer.group_size=16"


def bytes_on_disk(folder) -> int:
    with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("model_name", ["llama_gqa", "opt"])
def test_contract(tmp_path, model_name, quantizer):
    """Finite, counted, stored as counted, reloaded bit for bit; ranks as without quantization."""
    plain = compressed(tmp_path, *MODELS[model_name], "method=svd_llm", "ratio=cr40")
    _, record, model, _, linears = compressed(tmp_path, *MODELS[model_name], "method=svd_llm", "ratio=cr40", f"quantizer={quantizer}")
    found, sizes = logits(model), record.ledger["compressed"]
    assert torch.isfinite(found).all()
    assert not torch.equal(found, logits(plain[2]))
    assert record.key != plain[1].key
    assert [x["rank"] for x in linears] == [x["rank"] for x in plain[4]]
    assert sizes["linear_params"] == plain[1].ledger["compressed"]["linear_params"]
    assert sizes["held_bytes"] == plain[1].ledger["compressed"]["model_bytes"]
    assert sizes["model_bytes"] == bytes_on_disk(record.model_folder) < sizes["held_bytes"]
    assert torch.equal(logits(specomp.load(record.model_folder).model), found)
    assert all(0 < x["quantization_error"] < 0.5 for x in linears if not x["dense"])
    assert all(x["quantization_damping"] == (0.01 if "gptq" in quantizer else 0.0) for x in linears if not x["dense"])
    assert any("4 bits" in note and "simulated" in note for note in record.notes)


@pytest.mark.parametrize("method", ["svd", "svd_llm_update", "adasvd", "fwsvd", "asvd"])
def test_the_gram_is_there_for_every_method(tmp_path, method):
    """Methods that read no Gram get one; gptq beats the nearest in the loss it minimizes or comes close in another norm."""
    errors = {}
    for algorithm in ("gptq", "rtn"):
        _, _, _, _, linears = compressed(
            tmp_path, f"method={method}", "ratio=cr40", "quantizer=gptq_int4", SMALL_GROUPS, f"quantizer.algorithm={algorithm}"
        )
        errors[algorithm] = sum(x["quantization_error"] for x in linears if not x["dense"])
    if method in ("svd_llm_update", "adasvd"):
        assert errors["gptq"] < errors["rtn"]


def test_trained_methods_are_quantized_too(tmp_path):
    options = ("method=soco", "method.training.steps_factor=0.02", "ratio=cr40", "quantizer=gptq_int4", SMALL_GROUPS)
    _, record, model, _, linears = compressed(tmp_path, *options)
    assert len(grid_linears(model)) == 2 * sum(not x["dense"] for x in linears) > 0
    assert torch.equal(logits(specomp.load(record.model_folder).model), logits(model))
    assert record.ledger["compressed"]["model_bytes"] == bytes_on_disk(record.model_folder)


def test_whose_inputs_the_quantizer_sees(cache):
    """Those of the compressed model where the method looks at them, else the dense model's."""
    gptq = FactorQuantizer(
        algorithm="gptq", bits=4, group_size=None, symmetric=False, act_order=True, damping=0.01, order="faithful", rebalance=False
    )
    from test_stages import method

    repaired = method(
        compensation=AdaComp(iterations=1, update="pseudo_inverse", stack_of_batch="gram", num_buckets=4, upstream="compressed")
    )
    assert quantizer_reads(method(), "dense", gptq) == "dense"
    assert quantizer_reads(method(), "compressed", gptq) == "whitening"
    assert quantizer_reads(repaired, "dense", gptq) == "repair"
    assert quantizer_reads(repaired, "compressed", NoQuantizer()) == "dense"
    assert Gram() in dense_needs(method(), "dense", gptq)
    assert Gram() not in dense_needs(method(), "compressed", gptq)
    assert make_setup("llama", cache).linears


def test_streamed_and_dense_inputs_round_differently(tmp_path):
    """svd reads no inputs itself, so only the quantizer can see the difference."""
    found = {}
    for upstream in ("dense", "compressed"):
        options = ("method=svd", "ratio=cr60", "quantizer=gptq_int4", SMALL_GROUPS, f"calibration.upstream={upstream}")
        _, _, model, _, _ = compressed(tmp_path, *options)
        found[upstream] = {name: x.merged_weight() for name, x in low_rank_linears(model).items()}
    moved = {x: float((found["dense"][x] - found["compressed"][x]).norm() / found["dense"][x].norm()) for x in found["dense"]}
    first, last = ([v for x, v in moved.items() if f"layers.{i}." in x] for i in (0, 2))
    # The first decoder layer sees the same inputs, up to the order of summation, which may move a number across a rounding edge.
    assert statistics.median(first) < 1e-3 < statistics.median(last)


def test_a_fresh_process_without_specomp_gives_the_same_logits(tmp_path):
    _, record, model, _, _ = compressed(tmp_path, "model=tiny_llama", "method=svd_llm", "ratio=cr40", "quantizer=gptq_int4", SMALL_GROUPS)
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
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(record.model_folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "difference 0.0" in done.stdout, done.stderr


def test_a_stored_model_is_evaluated_again_from_its_folder(tmp_path):
    """A second benchmark reads the packed folder, and another run of the first is not needed."""
    options = ("model=tiny_llama", "method=svd_llm", "ratio=cr40", "quantizer=gptq_int4", SMALL_GROUPS)
    first = compose_run(tmp_path, *options)
    second = compose_run(tmp_path, *options, "benchmark.window=48")
    assert first.key == second.key
    (new,) = set(second.metrics) - set(first.metrics)
    assert second.metrics[new]["ppl"] > 0
    assert second.ledger == first.ledger


def test_without_compressed_tensors_saving_is_refused_before_any_work(tmp_path, monkeypatch, no_weights_read):
    monkeypatch.setattr("specomp.experiment.checks.find_spec", lambda name: None if name == "compressed_tensors" else find_spec(name))
    with pytest.raises(UserError, match=r"pip install 'specomp\[int4\]', or set save=false"):
        build(compose_config(tmp_path, "method=svd", "quantizer=gptq_int4"))
    assert build(compose_config(tmp_path, "method=svd", "quantizer=gptq_int4", "options.save=false"))
    assert build(compose_config(tmp_path, "method=svd", "quantizer=gptq_int4", "options.export=dense"))
    assert build(compose_config(tmp_path, "method=svd"))


def test_nothing_but_int4_needs_compressed_tensors(tmp_path):
    code = "import sys; sys.modules['compressed_tensors'] = None; import specomp.experiment.pipeline; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, timeout=120)
    assert "fine" in done.stdout, done.stderr
    assert importlib.util.find_spec("compressed_tensors") is not None, "the extra dev brings it"


@pytest.mark.parametrize(
    "override", ["quantizer.bits=1", "quantizer.bits=16", "quantizer.group_size=0", "quantizer.damping=2", "quantizer.order=x"]
)
def test_a_wrong_value_is_one_line_with_its_key(tmp_path, override):
    with pytest.raises(UserError, match=override.split("=")[0]) as caught:
        build(compose_config(tmp_path, "method=svd", "quantizer=gptq_int4", override))
    assert "\n" not in str(caught.value)


def test_a_dense_row_says_that_it_is_not_quantized(tmp_path, caplog):
    build(compose_config(tmp_path, "method=dense", "quantizer=gptq_int4"))
    assert "no factors" in caplog.text
