"""What plan=true counts, against what runs count; and that it looks at nothing and leaves nothing behind."""

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from running import CONF, compose_config, compose_run, make_setup, store
from safetensors.torch import load_file
from tiny import FAMILY_NAMES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from specomp.data.pydocs import PyDocs
from specomp.errors import UserError
from specomp.experiment.config import Request, ask
from specomp.compression.ledger import measure
from specomp.numerics.linalg import half_weigh
from specomp.models.families import family_of
from specomp.models.family import LinearSpec
from specomp.models.load import check_shape, config_of_shape
from specomp.models.sources import HubModel, RandomModel, Source
from specomp.experiment.pipeline import run
from specomp.planning.device import EFFICIENCY, Speed, speed_for
from specomp.planning.outlook import Outlook
from specomp.planning.plan import Plan, estimates, plan, record_of
from specomp.planning.show import duration, show, size
from specomp.planning.sizes import kept_components, norm_of, ranks_of, shape_of, values_of_layer
from specomp.planning.stages import outlook
from specomp.planning.texts import readings
from specomp.planning.work import NOTHING, Work, decomposition, forward, gram, half_product, loss
from specomp.numerics.ratio import rank_for_retention
from specomp.experiment.record import Record, point_of
from specomp.compression.stream import HiddenStream
from specomp.numerics.statistics import Gram, Precision

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
FLAT = Speed(
    device="cpu",
    threads=1,
    rates={(kind, dtype): 1e9 for kind in EFFICIENCY for dtype in ("", "float32", "float64", "bfloat16", "float16")},
    busy=1.0,
)


def shape_in_yaml(name: str) -> dict:
    return yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["shape"]


def asked(folder: Path, *overrides: str) -> Request:
    return ask(compose_config(folder, *overrides))


def counted(folder: Path, *overrides: str) -> Outlook:
    return outlook(asked(folder, *overrides))


def cached_bytes(folder: Path, kind: str) -> int:
    """Bytes of all tensors of one kind in the cache."""
    files = (folder / "cache" / kind).rglob("*.safetensors")
    return sum(x.numel() * x.element_size() for file in files for x in load_file(file).values())


def plan_of(folder: Path, *overrides: str, record: Record | None = None) -> Plan:
    seen = counted(folder, *overrides)
    found = estimates(seen, FLAT, torch.device("cpu"), 0.0, record)
    return Plan(outlook=seen, speed=FLAT, estimates=found, record=record)


def text(shown: Plan, width: int = 200) -> str:
    out = io.StringIO()
    show(shown, console=Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


# --- sizes


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_shape_of_a_yaml_has_the_published_parameters(name):
    shape = shape_of(config_of_shape(shape_in_yaml(name), name), "bfloat16")
    assert shape.size.model_params == PUBLISHED[name]
    assert shape.size.model_bytes == 2 * PUBLISHED[name]


def test_every_model_that_is_not_on_this_disk_has_a_shape():
    for path in sorted((CONF / "model").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        assert ("shape" in content) == content["_target_"].endswith(("HubModel", "PackagedGGUF")), path.name
        assert "shape" not in content or path.stem in PUBLISHED


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_skeleton_counts_as_the_model_does(name):
    model = tiny_model(name)
    shape = shape_of(model.config, "float32")
    linears = family_of(model.config).linears(model)
    assert shape.linears == linears
    assert shape.size == measure(model, linears)
    assert shape.biased == {x.name for x in linears if model.get_submodule(x.name).bias is not None}


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "tiny_qwen"])
@pytest.mark.parametrize(
    "choices",
    [
        ("method=svd_llm",),
        ("method=svd", "method.allocation.exact_budget=true"),
        ("method=svd_llm", "method/packing=pivoted"),
        ("method=svd_llm", "quantizer=gptq_int4"),
        ("method=svd_llm", "quantizer=gptq_int4_perrow"),
        ("method=dense",),
    ],
    ids=" ".join,
)
def test_parameters_and_bytes_are_those_of_the_ledger(tmp_path, model, choices):
    typed = (f"model={model}", *choices, "benchmark=none", "save=false")
    expected = compose_run(tmp_path, *typed).ledger
    seen = counted(tmp_path, *typed)
    assert vars(seen.compressed) == expected["compressed"]
    assert vars(seen.shape.size) == expected["dense"]
    assert seen.ranks.asked is None


