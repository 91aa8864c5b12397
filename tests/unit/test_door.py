"""What leaves: a folder is opened again before it gets its name, in the class that it names and in
a process without specomp; saved models stay models.
"""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

import specomp
from specomp.cache import Cache
from specomp.errors import UserError
from specomp.forms.factors import LowRankLinear
from specomp.models import door, identity
from specomp.models.beside import write_beside
from specomp.models.identity import for_all_versions
from specomp.models.save import save_compressed

IDS = torch.arange(30)[None]


def compressed(name="llama", **options):
    model = tiny_model(name)
    tokens = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    specomp.compress(model, tokens, method="svd_llm", ratio=0.4, **options)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_a_weight_without_a_place_is_refused(tmp_path, monkeypatch, form):
    """As of a family whose stock class calls a module otherwise."""
    saved = door.open_streamed

    def renamed(*args, **options):
        model, store = saved(*args, **options)
        store.files.stored.add("model.another_head.weight")
        return model, store

    monkeypatch.setattr(door, "open_streamed", renamed)
    with pytest.raises(UserError, match=r"1 weights would find no place in .*another_head"):
        save_compressed(compressed(), None, tmp_path / "m", form=form, info={})
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_other_logits_are_refused(tmp_path, monkeypatch, form):
    model = compressed()
    wrong = torch.zeros_like(model.lm_head.weight)
    opened = door.open_streamed

    def other(*args, **options):
        model, store = opened(*args, **options)
        model.lm_head.weight = torch.nn.Parameter(wrong)
        return model, store

    monkeypatch.setattr(door, "open_streamed", other)
    with pytest.raises(UserError, match=r"logits that differ by 1 of their size"):
        save_compressed(model, None, tmp_path / "m", form=form, info={})
    assert not list(tmp_path.iterdir())


def test_missing_weights_are_refused(tmp_path, monkeypatch):
    model = compressed()
    stored = specomp.models.save.stored_state

    def without(module, form):
        state = stored(module, form)
        del state["model.layers.1.input_layernorm.weight"]
        return state

    monkeypatch.setattr("specomp.models.save.stored_state", without)
    with pytest.raises(UserError, match=r"is not saved, .* lacks 1 weights .*input_layernorm"):
        save_compressed(model, None, tmp_path / "m", form="factors", info={})


def test_a_process_without_specomp_is_asked_once(tmp_path, monkeypatch, cache):
    """Once for a kind of folder: the next one of the kind is not opened so again."""
    monkeypatch.setenv(door.SWITCH, "1")
    calls = []

    def asked(typed, **options):
        calls.append(typed)
        return subprocess.run(typed, **options)

    monkeypatch.setattr(door, "subprocess", type("S", (), {"run": staticmethod(asked)}))
    for name in ("one", "two"):
        save_compressed(
            compressed(), None, tmp_path / name, form="factors", info={}, cache=Cache(cache.root)
        )
    assert len(calls) == 1
    assert len(list((cache.root / "doors").iterdir())) == 1
    monkeypatch.setattr(door, "OPEN", "import sys; sys.exit('it does not open here')")
    with pytest.raises(UserError, match=r"not installed it does not open \(it does not open here"):
        save_compressed(compressed(), None, tmp_path / "x", form="dense", info={}, cache=cache)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "phi3", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"quantizer": "rtn_int4"}], ids=["factors", "int4"])
def test_first_layers_alone_in_a_process_without_specomp(
    tmp_path, monkeypatch, cache, name, options
):
    """As of a folder that is too large to be opened whole beside the model."""
    monkeypatch.setenv(door.SWITCH, "1")
    monkeypatch.setattr(door, "LARGE", 0)
    for form in ("factors", "dense"):
        save_compressed(
            compressed(name, **options), None, tmp_path / form, form=form, info={}, cache=cache
        )
    assert len(list((cache.root / "doors").iterdir())) == 2


@pytest.mark.parametrize("loaded", [False, True], ids=["compressed", "loaded"])
def test_saved_by_transformers_it_stays_a_compressed_model(tmp_path, loaded):
    model = compressed()
    wanted = logits(model)
    if loaded:
        specomp.save(model, tmp_path / "first")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    names = [path.name for path in (tmp_path / "again").glob("*.safetensors")]
    assert len(names) > 1 and (tmp_path / "again" / "modeling_specomp_llama.py").is_file()
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
        specomp.load(tmp_path / "again").model,
    ):
        assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("loaded", [False, True], ids=["compressed", "loaded"])
