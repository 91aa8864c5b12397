"""Streamed models: decoder layers on disk give the folder, the statistics and the logits that a
model in memory gives.
"""

import gc
import json
import subprocess
import weakref

import pytest
import torch
from running import compose_config, compose_run, key_of, random_tokens, store, stored_record
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, tiny_model, tiny_tokenizer
from torch import nn

import specomp
from specomp import disk
from specomp.cache import Cache
from specomp.compression.calibrate import calibrate
from specomp.errors import UserError
from specomp.experiment.pipeline import build, load_dense, run, run_of
from specomp.experiment.record import Record, point_of
from specomp.models import hub
from specomp.models.load import LoadedModel
from specomp.models.save import Export
from specomp.models.sources import HubModel, LocalModel
from specomp.models.store import LayerStore, TensorFiles
from specomp.numerics.statistics import Fisher

IDS = random_tokens(3, 20)
METHODS = ("svd_llm", "adasvd")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every tiny model by name; made on demand, in several shards where `sharded`."""
    made = {}

    def folder(name, *, sharded=False, untied=False, base=False):
        key = (name, sharded, untied, base)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("-".join(map(str, key)))
            model = tiny_model(name)
            if untied:
                model.config.tie_word_embeddings = False
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
            saved = model.model if base else model
            saved.save_pretrained(made[key], max_shard_size="30KB" if sharded else "1GB")
            if base:
                config = json.loads((made[key] / "config.json").read_text())
                (made[key] / "config.json").write_text(
                    json.dumps(config | {"architectures": [type(model).__name__]})
                )
            tiny_tokenizer().save_pretrained(made[key])
        return made[key]

    return folder


def local(folder, *, stream, dtype="float32") -> LocalModel:
    return LocalModel(
        name="m",
        path=str(folder),
        dtype=dtype,
        device="cpu",
        device_map=None,
        trust_remote_code=False,
        stream=stream,
    )


def opened(folder, **options) -> LoadedModel:
    return local(folder, stream=True, **options).load(Cache("unused"))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def in_memory(model, layers) -> list[bool]:
    return [not any(p.is_meta for p in layer.parameters()) for layer in layers]


def overrides(folder, stream, *more):
    place = [
        "model=local",
        f"model.path={folder}",
        "model.dtype=float32",
        "model.device=cpu",
        f"model.stream={str(stream).lower()}",
    ]
    given = {x.partition("=")[0] for x in more}
    return [
        x for x in (*place, "benchmark=none", "reference=false") if x.partition("=")[0] not in given
    ] + list(more)


def both(tmp_path, folder, *more):
    """The same run with and without streaming, each with a cache of its own: (record, folder of the
    compressed model) of each.
    """
    found = []
    for stream in (False, True):
        where = tmp_path / ("streamed" if stream else "whole")
        record = compose_run(where, *overrides(folder, stream, *more))
        [made] = (where / "outputs" / "models").iterdir()
        found.append((record, made))
    return found


def tensors(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


# ---- the model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_streamed_model_is_the_model(folders, name, dtype):
    folder = folders(name)
    loaded = opened(folder, dtype=dtype)
    whole = local(folder, stream=False, dtype=dtype).load(Cache("unused"))
    layers = loaded.family.layers(loaded.model)
    assert not any(in_memory(loaded.model, layers))
    assert torch.equal(logits(loaded.model), logits(whole.model))
    assert not any(in_memory(loaded.model, layers)), "let go after the call"
    assert loaded.model.config.to_dict() == whole.model.config.to_dict()
    assert {n: (p.shape, p.dtype) for n, p in loaded.model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in whole.model.named_parameters()
    }
    around = {n: b for n, b in loaded.model.named_buffers() if not b.is_meta}
    assert around.keys() == dict(whole.model.named_buffers()).keys()
    assert all(torch.equal(b, whole.model.get_buffer(n)) for n, b in around.items())
    assert not loaded.model.training and not any(m.training for m in loaded.model.modules())
    assert loaded.family.linears(loaded.model) == whole.family.linears(whole.model)


@pytest.mark.parametrize("options", [{"sharded": True}, {"untied": True}, {"base": True}])
def test_ways_to_store_a_model(folders, options):
    folder = folders("llama_gqa", **options)
    assert len(list(folder.glob("*.safetensors"))) > (4 if "sharded" in options else 0)
    whole = local(folder, stream=False).load(Cache("unused")).model
    streamed = opened(folder).model
    tied = streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert tied == ("untied" not in options)
    assert torch.equal(logits(streamed), logits(whole))


def test_only_one_decoder_layer_is_in_memory_at_a_time(folders):
    loaded = opened(folders("llama"))
    layers = loaded.family.layers(loaded.model)
    seen = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(in_memory(loaded.model, layers)))
    logits(loaded.model)
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    with loaded.store.resident(1):
        kept = weakref.ref(layers[1].mlp.up_proj.weight)
        logits(loaded.model)
        assert kept() is layers[1].mlp.up_proj.weight, "not read again for a call"
        with loaded.store.resident(1):
            pass
        assert in_memory(loaded.model, layers) == [False, True, False]
    gc.collect()
    assert kept() is None


def test_a_decoder_layer_is_let_go_after_a_call_that_failed(folders):
    loaded = opened(folders("llama"))
    layers = loaded.family.layers(loaded.model)
    handle = layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(loaded.model)
    handle.remove()
    assert not any(in_memory(loaded.model, layers))
    assert torch.isfinite(logits(loaded.model)).all()


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_decoder_layer_that_could_not_be_read_is_read_again(folders, monkeypatch, by_hand):
    loaded = opened(folders("llama"))
    layers = loaded.family.layers(loaded.model)
    with monkeypatch.context() as patch:
        patch.setattr(TensorFiles, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            if by_hand:
                with loaded.store.resident(0):
                    raise AssertionError("unreachable")
            logits(loaded.model)
    assert not any(in_memory(loaded.model, layers))
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama")))
    assert not any(in_memory(loaded.model, layers))


def test_damaged_folders_are_refused_when_opened(folders, tmp_path):
    state = load_file(folders("llama") / "model.safetensors")
    for file in folders("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"

    def refusal(changed):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError) as error:
            opened(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"lacks 1 weights that its config.json asks for ({name})" in refusal(
        {k: v for k, v in state.items() if k != name}
    )
    assert f"{name} is (88, 31), expected (88, 32)" in refusal(
        state | {name: state[name][:, :31].contiguous()}
    )
    assert "lacks 1 weights" in refusal(
        {k: v for k, v in state.items() if k != "model.norm.weight"}
    )


def test_a_buffer_that_no_file_has_is_refused(folders, tmp_path):
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(2, 2))
    layer.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    save_file(
        {f"layers.0.{n}": torch.zeros(p.shape) for n, p in layer.named_parameters()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"layers\.0\.table: made by the model's code"):
        LayerStore([layer], "layers", "model", TensorFiles(tmp_path), torch.device("cpu"))


def test_a_streamed_model_of_the_hub(folders, cache, monkeypatch):
    folder, asked = folders("llama"), []

    def snapshot(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        assert "model*.safetensors" in allow_patterns and "*.json" in allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    place = {
        "dtype": "float32",
        "device": "cpu",
        "device_map": None,
        "trust_remote_code": False,
        "stream": True,
    }
    commit = "a" * 40
    source = HubModel(name="m", repo=str(folder), revision=commit, weights="safetensors", **place)
    assert source.unstreamable() is None
    assert torch.equal(logits(source.load(cache).model), logits(tiny_model("llama")))
    assert asked == [(str(folder), commit)]


def test_the_fingerprint_does_not_know_of_streaming(folders, cache):
    folder = folders("llama")
    assert local(folder, stream=True).fingerprint(cache) == local(folder, stream=False).fingerprint(
        cache
    )
    configs = [{"model": {"path": "x", "stream": stream}} for stream in (False, True)]
    assert point_of(configs[0]) == point_of(configs[1])


# ---- whole runs


def assert_same_run(whole, streamed, atol=1e-6, rtol=1e-5) -> None:
    (whole_record, whole_folder), (record, folder) = whole, streamed
    assert (
        record.key == whole_record.key
        and folder.name == whole_folder.name
        and record.points == whole_record.points
    )
    expected, found = tensors(whole_folder), tensors(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, atol=atol, rtol=rtol)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "specomp.json"):
        assert json.loads((folder / file).read_text()) == json.loads(
            (whole_folder / file).read_text()
        )
    others = [
        {p.name for p in x.iterdir() if not p.name.startswith("model")}
        for x in (folder, whole_folder)
    ]
    assert others[0] == others[1]
    counted, expected = record.counted, whole_record.counted
    assert (counted.dense, counted.compressed) == (expected.dense, expected.compressed)
    assert counted.norm_error == pytest.approx(expected.norm_error, rel=1e-4)
    assert record.notes == whole_record.notes


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_run_makes_the_same_folder(folders, tmp_path, name, method):
    runs = both(tmp_path, folders(name), f"method={method}", "ratio=cr40")
    assert_same_run(*runs)
    whole, streamed = (made for _, made in runs)
    assert torch.allclose(
        logits(specomp.load(streamed).model), logits(specomp.load(whole).model), atol=1e-5
    )
    assert torch.equal(
        logits(specomp.load(streamed, stream=True).model), logits(specomp.load(streamed).model)
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["method=svd_llm", "export=dense"],
        ["method=svd_llm", "method/packing=pivoted"],
        ["method=svd_llm", "calibration.upstream=compressed"],
        ["method=svd_llm", "calibration.precision=bfloat16"],
        ["method=svd_llm_update"],
        ["method=adasvd", "method/units=cut"],
        ["method=svd_llm", "method/units=cut", "quantizer=gptq_int4"],
        ["method=asvd", "quantizer=gptq_int4"],
        ["method=svd_llm", "method/allocation=global_loss"],
        [
            "method=adasvd",
            "method.compensation.stack_of_batch=off",
            "method.compensation.num_buckets=3",
        ],
        [
            "method=adasvd",
            "method.compensation.stack_of_batch=mean",
            "method.compensation.num_buckets=2",
        ],
    ],
    ids=" ".join,
)
def test_slots(folders, tmp_path, settings):
    if any("int4" in x for x in settings):
        pytest.importorskip("compressed_tensors")
    runs = both(tmp_path, folders("llama"), "ratio=cr40", *settings)
    assert_same_run(*runs, atol=1e-5, rtol=1e-4)
    whole, streamed = (made for _, made in runs)
    assert torch.allclose(
        logits(specomp.load(streamed).model), logits(specomp.load(whole).model), atol=1e-4
    )
    assert torch.equal(
        logits(specomp.load(streamed, stream=True).model), logits(specomp.load(streamed).model)
    )


@pytest.mark.parametrize("options", [{"sharded": True}, {"untied": True}, {"base": True}])
def test_runs_from_ways_to_store_a_model(folders, tmp_path, options):
    assert_same_run(
        *both(
            tmp_path,
            folders("llama_gqa", **options),
            "method=svd_llm",
            "ratio=cr40",
            "model.dtype=bfloat16",
        )
    )


def test_the_folder_is_an_ordinary_sharded_one(folders, tmp_path):
    _, (_, made) = both(tmp_path, folders("llama"), "method=svd_llm", "ratio=cr40")
    files = sorted(p.name for p in made.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)], (
        "one for every decoder layer, and one for the rest"
    )
    index = json.loads((made / "model.safetensors.index.json").read_text())
    state = tensors(made)
    assert index["weight_map"].keys() == state.keys()
    assert all(name in load_file(made / file) for name, file in index["weight_map"].items())
    assert index["metadata"] == {
        "total_parameters": sum(x.numel() for x in state.values()),
        "total_size": sum(x.nbytes for x in state.values()),
    }
    assert not [p for p in made.iterdir() if p.is_dir()], "nothing temporary"
    assert len({p.stat().st_mode for p in made.iterdir()}) == 1


def test_benchmarks_of_streamed_models(folders, tmp_path):
    found = []
    for stream in (False, True):
        measured = ["benchmark=tiny", "reference=true", "method=svd_llm", "ratio=cr40"]
        found.append(
            compose_run(tmp_path / str(stream), *overrides(folders("llama"), stream, *measured))
        )
    whole, streamed = found
    assert (
        streamed.metrics.keys() == whole.metrics.keys()
        and streamed.metrics
        and streamed.dense_metrics
    )
    for name in whole.metrics:
        assert streamed.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5)
        assert streamed.dense_metrics[name] == pytest.approx(whole.dense_metrics[name], rel=1e-5)


def test_a_benchmark_is_added_to_a_streamed_folder(folders, tmp_path):
    common = overrides(folders("llama"), True, "method=svd_llm", "ratio=cr40")
    first = compose_run(tmp_path, *common)
    later = compose_run(
        tmp_path,
        *overrides(folders("llama"), True, "method=svd_llm", "ratio=cr40", "benchmark=tiny"),
    )
    assert later.key == first.key and not first.metrics and later.metrics
    assert later.seconds["compress"] == first.seconds["compress"], "not compressed again"


def test_no_two_decoder_layers_are_ever_in_memory(folders, tmp_path, monkeypatch):
    most, brought, acquire = [], [], LayerStore._acquire

    def counting(self, index):
        acquire(self, index)
        brought.append(index) if self._users[index] == 1 else None
        most.append(sum(not any(p.is_meta for p in layer.parameters()) for layer in self.layers))

    monkeypatch.setattr(LayerStore, "_acquire", counting)
    compose_run(tmp_path, *overrides(folders("llama"), True, "method=adasvd", "ratio=cr40"))
    assert set(most) == {1}
    assert brought == [0, 1, 2] * 3, "once to calibrate, once to compress, once at the door"


def test_statistics_are_shared_with_runs_in_memory(folders, tmp_path):
    for stream in (True, False):
        method = "adasvd" if stream else "svd_llm"
        record = compose_run(
            tmp_path, *overrides(folders("llama"), stream, f"method={method}", "ratio=cr40")
        )
    assert (
        record.cache["hits"]["statistics/gram"] == 1
        and "statistics/gram" not in record.cache["misses"]
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(
    folders, tmp_path, monkeypatch, error
):
    common = overrides(folders("llama"), True, "method=adasvd", "ratio=cr40")
    expected = compose_run(tmp_path / "other", *common)
    add, models = Export.add, tmp_path / "outputs" / "models"

    def interrupted(self, index):
        add(self, index)
        if index == 1:
            assert len(list(models.iterdir())) == 1, "what is there is hidden"
            raise error

    cfg = compose_config(tmp_path, *common)
    with monkeypatch.context() as patch:
        patch.setattr(Export, "add", interrupted)
        with pytest.raises(error):
            run(cfg)
    assert not list(models.iterdir())
    name = next((tmp_path / "other" / "outputs" / "models").iterdir()).name
    dead = subprocess.Popen(["true"])
    dead.wait()
    (
        models / f".{name}.{disk._place()}-{dead.pid}-new{'0' * 12}.tmp"
    ).mkdir()  # of a process that was killed
    record = store(tmp_path).load(key_of(cfg))
    assert (
        record.status == ("running" if error is KeyboardInterrupt else "failed")
        and not record.ledger
    )
    run(cfg)
    record = stored_record(tmp_path, cfg)
    assert record.status == "ok"
    [made] = models.iterdir()
    [other] = (tmp_path / "other" / "outputs" / "models").iterdir()
    assert record.key == expected.key
    assert all(torch.equal(tensor, tensors(made)[name]) for name, tensor in tensors(other).items())


def test_an_older_folder_stays_until_the_new_one_is_whole(folders, tmp_path, monkeypatch):
    common = overrides(folders("llama"), True, "method=svd_llm", "ratio=cr40")
    compose_run(tmp_path, *common)
    [made] = (tmp_path / "outputs" / "models").iterdir()
    before = tensors(made)
    with monkeypatch.context() as patch:
        patch.setattr(Export, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compose_run(tmp_path, *common, "redo=true")
    assert all(torch.equal(tensor, tensors(made)[name]) for name, tensor in before.items())


# ---- what cannot be


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method=soco"], ["method=soco trains", "model.stream=false"]),
        (["method=fwsvd"], ["fisher_in", "gradients", "model.stream=false"]),
        (["method=two_sided"], ["gradients", "set model.stream=false."]),
        (["method=svd_llm", "quantizer=yaqa_int4"], ["or quantizer.output_damping=null"]),
        (
            ["method=svd_llm", "method/allocation=type_loss", "ratio=bits4"],
            ["gradients", "or quantizer.rule.output_damping=null"],
        ),
        (["method=svd_llm", "save=false"], ["save=true"]),
        (["method=svd_llm", "model.device=auto", "model.device_map=auto"], ["device_map"]),
        (["method=svd_llm", "benchmark=efficiency"], ["efficiency", "model.stream=false"]),
        (["method=asvd_strs"], ["model.stream=false", "method/allocation"]),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith("method") else "",
)
def test_refusals(folders, tmp_path, settings, words):
    with pytest.raises(UserError) as error:
        run(compose_config(tmp_path, *overrides(folders("llama"), True, "ratio=cr40", *settings)))
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_models_without_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="tiny_llama draws its weights in memory"):
        run(compose_config(tmp_path, "+model.stream=true"))
    with pytest.raises(UserError, match="pickles"):
        run(compose_config(tmp_path, "model=opt_125m", "model.stream=true"))


def test_statistics_of_gradients_are_refused_by_the_stage_too(folders, tmp_path):
    cfg = compose_config(
        tmp_path, *overrides(folders("llama"), True, "method=svd_llm", "ratio=cr40")
    )
    experiment = build(cfg)
    loaded = load_dense(experiment, Record(key="0" * 64))
    with pytest.raises(UserError, match="gradients need the whole model"):
        calibrate(run_of(experiment, loaded), {Fisher("in")})
