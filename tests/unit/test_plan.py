"""What plan=true counts and shows; that it looks at nothing and leaves nothing behind. What runs do
beside it: test_route.py.
"""

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from running import CONF, compose_config, compose_run, store
from tiny import FAMILY_NAMES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from specomp import cli, rows
from specomp.compression.ledger import measure
from specomp.data.pydocs import PyDocs
from specomp.errors import UserError
from specomp.experiment.config import Request, ask
from specomp.experiment.pipeline import run
from specomp.experiment.plan import duration, notes, plan_of, record_of, show_plan, size
from specomp.experiment.record import point_of
from specomp.forms.prices import Numbers
from specomp.models.load import check_shape, config_of_shape, skeleton
from specomp.models.sources import HubModel, RandomModel, Source
from specomp.numerics.work import Counter, Work, seconds, work
from specomp.pricing import Plan, counted, planned

# As counted in the published weights.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "opt_125m": 125_239_296,
    "opt_6_7b": 6_658_473_984,
    "llama_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "vicuna_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "gemma2_9b": 9_241_705_984,
    "phi3_mini": 3_821_079_552,
}


def shape_in_yaml(name: str) -> dict:
    return yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["shape"]


def asked(folder: Path, *overrides: str) -> Request:
    return ask(compose_config(folder, *overrides))


def text(request: Request) -> str:
    out = io.StringIO()
    show_plan(request, console=Console(file=out, width=200, force_terminal=False))
    return out.getvalue()


def plan_for(config, method="svd_llm", dtype="float32", **calibration) -> Plan:
    base = rows.built(rows.load("calibration", "_base"), "calibration") | calibration
    settings = rows.importlib.import_module("specomp.api").calibration_of(
        {k: v for k, v in base.items() if k not in ("num_samples", "length", "bos")}
    )
    return planned(config, dtype, rows.method(method), Numbers(compression=0.4), settings, 4, 32)


# --- sizes


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_shape_of_a_yaml_has_the_published_parameters(name):
    config = config_of_shape(shape_in_yaml(name), name)
    parameters = sum(p.numel() for p in skeleton(config, "bfloat16").parameters())
    assert parameters == PUBLISHED[name]


def test_every_model_that_is_not_on_this_disk_has_a_shape():
    for path in sorted((CONF / "model").glob("*.yaml")):
        content = rows.load("model", path.stem)
        shaped = content.get("shape") is not None
        elsewhere = content["_target_"].endswith(("HubModel", "PackagedGGUF"))
        assert shaped == (elsewhere and path.stem != "hub"), path.name
        assert not shaped or path.stem.removesuffix("_off_grid") in PUBLISHED


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_plan_counts_as_the_model_does(name):
    model = tiny_model(name)
    found = plan_for(model.config)
    linears = found.run.family.linears(model)
    assert found.run.linears == linears
    assert found.size == measure(model, linears)


def test_ranks_that_need_data_are_uniform_and_said_to_be(tmp_path):
    found = plan_of(asked(tmp_path, "method=specomp"))
    assert found.asked == "spectra"
    assert "depends on spectra: the ranks shown are uniform" in text(
        asked(tmp_path, "method=specomp")
    )
    assert plan_of(asked(tmp_path, "method=svd_llm")).asked is None