@pytest.mark.parametrize("method", ["svd_llm", "asvd", "fwsvd", "fwsvd_out", "adasvd", "two_sided", "svd_llm_update", "specomp"])
def test_statistics_and_spectra_are_the_files_in_the_cache(tmp_path, method):
    typed = (f"method={method}", "ratio=cr60", "benchmark=none", "save=false", "calibration.window=2")
    record = compose_run(tmp_path, *typed)
    seen = counted(tmp_path, *typed)
    assert seen.statistics_cached == cached_bytes(tmp_path, "statistics")
    layers = seen.shape.num_layers
    assert seen.statistics_held == seen.statistics_cached * 2 // layers, "two of the decoder layers at once"
    if record.ledger["num_dense"] == 0 or method == "specomp":
        assert seen.spectra_cached == cached_bytes(tmp_path, "spectra")


def test_a_training_keeps_every_component_and_the_teacher(tmp_path):
    typed = ("method=soco", "method.training.steps_factor=0.02", "benchmark=none", "save=false", "method/whitening=gram")
    record = compose_run(tmp_path, *typed)
    seen = counted(tmp_path, *typed)
    assert seen.spectra_cached == cached_bytes(tmp_path, "spectra")
    assert seen.teacher_cached == cached_bytes(tmp_path, "teacher")
    train = next(x for x in seen.stages if x.name == "train")
    assert f"{record.training['steps']} steps, {record.training['tokens']:,} tokens" in train.detail
    assert seen.compressed.linear_params == pytest.approx(record.ledger["compressed"]["linear_params"], rel=0.02)


def test_hidden_states_are_those_of_the_stream(tmp_path, cache):
    request = asked(tmp_path, "model=tiny_llama", "method=adasvd")
    seen = outlook(request)
    setup = make_setup("llama", cache, num_samples=seen.samples, length=seen.length)
    carried = sum(x.numel() * x.element_size() for x in HiddenStream(setup).hidden)
    assert seen.hidden_carried == carried
    few = counted(tmp_path, "method=svd_llm_update", "method.compensation.num_samples=2")
    assert few.hidden_carried == carried * 2 // seen.samples
    assert counted(tmp_path, "method=svd_llm").hidden_carried == 0
    both = counted(tmp_path, "model=tiny_llama", "method=svd_llm", "method/compensation=block_refine")
    assert both.hidden_carried == 2 * carried, "the dense model's beside the compressed one's"


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("packing", ["factors", "pivoted"])
def test_refined_decoder_layers_are_cached_as_they_are_stored(tmp_path, family, packing):
    typed = (f"model=tiny_{family}", "method=svd_llm", f"method/packing={packing}", "method/compensation=block_refine")
    typed += ("method.compensation.steps=1", "ratio=cr60", "benchmark=none", "save=false")
    compose_run(tmp_path, *typed)
    seen = counted(tmp_path, *typed)
    gains = 8 * seen.shape.num_layers
    assert seen.refined_cached + gains == cached_bytes(tmp_path, "refined")


def test_ranks_follow_the_formula_where_no_data_is_asked_for(tmp_path):
    request = asked(tmp_path, "method=svd_llm", "ratio=cr60")
    shape = shape_of(request.source.config_for_plan(request.cache), "float32")
    ranks = ranks_of(request.method, request.ratio, shape.linears)
    assert ranks.by_name == {x.name: rank_for_retention(x.m, x.n, 0.4) for x in shape.linears}


