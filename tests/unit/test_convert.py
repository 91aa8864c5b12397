"""specomp convert: checkpoints in the layouts of SVD-LLM and ASVD, with random factors, in modules
of our own that call theirs as they do.
"""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from running import random_tokens
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import specomp
from specomp import cli
from specomp.errors import UserError
from specomp.models import convert as module
from specomp.models.families import family_of
from specomp.models.modules import replace_linear

TOKENS = random_tokens(2, 12)
RANK = 5


def svd_llm(name, linear):
    """What SVD-LLM has in the place of a linear: two by the side of it, in its parent. In OPT both
    have a bias.
    """
    biased = linear.bias is not None
    stem = name.rpartition(".")[2].removesuffix("_proj")
    return {
        f"{stem}_v_proj": nn.Linear(linear.in_features, RANK, bias=biased),
        f"{stem}_u_proj": nn.Linear(RANK, linear.out_features, bias=biased),
    }


class Called(nn.Module):
    """In the place of a linear, and calls two that its parent has."""

    def __init__(self, parent, first, second):
        super().__init__()
        self.called = lambda x: getattr(parent, second)(getattr(parent, first)(x))

    def forward(self, x):
        return self.called(x)


class TwoLinears(nn.Module):
    """ASVD's: the second one has the bias."""

    def __init__(self, linear):
        super().__init__()
        self.BLinear = nn.Linear(linear.in_features, RANK, bias=False)
        self.ALinear = nn.Linear(RANK, linear.out_features, bias=linear.bias is not None)

    def forward(self, x):
        return self.ALinear(self.BLinear(x))


def theirs(family, layout, *, dense=()):
    """A model in the layout of another library."""
    model = tiny_model(family)
    torch.manual_seed(1)
    for spec in family_of(model.config).linears(model):
        if spec.name in dense:
            continue
        parent, linear = spec.name.rpartition(".")[0], model.get_submodule(spec.name)
        if layout == "ASVD":
            replace_linear(model, spec.name, TwoLinears(linear))
            continue
        pair = svd_llm(spec.name, linear)
        for name, made in pair.items():
            setattr(model.get_submodule(parent), name, made)
        replace_linear(model, spec.name, Called(model.get_submodule(parent), *pair))
    return model.eval()


def state_of(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def base_of(family, folder):
    """The dense model's folder, as far as it is needed."""
    tiny_model(family).config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def check_same(folder, wanted):
    """By specomp.load and by transformers."""
    found = logits(specomp.load(folder).model)
    assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), found)


def info(folder):
    return json.loads((folder / "specomp.json").read_text())


@pytest.fixture(scope="module")
def llama():
    return theirs("llama", "SVD-LLM")


@pytest.fixture
def base(tmp_path):
    return base_of("llama", tmp_path / "base")


@pytest.fixture
def state(llama):
    return state_of(llama)


@pytest.fixture
def refused(tmp_path, base):
    """The line with which a state dict is refused; nothing is left behind."""

    def line(content, place="base"):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError) as told:
            specomp.convert(tmp_path / "x.pt", tmp_path / "out", base=tmp_path / place)
        assert not (tmp_path / "out").exists() and "\n" not in str(told.value)
        return str(told.value)

    return line


