"""Model folders: what determines the weights, what is refused before they are read, and what the
person is told.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, tiny_model, tiny_tokenizer

from specomp.cache import Cache
from specomp.errors import UserError
from specomp.forms.factors import LowRankLinear
from specomp.models import files
from specomp.models.families import family_of
from specomp.models.modules import replace_linear
from specomp.models.save import save_compressed
from specomp.models.sources import LocalModel

PLACE = {"device": "cpu", "device_map": None}


def local(path, dtype="float32", **changes):
    return LocalModel(
        **{
            "name": "m",
            "path": str(path),
            "dtype": dtype,
            "trust_remote_code": False,
            **PLACE,
            **changes,
        }
    )


@pytest.fixture
def folder(tmp_path):
    """An ordinary model folder, in two shards."""
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(path)
    return path


def message(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_folder_loads_with_its_tokenizer_family_dtype_and_context(folder, cache):
    source = local(folder, "bfloat16")
    loaded = source.load(cache)
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
    assert loaded.family is family_of(loaded.model.config)
    assert loaded.tokenizer.decode(loaded.tokenizer("naïve")["input_ids"]) == "naïve"
    assert source.max_length(cache) == CONTEXT
    assert torch.equal(loaded.model.lm_head.weight, tiny_model("llama").lm_head.weight.bfloat16())


def test_context_and_fingerprint_need_no_weights(folder, cache, no_weights_read):
    local(folder).max_length(cache)
    local(folder).fingerprint(cache)


def test_fingerprint_is_the_content_not_the_place(folder, cache, tmp_path):
    first = local(folder).fingerprint(cache)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert local(copy).fingerprint(cache) == first
    assert str(tmp_path) not in json.dumps(first)
    assert local(folder, "bfloat16").fingerprint(cache) != first
    shard = sorted(copy.glob("*.safetensors"))[0]
    state = load_file(shard)
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, shard, metadata={"format": "pt"})
    assert local(copy).fingerprint(cache) != first


def test_a_large_file_is_hashed_once(folder, cache, monkeypatch):
    first = local(folder).fingerprint(cache)

    def refuse(*args):
        raise AssertionError("hashed again")

    monkeypatch.setattr(files.hashlib, "file_digest", refuse)
    assert local(folder).fingerprint(Cache(cache.root)) == first
    os.utime(folder / "config.json", ns=(1, 1))
    with pytest.raises(AssertionError, match="hashed again"):
        local(folder).fingerprint(cache)


def test_missing_folder_and_missing_config(tmp_path, cache):
    with pytest.raises(UserError, match="does not exist") as error:
        local(tmp_path / "nowhere").load(cache)
    assert "model.path" in message(error)
    with pytest.raises(UserError, match=r"no config\.json"):
        local(tmp_path).load(cache)


def test_pickled_weights_are_refused(folder, cache, no_weights_read):
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        local(folder).load(cache)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled") as error:
        local(folder).load(cache)
    assert "pytorch_model.bin" in message(error)


def test_a_missing_shard_is_named(folder, cache, no_weights_read):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name) as error:
        local(folder).load(cache)
    assert "lacks 1 of" in message(error)


@pytest.mark.parametrize("keep", [0, 4, 60, -100])
def test_a_truncated_shard_is_named_with_its_sizes(folder, cache, no_weights_read, keep):
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:keep])
    with pytest.raises(UserError, match="damaged or truncated") as error:
        local(folder).load(cache)
    text = message(error)
    assert shard.name in text and f"{len(content[:keep])} bytes" in text
    if keep == -100:
        assert f"says {len(content)}" in text


def test_damaged_json(folder, cache, no_weights_read):
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        local(folder).load(cache)
    (folder / "model.safetensors.index.json").unlink()
    save_file({}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json cannot be read") as error:
        local(folder).load(cache)
    message(error)


def test_absent_weights_are_refused_never_random(tmp_path, cache):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*layers\.0\.mlp\.up_proj"):
        local(tmp_path / "m").load(cache)


def test_weights_of_another_shape_are_refused(folder, cache):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    said = r"do not fit its config\.json: model\.layers\.0\.mlp\.\w+\.weight is \(\d+, \d+\), exp"
    with pytest.raises(UserError, match=said) as error:
        local(folder).load(cache)
    message(error)


def test_no_tokenizer(folder, cache, no_weights_read):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no usable tokenizer") as error:
        local(folder).load(cache)
    message(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: gemma2, llama"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
    ],
)
def test_unsupported_models_are_refused_before_the_weights(
    folder, cache, no_weights_read, change, expected
):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=expected) as error:
        local(folder).load(cache)
    message(error)


def test_a_compressed_folder_is_no_input_for_compression(tmp_path, cache, request):
    model = tiny_model("llama")
    replace_linear(model, "model.layers.0.mlp.up_proj", LowRankLinear(32, 88, 4, bias=False))
    save_compressed(model, tiny_tokenizer(), tmp_path / "small", form="factors", info={})
    request.getfixturevalue("no_weights_read")
    with pytest.raises(UserError, match=r"compressed already .*specomp\.load") as error:
        local(tmp_path / "small").load(cache)
    message(error)


def test_devices_that_are_not_there(folder, cache):
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"cuda:99 is not on this machine \\({count} CUDA devices"):
        local(folder, device="cuda:99").load(cache)
    with pytest.raises(UserError, match="contradict"):
        local(folder, device="cpu", device_map="auto").load(cache)


def test_device_map_auto(folder, cache):
    model = local(folder, device="auto", device_map="auto").load(cache).model
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert {parameter.device.type for parameter in model.parameters()} == {expected}


def test_loading_says_nothing(folder, cache, capfd):
    local(folder).load(cache)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


# ---- which files the weights are


@pytest.fixture
def single(tmp_path):
    """An ordinary model folder, in one file."""
    path = tmp_path / "single"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def two_sets(folder):
    tiny_model("llama", seed=1).save_pretrained(folder / "other", max_shard_size="40KB")
    for path in (folder / "other").glob("model*"):
        path.rename(folder / path.name)


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def named_in_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    named = config | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(named))


def adapter(folder):
    settings = {"base_model_name_or_path": "another/model", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def twice(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    save_file({"lm_head.weight": state["lm_head.weight"] + 1}, folder / "b.safetensors")
    where = dict.fromkeys(state, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


def prefixed(folder):
    state = load_file(folder / "model.safetensors")
    save_file(
        {f"_orig_mod.{name}": value for name, value in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def stored_as(dtype):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        state[name] = (state[name] * 10).to(dtype)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (two_sets, r"two sets of weights, model\.safetensors and the \d+ files that"),
        (outside, r"names files outside its folder \(\.\./elsewhere"),
        (named_in_config, r"names its weights itself \(transformers_weights=other"),
        (adapter, r"has adapter_config\.json, so transformers would load another model"),
        (twice, r"has lm_head\.weight twice, in a\.safetensors and b\.safetensors"),
        (stored_as(torch.int8), r"up_proj\.weight is stored as I8, which are not the weights"),
        (stored_as(torch.float8_e4m3fn), r"up_proj\.weight is stored as F8_E4M3"),
        (prefixed, r"there their names begin with '_orig_mod\.': save them without it"),
    ],
    ids=["two sets", "outside", "named", "adapter", "twice", "int8", "fp8", "prefixed"],
)
def test_weights_that_are_not_those_of_the_folder(single, cache, change, said, stream):
    """Refused before any work, by every way to open it, in one line."""
    change(single)
    source = local(single, stream=stream)
    with pytest.raises(UserError, match=said) as error:
        source.fingerprint(cache)
        source.load(cache)
    message(error)


def test_shards_in_sub_folders_count(single, cache):
    """In what is read, and in what the model is known by."""
    expected = local(single).load(cache).model
    (single / "part").mkdir()
    (single / "model.safetensors").rename(single / "part" / "all.safetensors")
    state = load_file(single / "part" / "all.safetensors")
    where = dict.fromkeys(state, "part/all.safetensors")
    (single / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    known = local(single).fingerprint(cache)["files"]
    assert known["part/all.safetensors"] and "model.safetensors" not in known
    for stream in (False, True):
        loaded = local(single, stream=stream).load(cache).model
        assert torch.equal(loaded.lm_head.weight, expected.lm_head.weight)
    save_file(
        {**state, "lm_head.weight": state["lm_head.weight"] + 1},
        single / "part" / "all.safetensors",
        metadata={"format": "pt"},
    )
    assert local(single).fingerprint(cache)["files"] != known


def test_other_bytes_of_the_same_size_and_time_are_another_model(single, cache):
    path = single / "model.safetensors"
    before, known = path.stat(), local(single).fingerprint(cache)
    state = load_file(path)
    save_file({k: v * 1.5 for k, v in state.items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert local(single).fingerprint(cache) != known


def test_all_files_are_hashed_again_where_that_is_asked(single, cache, monkeypatch):
    """For disks whose numbers and times say nothing."""
    known = local(single).fingerprint(cache)
    for memo in (cache.root / "hashes").iterdir():
        cache.save_json(f"hashes/{memo.name}", {"sha256": "0" * 64})
    assert local(single).fingerprint(cache) != known, "what is remembered is believed"
    monkeypatch.setenv("SPECOMP_REHASH", "1")
    files._hashed.clear()  # another process
    assert local(single).fingerprint(cache) == known


def test_code_that_runs_is_part_of_the_model(single, cache):
    (single / "modeling_own.py").write_text("x = 1")
    plain, trusted = (local(single, trust_remote_code=x).fingerprint(cache) for x in (False, True))
    assert "modeling_own.py" in trusted["files"] and "modeling_own.py" not in plain["files"]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sliding_windows_while_streaming(tmp_path, cache, name):
    """The masks of decoder layers that are not there yet have to be prepared."""
    model = tiny_model(name)
    config = model.config
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 4, 1
    config.layer_types = ["full_attention", "sliding_attention"]
    model = type(model)(config).eval()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        streamed = local(tmp_path / "m", stream=True).load(cache).model(input_ids=ids).logits
        assert torch.equal(streamed, model(input_ids=ids).logits)
        config.layer_types = ["full_attention", "full_attention"]
        assert not torch.allclose(type(model)(config).eval()(input_ids=ids).logits, streamed)


def test_attention_that_is_not_installed(single, cache):
    config = json.loads((single / "config.json").read_text())
    wanted = config | {"attn_implementation": "flash_attention_2"}
    (single / "config.json").write_text(json.dumps(wanted))
    with pytest.raises(UserError, match=r"cannot be opened \(.*[Ff]lash") as error:
        local(single).load(cache)
    message(error)


@pytest.mark.parametrize("how", ["null", "[]", "{", "\xff", "[" * 100_000, ""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_of_it(single, cache, name, how):
    (single / name).write_text(how, encoding="latin-1")
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        local(single).load(cache)
    message(error)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, "many", -1, 0, 10**30, [1], {"a": 1}, 1.5])
def test_fields_of_a_config_that_cannot_be(single, cache, field, value):
    """One line, whoever notices: the config, the model, or the weights that do not fit."""
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {field: value}))
    try:
        local(single).load(cache)
    except UserError as error:
        assert "\n" not in str(error)