# --- work


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_forward_pass_multiplies_what_torch_counts(name):
    """Of attention as products: torch counts none of the CPU's fused one."""
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    if name in ("mistral", "gemma2"):
        model.config.sliding_window = 64
    ids = torch.zeros(1, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    outside, layer = counted(model.config, torch.float32, 32, True, False)
    layers = model.config.num_hidden_layers
    assert (outside + layer * layers).of("product") == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_a_backward_pass_takes_as_much_again_and_weights_more():
    config = tiny_model("llama").config
    outside, layer = counted(config, torch.float32, 32, True, False)
    outside_too, layer_too = counted(config, torch.float32, 32, True, True)
    assert layer_too.of("product") == pytest.approx(2 * layer.of("product"), rel=0.3)
    assert outside_too.of("product") == pytest.approx(2 * outside.of("product"), rel=0.01)
    plain, weights = (
        plan_for(config, x).calibrate().work.of("product") for x in ("two_sided", "fwsvd")
    )
    assert weights > 0 and plain > 0


def test_what_runs_is_counted_by_kind_and_dtype():
    a = torch.randn(20, 30, dtype=torch.float64)
    with Counter() as counter:
        gram = a @ a.T
        torch.linalg.eigh(gram)
        torch.linalg.solve_triangular(gram.triu(), a, upper=True)
        gram.add_(1)
    assert counter.work.amounts["product", "float64"] == 2 * 20 * 20 * 30
    assert counter.work.amounts["factorization", "float64"] == 9 * 20**3 + 20 * 20 * 30
    assert counter.work.of("memory") > 0
    assert counter.work.flops == 2 * 20 * 20 * 30 + 9 * 20**3 + 20 * 20 * 30


def test_decompositions_grow_with_the_cube():
    small, large = (
        plan_for(config_of_shape({**shape_in_yaml("llama2_7b"), **x}, "x"), "svd_llm", "bfloat16")
        for x in (
            {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 1},
            {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1},
        )
    )
    ratio = large.compress().work.flops / small.compress().work.flops
    assert ratio == pytest.approx(8, rel=0.05)


def test_work_adds_up_and_seconds_are_amounts_over_rates():
    both = work("product", 6.0, torch.float32) + work("disk", 4.0) * 2
    assert both.amounts == {("product", "float32"): 6.0, ("disk", ""): 8.0}
    assert (both - both).flops == 0 and Work().flops == 0
    rates = {("product", "float32"): 8.0, ("disk", ""): 4.0}
    assert seconds(both, rates) == pytest.approx(6 / (8 * 0.75) + 8 / 4)


def test_layers_at_once_repeat_the_forward_pass(tmp_path):
    whole, halves = (
        plan_of(asked(tmp_path, "method=svd_llm", f"calibration.layers_at_once={n}"))
        for n in (3, 2)
    )
    assert len(halves.passes) == 2 * len(whole.passes)
    assert halves.calibrate().work.flops > 1.5 * whole.calibrate().work.flops
    assert halves.calibrate().held < whole.calibrate().held


def test_what_is_unknown_is_not_a_number(tmp_path):
    part = (
        "+benchmark.parts.own={_target_: specomp.evaluation.harness.HarnessTask, task: squadv2,"
        " version: 1, "
    )
    part += (
        "num_fewshot: null, limit: null, batch_size: 1, precision: float32, data_root: null,"
        " metric: exact}"
    )
    found = plan_of(asked(tmp_path, "method=svd", part))
    last = found.stages[-1]
    assert last.unknown and "unknown: own" in last.detail
    assert "or more" in text(asked(tmp_path, "method=svd", part))


def test_a_run_that_cannot_be_is_refused(tmp_path):
    for wrong, message in (
        (("calibration.length=4096",), "do not fit the model's context of 256"),
        (("ratio.compression=0.999",), "rank 1 in each takes"),
        (("method=soco", "calibration.num_samples=2"), "held_out=2"),
    ):
        with pytest.raises(UserError, match=message):
            plan_of(asked(tmp_path, *wrong))


# --- the shape of a yaml


def test_another_shape_than_the_real_one_is_one_line():
    config = tiny_model("llama").config
    check_shape(None, config, "x")
    check_shape({"model_type": "llama", "hidden_size": 32}, config, "x")
    with pytest.raises(
        UserError, match=r"x: hidden_size is 32 where model\.shape says 64: correct model\.shape"
    ) as caught:
        check_shape({"hidden_size": 64, "num_hidden_layers": 3}, config, "x")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"model\.shape of x is refused"):
        config_of_shape({"model_type": "nothing"}, "x")


def test_a_shape_is_checked_before_weights_are_fetched(cache, monkeypatch, no_weights_read):
    model = HubModel(
        name="h",
        repo="a/b",
        revision="0" * 40,
        weights="safetensors",
        dtype="float32",
        device="cpu",
        device_map=None,
        trust_remote_code=False,
        shape={"model_type": "llama", "hidden_size": 4096},
    )
    assert model.config_for_plan(cache).hidden_size == 4096
    monkeypatch.setattr(HubModel, "_config", lambda self: tiny_model_config())
    with pytest.raises(UserError, match="a/b: hidden_size is 32"):
        model.load(cache)