def test_it_behaves_as_any_module(tmp_path, loaded):
    model = compressed("opt")
    if loaded:
        specomp.save(model, tmp_path / "first")
        model = specomp.load(tmp_path / "first").model
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(logits(torch.load(tmp_path / "whole.pt", weights_only=False)), wanted)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), wanted)
    assert torch.equal(logits(model.to(torch.float64).to(torch.float32)), wanted)
    state = tmp_path / "pickled"
    state.write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; m = pickle.load(open(sys.argv[1], 'rb'));"
        "print(type(m).__name__, m.eval()(input_ids=torch.arange(30)[None]).logits.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, state], capture_output=True, text=True, check=True
    )
    name, total = done.stdout.split()
    assert name == "SpecompOPTForCausalLM"
    assert float(total) == pytest.approx(float(wanted.sum()), rel=1e-4)


def test_rope_and_dtype_are_said_in_the_words_of_both_versions():
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    config = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, **llama3}}
    found = for_all_versions(config | {"attn_implementation": "flash_attention_2"})
    assert found == config | {
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": llama3,
    }
    plain = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert for_all_versions(plain) == plain | {"rope_theta": 1e4, "rope_scaling": None}
    part = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert for_all_versions({"rope_parameters": part})["partial_rotary_factor"] == 0.5
    # one for each kind of layer has no words in version 4
    kinds = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    assert for_all_versions(kinds) == kinds


