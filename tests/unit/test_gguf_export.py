"""The file for llama.cpp holds the merged model: read back with transformers it gives every number
and id, and what it cannot hold is refused in a line.
"""

import json
import logging

import gguf
import pytest
import torch
import transformers
from running import compose_config, compose_run
from test_export import compress
from tiny import CONFIGS, tiny_model, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import specomp
from specomp.cache import Cache
from specomp.compression.ledger import measure
from specomp.errors import UserError
from specomp.experiment.pipeline import dense_ledger, run
from specomp.models import gguf_export
from specomp.models.files import GGUF
from specomp.models.gguf import GGUFFile
from specomp.models.gguf_export import context_length, rope_tensors, rounded
from specomp.models.gguf_tokens import REST, WORDS, pre_tokenizer, token_fields
from specomp.models.push import _card
from specomp.models.save import exporting, merged_state, refresh, substitutes

IDS = torch.arange(3, 18)[None]  # within the windows of the tiny models
KNOWN = [name for name in CONFIGS if name != "opt"]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def metadata(folder):
    fields = gguf.GGUFReader(folder / GGUF).fields
    return {name: field.contents() for name, field in fields.items()}


def tensors(folder):
    return {x.name: x for x in gguf.GGUFReader(folder / GGUF).tensors}


def changed(name, **fields):
    """A tiny model with other config fields."""
    architecture, config = CONFIGS[name]
    made = AutoConfig.for_model(architecture, **{"pad_token_id": None} | config | fields)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made).eval()