@pytest.mark.parametrize("layout", ["SVD-LLM", "ASVD"])
@pytest.mark.parametrize("family", ["llama", "llama_gqa", "mistral", "opt", "qwen2", "phi3"])
def test_the_logits_are_those_of_their_modules(tmp_path, family, layout):
    model, base = theirs(family, layout), base_of(family, tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    made = specomp.convert(tmp_path / "x.pt", tmp_path / "made", base=base)
    check_same(made, logits(model))
    assert info(made)["converted"]["format"] == layout
    kinds = {type(x).__name__ for x in specomp.load(made).model.modules()}
    assert "LowRankLinear" in kinds


def test_the_command_card_and_tokenizer(tmp_path, llama, base, state, capsys):
    save_file(state, tmp_path / "x.safetensors")
    typed = ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "made")]
    assert cli.run(typed) == 1
    assert capsys.readouterr().err.startswith("specomp: A file of weights does not say")
    assert cli.run([*typed, "--base", str(base)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'made'}\n"
    check_same(tmp_path / "made", logits(llama))
    assert specomp.load(tmp_path / "made").tokenizer("a").input_ids
    (found,) = info(tmp_path / "made")["converted"]["files"].items()
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert found[0] == "x.safetensors" and found[1] in card.text
    assert "a checkpoint of `SVD-LLM`, converted by specomp" in card.text
    assert "converted" in card.data.tags and "own-method" not in card.data.tags
    for word in ("Row:", "Budget:", "made smaller with specomp", "a method of its own"):
        assert word not in card.text


def test_layers_may_be_dense_and_names_wrapped(tmp_path, base):
    dense = {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    model = theirs("llama", "SVD-LLM", dense=dense)
    frequencies = {
        f"model.layers.{x}.self_attn.rotary_emb.inv_freq": model.model.rotary_emb.inv_freq.half()
        for x in range(3)
    }
    state = {f"module.{k}": v for k, v in {**state_of(model), **frequencies}.items()}
    torch.save({"model": state}, tmp_path / "x.pt")
    made = specomp.convert(tmp_path / "x.pt", tmp_path / "made", base=base)
    check_same(made, logits(model))
    (places,) = [json.loads((made / "config.json").read_text())["specomp_modules"]]
    assert not dense & set(places) and len(places) == 7 * 3 - 2


@pytest.mark.parametrize("files", ["one", "shards", "bins", "one .pt"])
@pytest.mark.parametrize("kind", ["llama", "svdllama", "opt"])
def test_a_folder_of_asvd_says_its_architecture_itself(tmp_path, kind, files):
    """None of its code is run: it is not even there."""
    family = "opt" if kind == "opt" else "llama"
    model = theirs(family, "ASVD")
    model.lm_head = TwoLinears(nn.Linear(32, model.config.vocab_size, bias=False)).eval()
    state = state_of(model)
    if family == "opt":  # transformers ties what stands there
        state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    name = "OPT" if family == "opt" else "Llama"
    config = model.config.to_dict() | {
        "model_type": kind,
        "architectures": [f"ASVD{name}ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": f"modeling_x.ASVD{name}ForCausalLM"},
        "truncation_ranks": {"lm_head": RANK},
    }
    folder = tmp_path / "asvd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    halves = [{x: state[x] for x in names[::2]}, {x: state[x] for x in names[1::2]}]
    if files == "one":
        save_file(state, folder / "model.safetensors")
    elif files == "shards":
        for index, half in enumerate(halves):
            save_file(half, folder / f"m{index}.safetensors")
        where = {x: f"m{index}.safetensors" for index, half in enumerate(halves) for x in half}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif files == "bins":
        for index, half in enumerate(halves):
            torch.save(half, folder / f"pytorch_model-{index}.bin")
        torch.save(object, folder / "training_args.bin")
    else:
        torch.save(state, folder / "weights.pt", _use_new_zipfile_serialization=False)
    made = specomp.convert(folder, tmp_path / "made")
    check_same(made, logits(model))
    assert info(made)["converted"]["multiplied_out"] == ["lm_head"]
    assert len(info(made)["converted"]["files"]) == (2 if files in ("shards", "bins") else 1)
    content = json.loads((made / "config.json").read_text())
    assert "truncation_ranks" not in content and content["tie_word_embeddings"] is False


def test_dtypes_are_kept_the_widest_of_several(tmp_path, base, state):
    half = {name: x.half() for name, x in state.items()}
    torch.save(half, tmp_path / "half.pt")
    made = specomp.convert(tmp_path / "half.pt", tmp_path / "made", base=base)
    name = "model.layers.0.self_attn.q_proj.u_proj.weight"
    stored = load_file(made / "model.safetensors")
    assert torch.equal(stored[name], half["model.layers.0.self_attn.q_u_proj.weight"])
    mixed = {name: x.half() if "embed" in name else x for name, x in state.items()}
    torch.save(mixed, tmp_path / "mixed.pt")
    made = specomp.convert(tmp_path / "mixed.pt", tmp_path / "mixed", base=base)
    assert {x.dtype for x in load_file(made / "model.safetensors").values()} == {torch.float32}
    made = specomp.convert(tmp_path / "mixed.pt", made, base=base, dtype="bfloat16")
    assert {x.dtype for x in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="dtype=int4"):
        specomp.convert(tmp_path / "mixed.pt", made, base=base, dtype="int4")


def test_a_head_that_is_not_the_embedding_any_more(tmp_path):
    model, base = theirs("llama_gqa", "SVD-LLM"), base_of("llama_gqa", tmp_path / "base")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    check_same(specomp.convert(tmp_path / "x.pt", tmp_path / "made", base=base), logits(model))


class Trap:
    """What a pickle may do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_modules_are_not_unpickled(tmp_path, base, refused, llama, zipped):
    """SVD-LLM's own saves."""
    trap = tmp_path / "sprung"
    for content in ({"model": nn.Linear(2, 2), "tokenizer": None}, Trap(trap), {"x": Trap(trap)}):
        torch.save(content, tmp_path / "y.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="state_dict") as told:
            specomp.convert(tmp_path / "y.pt", tmp_path / "out", base=base)
        assert "no code of a checkpoint is run" in str(told.value)
        assert "\n" not in str(told.value)
    assert not trap.exists() and not (tmp_path / "out").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(tmp_path / "y.pt", weights_only=False)
    assert trap.exists()  # the trap is one


def test_what_is_missing_left_over_or_of_another_size(state, refused):
    q = "model.layers.1.self_attn.q_{}_proj.weight"
    line = refused({k: v for k, v in state.items() if k != q.format("v")})
    assert "1 missing (model.layers.1.self_attn.q_proj.weight)" in line
    assert f"1 left over ({q.format('u')})" in line
    line = refused(state | {f"extra.{x}": torch.ones(2) for x in range(5)})
    assert "5 left over (extra.0, extra.1, extra.2 and 2 more)" in line
    line = refused(state | {"model.layers.1.self_attn.q_proj.weight": torch.ones(32, 32)})
    assert "1 left over (model.layers.1.self_attn.q_proj.weight" in line
    line = refused({k: v for k, v in state.items() if "norm" not in k})
    assert "7 missing (" in line and "and 4 more" in line
    for wrong in (torch.ones(6, 32), torch.ones(RANK, 31), torch.ones(RANK)):
        assert "1 of another shape (model.layers.1.self_attn.q_u_proj (32, 5) and" in refused(
            state | {q.format("v"): wrong}
        )
    line = refused(state | {"model.norm.weight": torch.ones(31)})
    assert "1 of another shape (model.norm.weight is (31,), expected (32,))" in line
    line = refused({k: v for k, v in state.items() if ".layers.2." not in k})
    assert "missing (model.layers.2." in line


def test_numbers_beyond_a_dtype_are_refused(tmp_path, base, state):
    torch.save(state | {"model.norm.weight": torch.full((32,), 1e6)}, tmp_path / "big.pt")
    with pytest.raises(UserError, match=r"model.norm.weight has numbers up to 1e\+06"):
        specomp.convert(tmp_path / "big.pt", tmp_path / "out", base=base, dtype="float16")
    assert specomp.convert(tmp_path / "big.pt", tmp_path / "out", base=base, dtype="bfloat16")


def test_nobody_is_told_to_run_a_pickle(tmp_path, base, recwarn):
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"a": [1]}))
    with pytest.raises(UserError, match="raw.pt is no file of weights, or is damaged") as caught:
        specomp.convert(tmp_path / "raw.pt", tmp_path / "out", base=base)
    assert "weights_only" not in str(caught.value) and not recwarn.list