@pytest.mark.parametrize(
    ("method", "wanted"), [("adasvd", "statistics"), ("svd_llm_v2", "spectra"), ("asvd_strs", "trials"), ("soco", "a training")]
)
def test_ranks_that_need_data_are_uniform_and_said_to_be(tmp_path, method, wanted):
    seen = plan_of(tmp_path, f"method={method}", "method.packing={_target_: specomp.methods.svd.Factors}")
    assert seen.outlook.ranks.asked == wanted
    budget = 0.6 * seen.outlook.shape.size.linear_params
    assert 0.9 * budget < seen.outlook.compressed.linear_params <= budget
    assert f"asks for {wanted}: the ranks shown are uniform ones, at the same budget" in text(seen)


# --- work


def counted_flops(act) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_a_forward_pass_multiplies_what_it_says(name):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    shape = shape_of(model.config, "float32")
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with torch.no_grad():
        real = counted_flops(lambda: model(input_ids=ids, use_cache=False))
        decoder = counted_flops(lambda: family_of(model.config).decoder(model)(input_ids=ids, use_cache=False))
    linears = shape.size.linear_params
    attention = 2 * 16 * 8 * shape.attention * shape.num_layers  # eager attention computes the other half, too; rotary angles are products
    for flops, head in ((real, True), (decoder, False)):
        assert forward(shape, 16, 8, torch.float32, linears=linears, head=head).flops + attention == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("n", [40, 192, 500])
def test_gram_products_are_counted_as_made(n):
    accumulator = Gram().start(Precision(torch.float32, torch.float32), 1)
    x = torch.randn(1, 30, n)
    assert gram(n, 30, torch.float32, 1).flops == counted_flops(lambda: accumulator.update(x))


@pytest.mark.parametrize("n", [40, 200, 900])
def test_half_products_are_counted_as_made(n):
    matrix, symmetric = torch.randn(7, n), torch.eye(n)
    assert half_product(7, n) == counted_flops(lambda: half_weigh(matrix, symmetric))


@pytest.mark.parametrize("sizes", [(24, 60), (60, 24), (32, 32)])
@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm", "two_sided", "svd_llm_cholesky"])
def test_the_products_of_a_decomposition_are_counted_as_made(tmp_path, sizes, method):
    m, n = sizes
    request = asked(tmp_path, f"method={method}")
    linear = LinearSpec("x", m, n, 0, 0, "self_attn.q_proj")
    shape = shape_of(tiny_model("llama").config, "float32")
    one = shape.__class__(**(vars(shape) | {"linears": [linear]}))
    precision = Precision(torch.float32, torch.float32)
    norm = norm_of(request.method.whitening, linear, values_of_layer(request.method.whitening.needs, one, precision))
    work = decomposition(linear, norm, kept_components(linear, complete=True))
    x, g = torch.randn(200, n), torch.randn(200, m)
    real = {"gram": x.T @ x, "output_gram": g.T @ g}
    for name, value in vars(norm).items():
        if isinstance(value, torch.Tensor) and name in real:
            object.__setattr__(norm, name, real[name] if value.ndim == 2 else real[name].diagonal().clone())
    made = counted_flops(lambda: norm.decompose(torch.randn(m, n)))  # auto: float32 is enough here
    products = sum(amount for (kind, _), amount in work.amounts.items() if kind == "product")
    solved = {"two_sided": m * m * min(m, n), "svd_llm_cholesky": min(m, n) * n**2}  # triangular: the counter does not know them
    assert products == pytest.approx(made + solved.get(method, 0), rel=1e-6)
    error = counted_flops(lambda: norm.loss(torch.randn(m, n)))
    assert loss(linear, norm).flops == error


def test_work_adds_up():
    a, b = Work({("product", "float32"): 2.0}), Work({("product", "float32"): 3.0, ("memory", ""): 7.0})
    assert (a + b).amounts == {("product", "float32"): 5.0, ("memory", ""): 7.0}
    assert (b * 2).flops == 6.0
    assert NOTHING.flops == 0