def merging_tokenizer(split=None, **options):
    """Bytes, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "he")]
    words = [*alphabet, *("".join(x) for x in merges)]
    backend = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options
    )


@pytest.mark.parametrize("form", ["gguf", "gguf_q8_0"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_file_gives_back_the_merged_model_as_its_type_rounds_it(tmp_path, name, form):
    model = compress(tiny_model(name), every=2)
    folder = specomp.save(model, tmp_path / "m", tiny_tokenizer(), form=form)
    loaded = specomp.load(folder)
    assert not substitutes(loaded.model) and loaded.model.dtype == torch.float32
    assert not list(folder.glob("*.safetensors*")) and not list(folder.glob("*.py"))
    dense = tiny_model(name)  # of the stock class, with the numbers that the file should have
    state = {key: rounded(value, form) for key, value in merged_state(model).items()}
    if name == "gemma2":  # its norms are stored with 1 added
        state |= {k: (v + 1) - 1 for k, v in state.items() if k.endswith("norm.weight")}
    dense.load_state_dict(state)
    torch.testing.assert_close(logits(loaded.model), logits(dense), atol=1e-6, rtol=1e-5)
    assert loaded.tokenizer("hello 12")["input_ids"] == tiny_tokenizer()("hello 12")["input_ids"]
    told = json.loads((folder / "specomp.json").read_text())
    assert told["form"] == form and told["gguf"]["type"] == ("F16" if form == "gguf" else "Q8_0")


def test_rows_that_do_not_divide_by_32_stay_float16(tmp_path, caplog):
    folder = specomp.save(tiny_model("llama"), tmp_path / "m", tiny_tokenizer(), form="gguf_q8_0")
    kinds = {name: x.tensor_type.name for name, x in tensors(folder).items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 88
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    told = json.loads((folder / "specomp.json").read_text())["gguf"]["left_f16"]
    assert told == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert "3 matrices are F16" in caplog.text
    assert metadata(folder)["general.file_type"] == 7


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama_gqa", True), ("qwen3", True)])
def test_a_tied_head_is_not_stored(tmp_path, name, tied):
    folder = specomp.save(tiny_model(name), tmp_path / "m", tiny_tokenizer(), form="gguf")
    assert ("output.weight" not in tensors(folder)) is tied
    assert specomp.load(folder).model.config.tie_word_embeddings is tied


def test_queries_and_keys_of_a_llama_are_interleaved(tmp_path):
    model = tiny_model("llama_gqa")
    folder = specomp.save(model, tmp_path / "m", tiny_tokenizer(), form="gguf")
    key = model.model.layers[0].self_attn.k_proj.weight.detach().half()  # two heads of 8
    stored = torch.from_numpy(tensors(folder)["blk.0.attn_k.weight"].data.copy())
    assert torch.equal(stored[:4], key[[0, 4, 1, 5]]) and torch.equal(stored[8], key[8])


def test_biases_of_a_llama(tmp_path):
    model = changed("llama", attention_bias=True, mlp_bias=True)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(value)
    folder = specomp.save(model, tmp_path / "m", tiny_tokenizer(), form="gguf")
    assert {"blk.0.attn_q.bias", "blk.2.ffn_down.bias"} <= tensors(folder).keys()
    torch.testing.assert_close(logits(specomp.load(folder).model), logits(model), atol=0.01, rtol=0)


def test_the_metadata(tmp_path):
    tokenizer = merging_tokenizer(chat_template="{{ messages }}")
    told = metadata(specomp.save(tiny_model("gemma2"), tmp_path / "m", tokenizer, form="gguf"))
    assert told["general.architecture"] == "gemma2" and told["general.file_type"] == 1
    wanted = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 32,
        "feed_forward_length": 88,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.sliding_window": 16,
        "attn_logit_softcapping": 50,
        "final_logit_softcapping": 30,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000,
        "vocab_size": 264,
    }
    assert {x: told[f"gemma2.{x}"] for x in wanted} == wanted
    assert told["tokenizer.ggml.model"] == "gpt2" and told["tokenizer.ggml.pre"] == "gpt-2"
    assert told["tokenizer.ggml.merges"] == ["h e", "l l", "he ll", "Ġ he"]
    assert told["tokenizer.ggml.token_type"] == [1] * 260 + [3, 3, 5, 5]
    assert told["tokenizer.ggml.tokens"][262:] == ["[PAD262]", "[PAD263]"]
    assert told["tokenizer.ggml.bos_token_id"] == 260
    assert told["tokenizer.ggml.add_bos_token"] is False
    assert told["tokenizer.chat_template"] == "{{ messages }}"


def test_a_mistral_is_a_llama_whose_context_is_the_window(tmp_path, caplog):
    folder = specomp.save(tiny_model("mistral"), tmp_path / "m", tiny_tokenizer(), form="gguf")
    assert metadata(folder)["llama.context_length"] == 16
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    assert "its context is the sliding window, 16 tokens" in caplog.text


def test_scaled_rotary_positions(tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = changed("llama", rope_parameters=llama3)
    folder = specomp.save(model, tmp_path / "m", tiny_tokenizer(), form="gguf")
    factors = torch.from_numpy(tensors(folder)["rope_freqs.weight"].data.copy())
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    again = specomp.load(folder).model
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = changed("qwen2", rope_parameters=linear)
    told = metadata(specomp.save(model, tmp_path / "l", tiny_tokenizer(), form="gguf"))
    assert told["qwen2.rope.scaling.type"] == "linear" and told["qwen2.rope.scaling.factor"] == 2
    assert not rope_tensors(model.config)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("opt", {}, "models of type 'opt'"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
        ("qwen3", {"attention_bias": True}, "biases in the attention of models of type 'qwen3'"),
        ("gemma2", {"query_pre_attn_scalar": 9}, "query_pre_attn_scalar=9 (it takes 8)"),
        ("gemma2", {"final_logit_softcapping": None}, "without soft caps"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "slide every second time"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=dynamic",
        ),
    ],
)
def test_what_the_file_cannot_hold_is_refused(tmp_path, name, fields, said):
    with pytest.raises(UserError, match="use export=dense") as told:
        specomp.save(changed(name, **fields), tmp_path / "m", tiny_tokenizer(), form="gguf")
    assert said in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "m").exists()


def test_numbers_and_vocabularies_out_of_range_are_refused(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="numbers up to 1e\\+05 of model.layers.1.mlp.up_proj"):
        specomp.save(model, tmp_path / "m", tiny_tokenizer(), form="gguf")
    with pytest.raises(UserError, match="259 tokens where the embedding has 100 rows"):
        token_fields(tiny_tokenizer(), 100)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        specomp.save(tiny_model("llama"), tmp_path / "m", form="gguf")


def test_a_file_that_gives_back_something_else_is_refused(tmp_path, monkeypatch):
    """Rows in the order of transformers, which llama.cpp would read as another model."""
    monkeypatch.setattr(gguf_export, "laid_out", lambda tensor, *_: tensor.detach().float())
    with pytest.raises(UserError, match="is not saved: read back from model.gguf, 6 of 30 weights"):
        specomp.save(tiny_model("llama"), tmp_path / "m", tiny_tokenizer(), form="gguf")
    assert not (tmp_path / "m").exists()


def test_saving_again_replaces_and_damage_is_found(tmp_path):
    folder = specomp.save(tiny_model("llama"), tmp_path / "m", tiny_tokenizer(), form="dense")
    specomp.save(tiny_model("llama"), folder, tiny_tokenizer(), form="gguf")
    assert not list(folder.glob("*.safetensors"))
    with pytest.raises(UserError, match="cannot be streamed"):
        specomp.load(folder, stream=True)
    with (folder / GGUF).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    with pytest.raises(UserError, match="is not what it was"):
        specomp.load(folder)


def test_another_chat_template_asks_for_another_file(tmp_path):
    folder = specomp.save(tiny_model("llama"), tmp_path / "m", tiny_tokenizer(), form="gguf")
    assert not refresh(folder, tiny_tokenizer(), None)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    before = {x.name: x.read_bytes() for x in folder.iterdir()}
    for _ in range(2):  # nothing was written that would hide it the second time
        with pytest.raises(UserError, match="holds what chat_template.jinja said"):
            refresh(folder, tokenizer, None)
    assert before == {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.mark.parametrize(
    ("layers", "said"), [(4, "lacks 9 weights"), (2, "has 3 decoder layers, config.json says 2")]
)
def test_a_config_of_other_layers_is_refused(tmp_path, layers, said):
    folder = specomp.save(tiny_model("llama"), tmp_path / "m", tiny_tokenizer(), form="gguf")
    (folder / "checksums.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match=said):
        specomp.load(folder)


@pytest.mark.parametrize("form", ["gguf", "gguf_q8_0"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "model.norm"])
def test_numbers_that_a_file_cannot_hold(tmp_path, form, number, where):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(where).weight.view(-1)[3] = number
    if where == "model.norm" and number == 1e9:  # a vector is float32
        assert specomp.save(model, tmp_path / "m", form=form)
        return
    with pytest.raises(UserError, match=f"numbers up to .* of {where}.weight as "):
        specomp.save(model, tmp_path / "m", form=form)
    assert not (tmp_path / "m").exists()


def test_forms_and_dtypes_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="form=gguf_q4: there are factors, dense, gguf"):
        specomp.save(tiny_model("llama"), tmp_path / "m", form="gguf_q4")
    folder = specomp.save(tiny_model("llama"), tmp_path / "m", form="gguf")
    with pytest.raises(UserError, match="dtype=nope: there are float32"):
        specomp.load(folder, dtype="nope")


def test_the_card_says_how_it_is_opened(tmp_path):
    folder = specomp.save(tiny_model("llama"), tmp_path / "m", tiny_tokenizer(), form="gguf")
    text = (folder / "README.md").read_text()
    assert 'gguf_file="model.gguf", config=config)' in text and "llama-cli -m model.gguf" in text
    assert "vllm" not in text
    assert 'AutoConfig.from_pretrained("a/b")' in _card(folder, "a/b")


def test_how_texts_are_split_is_recognised():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def by(pattern):
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level])

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    qwen = transformers.Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    found = [
        pre_tokenizer(qwen.backend_tokenizer),
        *(
            pre_tokenizer(merging_tokenizer(x).backend_tokenizer)
            for x in (by(WORDS + "{1,3}" + REST), digits, words, byte_level)
        ),
    ]
    assert found == ["qwen2", "llama-bpe", "smollm", "gpt-2", "default"]


def test_a_tokenizer_like_sentencepiece():
    """Its merges become scores, best first; the llama.cpp kinds of its tokens."""
    words = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    tokenizer = transformers.LlamaTokenizer(
        vocab={x: i for i, x in enumerate(words)}, merges=merges
    )
    tokenizer.add_bos_token = True
    told = token_fields(tokenizer, 12)
    assert told["ggml.model"] == "llama" and "ggml.merges" not in told
    assert told["ggml.token_type"] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 5, 5]
    assert told["ggml.scores"][7:10] == [0.0, -1.0, -2.0] and told["ggml.scores"][5] < -1e5
    assert told["ggml.add_space_prefix"] is True


def test_layers_that_come_one_by_one_are_refused(tmp_path):
    model = tiny_model("llama")
    with (
        pytest.raises(UserError, match="in memory as a whole"),
        exporting(tmp_path / "m", "gguf", model) as export,
    ):
        export.add(0)
    with pytest.raises(UserError, match="model.stream=true: export=gguf"):
        folder = specomp.save(model, tmp_path / "dense", tiny_tokenizer(), form="dense")
        local = ("model=local", f"model.path={folder}", "model.stream=true", "export=gguf")
        run(compose_config(tmp_path, *local))


def test_a_run_writes_it_and_measures_later(tmp_path, caplog):
    record = compose_run(tmp_path, "export=gguf", "method=svd")
    folder = tmp_path / "outputs" / "models"
    (made,) = folder.iterdir()
    assert made.name.endswith("-gguf") and (made / GGUF).is_file()
    assert record.model_folder == str(made)
    with caplog.at_level(logging.INFO):
        compose_run(tmp_path, "export=gguf", "method=svd")
        assert "is complete" in caplog.text
        later = compose_run(tmp_path, "export=gguf", "method=svd", "benchmark.window=16")
    assert "compressing again to measure" in caplog.text
    assert len(later.metrics) == 2 and later.key == record.key


def test_a_run_that_cannot_is_refused_before_work(tmp_path):
    with pytest.raises(UserError, match="one size for all MLPs"):
        run(compose_config(tmp_path, "export=gguf", "method=svd_llm", "method/units=cut"))


def test_the_context_of_a_window_that_is_off():
    config = CONFIGS["qwen2"][1] | {"use_sliding_window": False, "sliding_window": 16}
    assert context_length(transformers.Qwen2Config(**config)) == 256


def own_file(path):
    return GGUFFile(
        name="own", path=str(path), dtype="float32", device="cpu", device_map=None, stream=False
    )


def test_a_file_of_ones_own_is_a_model_whose_bits_are_counted(tmp_path):
    model = tiny_model("llama")
    folder = specomp.save(model, tmp_path / "m", tiny_tokenizer(), form="gguf_q8_0")
    loaded = own_file(folder / GGUF).load(Cache(tmp_path / "cache"))
    state = {key: rounded(value, "gguf_q8_0") for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(logits(loaded.model), logits(model), atol=1e-6, rtol=1e-5)
    # what a row divides into blocks of 32 has 8.5 bits; a row that does not falls back to 16
    linears = loaded.family.linears(loaded.model)
    bits, file_bytes = loaded.stored
    assert bits == sum(x.params * (8.5 if x.n % 32 == 0 else 16) for x in linears)
    found = dense_ledger(measure(loaded.model, linears), loaded)
    assert found.measured_bits == bits / sum(x.params for x in linears)
    whole = (folder / GGUF).stat().st_size
    assert bits / 8 < found.compressed.model_bytes == file_bytes < whole
    assert found.dense.linear_bits == 32 * found.dense.linear_params


@pytest.mark.parametrize("content, said", [(None, "is no file"), (b"PK34", "is no GGUF file")])
def test_what_is_no_such_file_is_one_line(tmp_path, content, said):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        own_file(path).fingerprint(Cache(tmp_path / "cache"))