def tiny_model_config():
    source = RandomModel(
        name="t",
        dtype="float32",
        device="cpu",
        device_map=None,
        architecture="llama",
        seed=0,
        config={"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1},
    )
    return source._config()


def test_a_shape_says_nothing_about_which_weights_are_wanted():
    """Records made before there were shapes are found by the same command."""
    config = {
        "model": {"repo": "a/b", "revision": "c"},
        "method": {},
        "ratio": {},
        "calibration": {},
        "quantizer": {},
        "seed": 0,
    }
    assert point_of(config) == point_of(
        config | {"model": config["model"] | {"shape": {"hidden_size": 1}}}
    )


# --- what was measured


def test_measured_stands_beside_estimated(tmp_path):
    typed = ("method=svd_llm", "save=false")
    first = compose_run(tmp_path, *typed)
    request = asked(tmp_path, *typed)
    found = record_of(request)
    assert found is not None
    assert found.key == first.key
    shown = text(request)
    assert f"measured: record {first.key[:12]}" in shown
    assert "beside the record" in shown
    assert record_of(asked(tmp_path, "method=svd")) is None
    assert "measured:" not in text(asked(tmp_path, "method=svd"))


# --- the command


def test_a_plan_touches_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a plan needs none of this")

    for owner, name in (
        (PyDocs, "text"),
        (PyDocs, "describe"),
        (Source, "tokenizer"),
        (RandomModel, "tokenizer"),
        (RandomModel, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert run(compose_config(tmp_path, "plan=true", "method=specomp", "quantizer=none")) is None
    shown = capsys.readouterr().out
    assert "plan: tiny_llama, specomp, compression 40%" in shown
    assert "~" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_every_method_has_a_plan(tmp_path, method):
    shown = text(asked(tmp_path, f"method={method}"))
    assert shown.startswith(f"plan: tiny_llama, {method}, ")
    assert "self_attn.q_proj" in shown


@pytest.mark.parametrize("model", ["llama2_70b", "llama2_7b"])
def test_a_hub_model_needs_no_hub(tmp_path, model):
    """With the committed shape; 70B as well as 7B."""
    cfg = compose_config(
        tmp_path,
        f"model={model}",
        "calibration=wikitext2",
        "benchmark=wikitext2",
        "method=adasvd",
        "paths.data=/none",
    )
    cfg.model = rows.load("model", model)
    request = ask(cfg)
    assert plan_of(request).size.model_params == PUBLISHED[model]
    shown = text(request)
    assert "downloading the weights" in shown
    assert "about" in shown


def test_a_sweep_prints_a_plan_a_job_and_runs_none(tmp_path, capsys):
    for method in ("svd", "asvd"):
        run(compose_config(tmp_path, "plan=true", f"method={method}"))
    shown = capsys.readouterr().out
    assert shown.count("plan: tiny_llama") == 2
    assert not store(tmp_path).folder.exists()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (119, "119.0 s"),
        (600, "10.0 min"),
        (36000, "10.0 h"),
        (864000, "10.0 days"),
    ],
)
def test_durations_read_well(seconds, shown):
    assert duration(seconds) == shown


def test_sizes_read_well():
    assert (size(1.5 * 2**30), size(20.25 * 2**30)) == ("1,536 MiB", "20.2 GiB")


def test_a_plan_is_in_no_record(tmp_path):
    compose_run(tmp_path, "method=svd", "save=false")
    before = {path: path.read_bytes() for path in store(tmp_path).folder.glob("*.json")}
    run(compose_config(tmp_path, "plan=true", "method=svd"))
    assert before == {path: path.read_bytes() for path in store(tmp_path).folder.glob("*.json")}
    assert all(json.loads(content)["status"] == "ok" for content in before.values())


def test_a_dtype_that_this_device_is_slow_in_is_said(tmp_path):
    request = asked(tmp_path, "plan=true", "method=svd", "model.dtype=float16")
    rates = {("product", "float16"): 1e9, ("product", "float32"): 28e9}
    found, cpu = plan_of(request), torch.device("cpu")
    told = [x for x in notes(found, request, rates, cpu) if "28 times as long" in x]
    assert len(told) == 1 and "model.dtype=float32" in told[0]
    rates["product", "float16"] = 20e9
    assert not [x for x in notes(found, request, rates, cpu) if "as long" in x]


def test_a_model_that_does_not_fit_there(tmp_path):
    """Said, also of a device that this machine does not have."""
    shown = text(asked(tmp_path, "plan=rtx4090", "model=llama2_70b", "model.device=cuda"))
    assert "That does not fit its 22.4 GiB" in shown


@pytest.mark.parametrize(("device", "dtype"), [("h100", "float16"), ("a100", "float32")])
def test_a_device_that_is_not_here(tmp_path, device, dtype):
    """By what its maker states; ranks that its tensor cores are slow with are said."""
    choices = f"plan={device}", "method=svd", "ratio=cr40", f"model.dtype={dtype}"
    request = asked(tmp_path, *choices)
    shown = text(request)
    assert f"on one {device.upper()}" in shown and "speed stated by its maker" in shown
    assert "nothing was measured there" in shown
    assert ("no multiples of 8" in shown) == (dtype == "float16")
    assert point_of(request.config) == point_of(asked(tmp_path, "plan=false", *choices[1:]).config)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_plan_says_how_it_is_used(capsys, word):
    assert cli.run(["plan", word]) == 0
    assert capsys.readouterr().out.startswith("usage: specomp plan")