def test_windows_repeat_the_forward_pass(tmp_path):
    once, twice = (
        next(x for x in counted(tmp_path, "method=svd_llm", f"calibration.window={w}").stages if x.name == "calibrate") for w in (3, 2)
    )
    assert once.detail == "1 x 128 tokens forward"
    assert twice.detail == "2 x 128 tokens forward"
    assert once.work.flops < twice.work.flops < 2 * once.work.flops, "the Gram products are made once"
    assert twice.held < once.held


def test_gradient_statistics_take_a_backward_pass(tmp_path):
    for method, detail in (("fwsvd", "1 x 128 tokens forward and backward"), ("two_sided", "1 x 128 tokens forward; 1 x")):
        calibrate = next(x for x in counted(tmp_path, f"method={method}").stages if x.name == "calibrate")
        assert calibrate.detail.startswith(detail)


# --- what it is told beforehand


def test_tokens_of_benchmarks_are_marked_by_how_sure_they_are(tmp_path):
    def found(*overrides: str) -> dict[str, tuple]:
        suite = asked(tmp_path, *overrides).suite
        return {r.label: (r.tokens, r.sure) for label, part in suite.parts.items() for r in readings(part, label)}

    assert found("benchmark=wikitext2", "benchmark.window=512", "benchmark.max_windows=24") == {"wikitext2": (12288, "at most")}
    assert found("benchmark=wikitext2")["wikitext2"][1] == "estimate"
    assert found("benchmark=pydocs", "benchmark.max_windows=null")["pydocs"] == (None, "unknown")
    zeroshot = found("benchmark=zeroshot", "benchmark.limit=100")
    assert len(zeroshot) == 7
    assert {sure for _, sure in zeroshot.values()} == {"estimate"}


def test_what_is_unknown_is_not_a_number(tmp_path):
    shown = text(plan_of(tmp_path, "benchmark=pydocs", "benchmark.max_windows=null", "benchmark.parts.efficiency=null"))
    assert "unknown: pydocs" in shown
    assert "or more" in shown


def test_token_files_say_their_size(tmp_path):
    path = tmp_path / "ids.pt"
    torch.save(torch.ones(6, 20, dtype=torch.int64), path)
    seen = counted(tmp_path, "calibration=token_ids", f"calibration.path={path}", "benchmark=token_ids", f"benchmark.path={path}")
    assert (seen.samples, seen.length) == (6, 20)
    assert "120 tokens" in seen.stages[-1].detail


def test_a_run_that_cannot_be_is_refused(tmp_path):
    for wrong, message in (
        (("calibration.length=4096",), "do not fit the model's context of 256"),
        (("ratio.compression=0.999",), "rank 1 in each takes"),
        (("method=soco", "calibration.num_samples=2"), "held_out=2"),
    ):
        with pytest.raises(UserError, match=message):
            counted(tmp_path, *wrong)


# --- the shape of a yaml


def test_another_shape_than_the_real_one_is_one_line():
    config = tiny_model("llama").config
    check_shape(None, config, "x")
    check_shape({"model_type": "llama", "hidden_size": 32}, config, "x")
    with pytest.raises(UserError, match=r"x: hidden_size is 32 where model\.shape says 64: correct model\.shape") as caught:
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
    config = {"model": {"repo": "a/b", "revision": "c"}, "method": {}, "ratio": {}, "calibration": {}, "quantizer": {}, "seed": 0}
    assert point_of(config) == point_of(config | {"model": config["model"] | {"shape": {"hidden_size": 1}}})


# --- time, memory, and what was measured


def test_seconds_are_amounts_over_rates():
    work = Work({("product", "float32"): 3e9 * EFFICIENCY["product"], ("disk", ""): 2e9 * EFFICIENCY["disk"]})
    assert FLAT.seconds(work) == pytest.approx(5.0)