def test_what_is_no_state_dict(tmp_path, base, state, refused):
    assert "3 is no name of a tensor" in refused({3: torch.ones(2)})
    assert "holds a list" in refused([1])
    assert "'step' is a int" in refused(state | {"step": 3})
    assert "torch.int8" in refused(state | {"x": torch.ones(2, dtype=torch.int8)})
    assert "no factored linear by a name that is known" in refused(tiny_model("llama").state_dict())
    assert "no factored linear" in refused({})
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(UserError, match=f"{name} is no file of weights, or is damaged"):
            specomp.convert(tmp_path / name, tmp_path / "out", base=base)
    torch.save(state, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        specomp.convert(tmp_path / "cut.pt", tmp_path / "out", base=base)


def test_other_frequencies_are_another_model(state, refused):
    """SVD-LLM's LLaMA takes no notice of rope_theta."""
    own = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
    line = refused(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": own})
    assert "other frequencies" in line and "rope_theta" in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "has no config.json"),
        ({"model_type": "mamba"}, "mamba .no architectures.*not supported"),
        ({"model_type": "x", "architectures": ["OtherForCausalLM"]}, "x .OtherForCausalLM"),
        ({"model_type": "specomp_llama"}, "not supported"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "is quantized"),
        ({"model_type": "llama", "hidden_size": "x"}, "cannot be used"),
        ({"model_type": "llama", "architectures": 3}, "does not fit"),
    ],
)
def test_a_base_that_is_none(tmp_path, state, refused, config, said):
    (tmp_path / "other").mkdir()
    if config is not None:
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    line = refused(state, place="other")
    with pytest.raises(UserError, match=said):
        raise UserError(line)


def test_a_base_that_is_nowhere(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    for base in ("org/there-is-none", str(tmp_path / "no")):
        with pytest.raises(UserError, match=f"base={base} is no folder here"):
            specomp.convert(tmp_path / "x.pt", tmp_path / "out", base=base)


def test_a_base_on_the_hub_is_named_with_its_commit(tmp_path, llama, state, monkeypatch):
    """Without a tokenizer that can be had the model is written all the same."""
    commit = base_of("llama", tmp_path / ("0" * 40))
    (commit / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (commit / "LICENSE").write_text("as it is")
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: str(commit))
    torch.save(state, tmp_path / "x.pt")
    made = specomp.convert(tmp_path / "x.pt", tmp_path / "made", base="org/llama")
    check_same(made, logits(llama))
    card = ModelCard.load(made / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/llama", "apache-2.0")
    assert "revision `" + "0" * 40 in card.text and (made / "LICENSE").is_file()
    assert specomp.load(made).tokenizer is None


def test_folders_that_are_none(tmp_path, base, state):
    with pytest.raises(UserError, match="does not exist"):
        specomp.convert(tmp_path / "no", tmp_path / "out", base=base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to load"):
        specomp.convert(tmp_path / "empty", tmp_path / "out", base=base)
    torch.save(state, tmp_path / "x.pt")
    made = specomp.convert(tmp_path / "x.pt", tmp_path / "made", base=base)
    with pytest.raises(UserError, match="is a folder of specomp already"):
        specomp.convert(made, tmp_path / "out", base=base)
    with pytest.raises(UserError, match="was not written by specomp"):
        specomp.convert(tmp_path / "x.pt", base, base=base)
    shutil.copyfile(made / "model.safetensors", tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="no factored linear"):
        specomp.convert(tmp_path / "own.safetensors", tmp_path / "out", base=base)