def test_what_goes_with_the_source_model_follows_it(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    folder.mkdir()
    (source / "LICENSE").write_text("as you like")
    GenerationConfig(max_new_tokens=7).save_pretrained(source)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "OLD"
    first = write_beside(folder, tokenizer, source)
    assert {"LICENSE", "generation_config.json", "chat_template.jinja"} <= set(first)
    assert write_beside(folder, tokenizer, source) == []
    tokenizer.chat_template = "NEW"
    GenerationConfig(max_new_tokens=9).save_pretrained(source)
    changed = write_beside(folder, tokenizer, source)
    assert changed == ["chat_template.jinja", "generation_config.json"]
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 9
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_several_chat_templates_go_with_the_model(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "a {{ messages }}", "tool_use": "b"}
    specomp.save(compressed(), tmp_path / "m", tokenizer)
    again = specomp.load(tmp_path / "m").tokenizer
    assert again.chat_template == tokenizer.chat_template


def test_a_tokenizer_that_gives_other_ids_is_refused(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    other = tiny_tokenizer()
    other.add_tokens(["hello"])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(UserError, match="opened again its tokenizer makes .* of 'hello', not"):
        specomp.save(compressed(), tmp_path / "m", tiny_tokenizer())
    assert not (tmp_path / "m").exists()


def test_settings_that_transformers_5_reads_but_does_not_write(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"legacy": True, "add_bos_token": False, "add_eos_token": None}
    tmp_path.joinpath("m").mkdir()
    write_beside(tmp_path / "m", tokenizer, None)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["legacy"] is True and settings["add_bos_token"] is False


def test_saved_over_itself_it_is_whole(tmp_path):
    """As after fine-tuning, in one file and in shards."""
    specomp.save(compressed(), tmp_path / "m", tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for size in ("5GB", "40KB", "5GB"):
        model.lm_head.weight.data += 0.5
        wanted = logits(model)
        model.save_pretrained(tmp_path / "m", max_shard_size=size)
        assert torch.equal(logits(specomp.load(tmp_path / "m").model), wanted), size


def test_what_cannot_be_saved_is_one_line(tmp_path):
    specomp.save(compressed(), tmp_path / "m")
    streamed = specomp.load(tmp_path / "m", stream=True).model
    with pytest.raises(UserError, match="not in memory: load it without stream=True"):
        specomp.save(streamed, tmp_path / "x")
    specomp.save(tiny_model("llama"), tmp_path / "dense")
    dense = specomp.load(tmp_path / "dense", stream=True).model
    with pytest.raises(UserError, match="is not in memory: load the model without stream=True"):
        specomp.compress(dense, torch.zeros(2, 8, dtype=torch.int64), "svd")
    specomp.save(compressed("llama", quantizer="rtn_int4"), tmp_path / "int4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    with pytest.raises(UserError, match=r"open its folder with specomp\.load"):
        specomp.save(plain, tmp_path / "x")
    with pytest.raises(UserError, match="device=foo"):
        specomp.load(tmp_path / "m", device="foo")
    assert not (tmp_path / "x").exists()


def test_saving_through_a_link_and_modes_of_modules(tmp_path):
    model = compressed()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    model.train()
    model.model.norm.eval()
    specomp.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").exists()
    assert model.training and not model.model.norm.training


def test_another_rope_is_noticed_in_half_precision_too(tmp_path):
    model = compressed().to(torch.bfloat16)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 3.0}
    with pytest.raises(UserError, match="logits that differ"):
        specomp.save(model, tmp_path / "m")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model.lm_head.weight.data.zero_()
    specomp.save(model, tmp_path / "m")


def test_what_decides_no_number_may_be_edited(tmp_path):
    specomp.save(compressed(), tmp_path / "m", tiny_tokenizer())
    GenerationConfig(max_new_tokens=9).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("mine")
    assert specomp.load(tmp_path / "m").model.generation_config.max_new_tokens == 9
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    with pytest.raises(UserError, match=r"config\.json is not what it was"):
        specomp.load(tmp_path / "m")


def test_logits_of_another_shape_are_one_line():
    with pytest.raises(UserError, match=r"it gives other logits \(16, 7\)"):
        door.compare(torch.ones(16, 9), torch.ones(16, 7), 0.1, "it")


def test_engines_get_the_model_without_its_head(tiny_any, tmp_path):
    """They ask for AutoModel, and have a head of their own: after `import specomp` too."""
    tokens = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    row = specomp.method("svd_llm", packing="pivoted")
    specomp.compress(tiny_any, tokens, method=row, ratio=0.2)
    specomp.save(tiny_any, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    inner = AutoModel.from_pretrained(tmp_path / "m").eval()
    assert type(inner).__name__ == config["auto_map"]["AutoModel"].partition(".")[2]
    with torch.no_grad():
        assert torch.equal(inner(IDS)[0], tiny_any.eval().base_model(IDS)[0])


def test_what_engines_would_load_wrongly_they_refuse(tmp_path, monkeypatch, cache, caplog):
    """A buffer that is made on the device of the parameters, which vLLM never fills: token 0 for
    ever, without a word.
    """
    monkeypatch.setenv(door.SWITCH, "1")
    source = identity.modelling_source

    def placed(*args):
        found = source(*args)
        right = "torch.arange(out_features, dtype=torch.int32)"
        assert right in found
        return found.replace(right, right[:-1] + ", device=device)")

    monkeypatch.setattr(identity, "modelling_source", placed)
    for name in ("one", "two"):  # the second is of a known kind
        caplog.clear()
        model = tiny_model("llama")
        tokens = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
        specomp.compress(model, tokens, specomp.method("svd_llm", packing="pivoted"), ratio=0.2)
        folder = tmp_path / name
        save_compressed(model, None, folder, form="factors", info={}, cache=Cache(cache.root))
        assert "buffers are never filled, such as layers.0.self_attn.q_proj.order" in caplog.text
        config = json.loads((folder / "config.json").read_text())
        assert sorted(config["auto_map"]) == ["AutoConfig", "AutoModelForCausalLM"]
        assert "Serving engines refuse it: " in (folder / "README.md").read_text()
        assert torch.equal(logits(specomp.load(folder).model), logits(model)), "and its seals hold"


def test_packed_integers_are_not_for_engines(tmp_path, caplog):
    """vLLM has no kernel for their blocks."""
    specomp.save(compressed(quantizer="rtn_int4"), tmp_path / "m")
    assert "AutoModel" not in json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"]
    assert "serving engines refuse it: its integers" in caplog.text
    specomp.load(tmp_path / "m")


def test_what_is_sharded_is_said_part_by_part(tmp_path):
    """Of two factors the side that the linear is split on; of pivot rows nothing can be."""
    specomp.save(compressed(), tmp_path / "m")
    inner = AutoModel.from_pretrained(tmp_path / "m")
    plan = inner.tp_plan
    assert plan["layers.*.self_attn.q_proj.u_proj"] == "colwise"
    assert plan["layers.*.self_attn.o_proj.v_proj"] == "rowwise"
    stock = LlamaModel(LlamaConfig(num_hidden_layers=1, vocab_size=10)).tp_plan
    assert {re.sub(r"_proj\.[uv]_proj$", "_proj", x) for x in plan} == set(stock)
    tokens = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    pivoted = tiny_model("llama")
    specomp.compress(pivoted, tokens, specomp.method("svd_llm", packing="pivoted"), ratio=0.2)
    specomp.save(pivoted, tmp_path / "p")
    assert AutoModel.from_pretrained(tmp_path / "p").tp_plan == {}


def test_decoder_layers_of_other_content_are_told_apart(tmp_path):
    """Engines look at one attention and rewrite all of its class; where some linears are dense, the
    plan goes layer by layer.
    """
    model = tiny_model("llama")
    linear = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = LowRankLinear.from_factors(
        torch.eye(len(linear.weight)), linear.weight, None, dtype=torch.float32, device="cpu"
    )
    specomp.save(model, tmp_path / "m")
    inner = AutoModel.from_pretrained(tmp_path / "m").eval()
    classes = [type(x.self_attn) for x in inner.layers]
    assert len(set(classes)) == 2 and classes[1] is not classes[0]
    assert all(issubclass(x, LlamaAttention) for x in classes)
    assert inner.tp_plan["layers.1.self_attn.o_proj.v_proj"] == "rowwise"
    assert inner.tp_plan["layers.0.self_attn.o_proj"] == "rowwise"
    with torch.no_grad():
        assert torch.equal(inner(IDS)[0], model.eval().model(IDS)[0])


def test_packed_integers_have_no_model_without_its_head(tmp_path):
    """Their names are those of the whole model: what reads them otherwise has random weights."""
    specomp.save(compressed(quantizer="rtn_int4"), tmp_path / "m")
    with pytest.raises(ValueError, match="open it by AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "m")


def test_a_model_without_its_head_is_not_saved_but_pickled(tmp_path):
    """Over its own folder it would take the head away."""
    model = compressed()
    linear = model.model.layers[1].self_attn.o_proj
    dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
    model.model.layers[1].self_attn.o_proj = dense  # so that attentions are told apart
    specomp.save(model, tmp_path / "m")
    inner = AutoModel.from_pretrained(tmp_path / "m").eval()
    with pytest.raises(UserError, match="SpecompLlamaModel has no head: save the model that Auto"):
        inner.save_pretrained(tmp_path / "m")
    specomp.load(tmp_path / "m")
    for again in (pickle.loads(pickle.dumps(inner)), copy.deepcopy(inner)):
        with torch.no_grad():
            assert torch.equal(again(IDS)[0], inner(IDS)[0])


def test_what_engines_refuse_they_refuse_when_saved_again(tmp_path):
    specomp.save(compressed(), tmp_path / "m")
    identity.hide_from_engines(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    again.save_pretrained(tmp_path / "again")
    assert "AutoModel" not in json.loads((tmp_path / "again/config.json").read_text())["auto_map"]


def test_another_code_of_the_same_class_is_asked_again(tmp_path, monkeypatch, cache):
    """A module of one's own may change under its name: what is remembered is of its code."""
    monkeypatch.setenv(door.SWITCH, "1")
    asked = []
    answers = {"engine": torch.zeros(1), "hidden": torch.zeros(1)}

    def answered(typed, **options):
        asked.append(typed)
        save_file({**answers, "logits": logits_at_the_door}, typed[-1])
        return subprocess.CompletedProcess(typed, 0, "", "")

    monkeypatch.setattr(door, "subprocess", type("S", (), {"run": staticmethod(answered)}))
    source = identity.modelling_source
    for comment, count in (("", 1), ("# changed", 2), ("# changed", 2)):
        monkeypatch.setattr(identity, "modelling_source", lambda *a, c=comment: source(*a) + c)
        model = compressed()
        logits_at_the_door = door.logits(model)
        save_compressed(model, None, tmp_path / "x", form="factors", info={}, cache=cache)
        assert len(asked) == count