def test_a_device_is_measured_in_a_moment():
    speed = speed_for([Work({("product", "float32"): 1.0, ("factorization", "float64"): 1.0, ("memory", ""): 1.0})], torch.device("cpu"))
    assert speed.threads == torch.get_num_threads()
    assert set(speed.rates) == {("product", "float32"), ("factorization", "float64"), ("memory", "")}
    assert min(speed.rates.values()) > 1e8
    assert speed.busy > 0.9


def test_peaks_never_fall(tmp_path):
    peaks = [x.peak for x in plan_of(tmp_path, "method=adasvd").estimates]
    assert peaks == sorted(peaks)
    assert peaks[0] > 0


def test_measured_stands_beside_estimated(tmp_path):
    typed = ("method=svd_llm", "save=false")
    first = compose_run(tmp_path, *typed)
    request = asked(tmp_path, *typed)
    found = record_of(request)
    assert found is not None
    assert found.key == first.key
    shown = plan(request)
    by_name = {x.stage.name: x for x in shown.estimates}
    assert by_name["compress"].measured_seconds == first.seconds["compress"]
    assert by_name["calibrate"].measured_peak == first.peak_memory_mib["calibrate"] * 2**20
    assert f"measured: record {first.key[:12]}" in text(shown)
    assert record_of(asked(tmp_path, "method=svd")) is None
    assert "measured:" not in text(plan_of(tmp_path, "method=svd"))


def test_times_of_other_work_are_no_comparison(tmp_path):
    compose_run(tmp_path, "method=svd_llm", "save=false")
    second = compose_run(tmp_path, "method=svd_llm", "ratio=cr60", "save=false")
    assert not any(x.startswith("statistics") for x in second.cache["misses"])
    shown = plan(asked(tmp_path, "method=svd_llm", "ratio=cr60", "benchmark=wikitext2"))
    by_name = {x.stage.name: x for x in shown.estimates}
    assert by_name["calibrate"].measured_seconds is None, "read from the cache"
    assert by_name["evaluate"].measured_seconds is None, "other benchmarks"


# --- the command


def test_a_plan_touches_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a plan needs none of this")

    for owner, name in ((PyDocs, "text"), (PyDocs, "describe"), (Source, "tokenizer"), (RandomModel, "tokenizer"), (RandomModel, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert run(compose_config(tmp_path, "plan=true", "method=specomp", "quantizer=none")) is None
    shown = capsys.readouterr().out
    assert "plan: tiny_llama, specomp, compression 40%" in shown
    assert "~" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_every_method_has_a_plan(tmp_path, method):
    shown = text(plan_of(tmp_path, f"method={method}"))
    assert shown.startswith(f"plan: tiny_llama, {method}, compression")
    assert "self_attn.q_proj" in shown


@pytest.mark.parametrize("model", ["llama2_70b", "llama2_7b"])
def test_a_hub_model_needs_no_hub(tmp_path, model):
    """With the committed shape; 70B as well as 7B."""
    cfg = compose_config(tmp_path, f"model={model}", "calibration=wikitext2", "benchmark=wikitext2", "method=adasvd", "paths.data=/none")
    cfg.model = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    seen = outlook(ask(cfg))
    assert seen.shape.size.model_params == PUBLISHED[model]
    shown = text(Plan(outlook=seen, speed=FLAT, estimates=estimates(seen, FLAT, torch.device("cpu"), 0.0, None), record=None))
    assert "downloading the weights" in shown
    assert "about" in shown


def test_a_sweep_prints_a_plan_a_job_and_runs_none(tmp_path, capsys):
    for method in ("svd", "asvd"):
        run(compose_config(tmp_path, "plan=true", f"method={method}"))
    shown = capsys.readouterr().out
    assert shown.count("plan: tiny_llama") == 2
    assert not store(tmp_path).folder.exists()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (119, "119.0 s"), (600, "10.0 min"), (36000, "10.0 h"), (864000, "10.0 days")]
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
