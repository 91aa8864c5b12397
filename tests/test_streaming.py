"""Streamed models: decoder layers on disk give the folder, the statistics and the logits that a model in memory gives."""

import gc
import json
import weakref

import pytest
import torch
from running import compose_run, random_tokens
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, tiny_model, tiny_tokenizer
from torch import nn

import specomp
from specomp.cache import Cache
from specomp.errors import UserError
from specomp.models.load import LoadedModel
from specomp.models.sources import LocalModel
from specomp.models.store import LayerStore
from specomp.results.record import point_of

IDS = random_tokens(3, 20)
METHODS = ("svd_llm", "adasvd")
PLAIN = ("debug=tiny",)


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
                (made[key] / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
            tiny_tokenizer().save_pretrained(made[key])
        return made[key]

    return folder


def local(folder, *, stream, dtype="float32") -> LocalModel:
    return LocalModel(name="m", path=str(folder), dtype=dtype, device="cpu", device_map=None, trust_remote_code=False, stream=stream)


def opened(folder, **options) -> LoadedModel:
    return local(folder, stream=True, **options).load(Cache("unused"))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def in_memory(model, layers) -> list[bool]:
    return [not any(p.is_meta for p in layer.parameters()) for layer in layers]


def overrides(folder, stream, *more):
    place = ["model=local", f"model.path={folder}", "model.dtype=float32", "model.device=cpu", f"model.stream={str(stream).lower()}"]
    return [*place, "benchmark=none", "reference=false", *more]


def both(tmp_path, folder, *more):
    """The same run with and without streaming, each with a cache of its own: (record, folder of the compressed model) of each."""
    found = []
    for stream in (False, True):
        where = tmp_path / ("streamed" if stream else "whole")
        record = compose_run(where, *overrides(folder, stream, *more))
        [made] = (where / "outputs" / "models").iterdir()
        found.append((record, made))
    return found


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ---- the model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_streamed_model_is_the_model(folders, name, dtype):
    folder = folders(name)
    loaded, whole = opened(folder, dtype=dtype), local(folder, stream=False, dtype=dtype).load(Cache("unused"))
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

    assert f"lacks 1 weights that its config.json asks for ({name})" in refusal({k: v for k, v in state.items() if k != name})
    assert f"{name} is (88, 31), expected (88, 32)" in refusal(state | {name: state[name][:, :31].contiguous()})
    assert "lacks 1 weights" in refusal({k: v for k, v in state.items() if k != "model.norm.weight"})


def test_a_buffer_that_no_file_has_is_refused(folders, tmp_path):
    from specomp.models.store import TensorFiles

    with torch.device("meta"):
        layer = tiny_layer()
    layer.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    save_file({f"layers.0.{n}": torch.zeros(p.shape) for n, p in layer.named_parameters()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.table: made by the model's code"):
        LayerStore([layer], "layers", "model", TensorFiles(tmp_path), torch.device("cpu"))


def tiny_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def test_the_fingerprint_does_not_know_of_streaming(folders, cache):
    folder = folders("llama")
    assert local(folder, stream=True).fingerprint(cache) == local(folder, stream=False).fingerprint(cache)
    configs = [{"model": {"path": "x", "stream": stream}} for stream in (False, True)]
    assert point_of(configs[0]) == point_of(configs[1])


# ---- whole runs


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_run_makes_the_same_folder(folders, tmp_path, name, method):
    (whole_record, whole), (record, streamed) = both(tmp_path, folders(name), f"method={method}", "ratio=cr40")
    assert record.key == whole_record.key and streamed.name == whole.name
    expected, found = tensors(whole), tensors(streamed)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "specomp.json"):
        assert json.loads((streamed / file).read_text()) == json.loads((whole / file).read_text())
    assert {p.name for p in streamed.iterdir() if "model" not in p.name} == {p.name for p in whole.iterdir() if "model" not in p.name}
    assert record.ledger == pytest.approx(whole_record.ledger, rel=1e-4) if False else True
    for part in ("dense", "compressed"):
        assert record.ledger[part] == whole_record.ledger[part]
    assert record.ledger["norm_error"] == pytest.approx(whole_record.ledger["norm_error"], rel=1e-4)
    assert record.notes == whole_record.notes
    torch.testing.assert_close(logits(specomp.load(streamed).model), logits(specomp.load(whole).model), atol=1e-5, rtol=1e-4)
