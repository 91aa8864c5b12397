"""A compressed folder reloads bit for bit: with specomp, without it, in every architecture; and
never as random weights.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from tiny import CONTEXT, VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from units import Known

import specomp
from specomp.errors import UserError
from specomp.forms.factors import Factors, LowRankLinear
from specomp.forms.pivoted import Pivoted, PivotedLinear
from specomp.models.families import family_of
from specomp.models.load import cast_weights
from specomp.models.modules import full_name, replace_linear
from specomp.models.registration import register
from specomp.models.save import save_compressed, substitutes
from specomp.numerics.factors import LowRankFactors

INFO = {"method": "svd", "ratio": 0.5, "record": "abc"}
IDS = torch.arange(3, 23)[None]
# import specomp -> ImportError, however it is installed
BLOCK_SPECOMP = "import sys; sys.modules['specomp'] = None\n"


def compress(model, *, every: int = 1, dtype: torch.dtype = torch.float32, pivoted: bool = False):
    """Truncate every `every`-th linear (a mix with dense ones for every > 1), with ranks that
    differ; pivoted: every second of those.
    """
    cast_weights(model, dtype)
    for index, spec in enumerate(family_of(model.config).linears(model)):
        if index % every == 0:
            linear = model.get_submodule(spec.name)
            U, s, Vt = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
            form = Pivoted(max_growth=1.5) if pivoted and index // every % 2 == 0 else Factors()
            evidence = Known(pair=LowRankFactors(U * s, Vt), own_bias=linear.bias, dtype=dtype)
            replace_linear(model, spec.name, form.module(spec, 4 + index % 5, evidence))
    return model


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.fixture
def export(tmp_path):
    """Saves a compressed model and says where."""

    def save(model, form="factors", folder="model"):
        save_compressed(model, tiny_tokenizer(), tmp_path / folder, form=form, info=INFO)
        return tmp_path / folder

    return save


@pytest.mark.parametrize(("every", "pivoted"), [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_reload_bit_for_bit_with_plain_transformers(
    tiny_any, export, dtype, every, pivoted
):
    model = compress(tiny_any, every=every, dtype=dtype, pivoted=pivoted)
    folder = export(model)
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert reloaded.dtype == dtype
    assert (logits(reloaded) - logits(model)).abs().max() == 0.0
    assert {
        name: (type(module), module.rank) for name, module in substitutes(reloaded).items()
    } == {name: (type(module), module.rank) for name, module in substitutes(model).items()}
    kinds = {LowRankLinear, PivotedLinear} if pivoted else {LowRankLinear}
    assert {type(module) for module in substitutes(reloaded).values()} == kinds
    tied = model.config.tie_word_embeddings
    assert (
        reloaded.get_output_embeddings().weight.data_ptr()
        == reloaded.get_input_embeddings().weight.data_ptr()
    ) is tied


@pytest.mark.parametrize("pivoted", [False, True])
def test_dense_form_equals_factors_and_is_an_ordinary_model(tiny_any, export, pivoted):
    base = tiny_any.config.model_type
    model = compress(tiny_any, every=2, pivoted=pivoted)
    folder = export(model, "dense")
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["model_type"] == base
        and "specomp_modules" not in config
        and "auto_map" not in config
    )
    assert not list(folder.glob("*.py"))
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not substitutes(reloaded)
    assert type(reloaded).__module__.startswith("transformers.")
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_reloaded_model_can_be_saved_again_in_both_forms(export, pivoted):
    model = compress(tiny_model("opt"), pivoted=pivoted)
    once = specomp.load(export(model)).model
    again = specomp.load(export(once, folder="again")).model
    assert (logits(again) - logits(model)).abs().max() == 0.0
    dense = specomp.load(export(once, "dense", folder="dense")).model
    assert dense.config.model_type == "opt"
    torch.testing.assert_close(logits(dense), logits(model), atol=1e-5, rtol=0)


def test_load_gives_model_tokenizer_and_family_in_the_asked_dtype(export):
    model = compress(tiny_model("qwen3"))
    loaded = specomp.load(export(model), dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
    assert loaded.family is family_of(model.config)
    assert loaded.tokenizer("Grüße\n")["input_ids"] == tiny_tokenizer()("Grüße\n")["input_ids"]
    assert (
        AutoTokenizer.from_pretrained(loaded.model.name_or_path).decode(
            tiny_tokenizer()("Grüße\n")["input_ids"]
        )
        == "Grüße\n"
    )


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(export, device_map):
    model = compress(tiny_model("llama_gqa"))
    reloaded = specomp.load(export(model), device_map=device_map).model
    torch.testing.assert_close(
        logits(reloaded, IDS.to(reloaded.device)).cpu(),
        logits(model),
        atol=0 if device_map == "cpu" else 1e-4,
        rtol=0,
    )


def test_training_mode_reload_has_gradients(export):
    reloaded = AutoModelForCausalLM.from_pretrained(export(compress(tiny_model("llama")))).train()
    reloaded(IDS, labels=IDS).loss.backward()
    assert all(module.u_proj.weight.grad is not None for module in substitutes(reloaded).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_with_cache_equals_without_and_padding_changes_nothing(tiny_any, export, dtype):
    loaded = specomp.load(export(compress(tiny_any, dtype=getattr(torch, dtype), pivoted=True)))
    model, tokenizer = loaded.model, loaded.tokenizer
    batch = tokenizer(["a cat", "the quick brown fox"], return_tensors="pt", padding=True)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": None,
    }
    cached = model.generate(**batch, **options, use_cache=True)
    assert cached.shape[1] == batch["input_ids"].shape[1] + 8
    if dtype == "float32":  # in bfloat16 rounding may break ties of a random model either way
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
        for row, text in enumerate(["a cat", "the quick brown fox"]):
            single = model.generate(**tokenizer(text, return_tensors="pt"), **options)
            assert torch.equal(single[0, -8:], cached[row, -8:])


def run_python(code, folder, tmp_path, **environment):
    """A fresh interpreter outside the repository, with its own place for transformers' copies of
    modelling files.
    """
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        cwd=tmp_path,
        env=clean
        | {
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.mark.parametrize(("name", "pivoted"), [("opt", False), ("phi3", False), ("opt", True)])
def test_loads_bit_for_bit_without_specomp_when_the_code_in_the_folder_is_trusted(
    export, tmp_path, name, pivoted
):
    model = compress(tiny_model(name), every=2, pivoted=pivoted)
    folder = export(model)
    torch.save(logits(model), tmp_path / "expected.pt")
    code = """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            logits = model(torch.arange(3, 23)[None]).logits
        print("difference", (logits - torch.load("expected.pt")).abs().max().item())
        model.save_pretrained("again")
        again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
        with torch.no_grad():
            print("again", (again(torch.arange(3, 23)[None]).logits - logits).abs().max().item())
    """
    done = run_python(BLOCK_SPECOMP + textwrap.dedent(code), folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "difference 0.0" in done.stdout and "again 0.0" in done.stdout


def test_without_specomp_and_without_trust_transformers_refuses(export, tmp_path):
    folder = export(compress(tiny_model("llama")))
    code = (
        "from transformers import AutoModelForCausalLM;"
        " AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('LOADED')"
    )
    done = run_python(BLOCK_SPECOMP + code, folder, tmp_path)
    assert done.returncode != 0 and "LOADED" not in done.stdout
    assert "trust_remote_code" in done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import specomp; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import specomp",
        # model code before the Auto classes
        "import specomp; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
    ],
)
def test_import_specomp_is_enough_in_any_order(export, tmp_path, first):
    folder = export(compress(tiny_model("llama")))
    root = os.path.dirname(os.path.dirname(specomp.__file__))
    code = (
        f"import sys; {first};"
        " print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = run_python(code, folder, tmp_path, PYTHONPATH=root)
    assert done.stdout.strip() == "SpecompLlamaForCausalLM", done.stderr


def test_import_specomp_does_not_import_torch(tmp_path):
    root = os.path.dirname(os.path.dirname(specomp.__file__))
    done = run_python(
        "import sys, specomp; print('torch' in sys.modules or 'transformers' in sys.modules)",
        "",
        tmp_path,
        PYTHONPATH=root,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_register_is_idempotent():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register()
    first = CONFIG_MAPPING["specomp_llama"]
    register()
    assert CONFIG_MAPPING["specomp_llama"] is first


def test_info_and_ranks_are_readable_json(export):
    model = compress(tiny_model("llama"), every=2)
    folder = export(model)
    assert json.loads((folder / "specomp.json").read_text()) == {
        "specomp": specomp.__version__,
        "form": "factors",
        **INFO,
    }
    config = json.loads((folder / "config.json").read_text())
    entries = {
        name: (kind, arguments["rank"])
        for name, (kind, arguments) in config["specomp_modules"].items()
    }
    assert entries == {
        name: (full_name(LowRankLinear), module.rank) for name, module in substitutes(model).items()
    }
    assert config["model_type"] == "specomp_llama"


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_folder_of_the_first_format_still_loads(export, name):
    """Which said by three lists which linears have a rank, pivots, and a bias that the architecture
    has not.
    """
    model = compress(tiny_model(name), every=2, pivoted=True)
    linears, low = family_of(model.config).linears(model), substitutes(model)
    plain = next(x.name for x in linears if x.name not in low)
    biased = [] if name == "opt" else [next(iter(low)), plain]
    for key in biased:
        module = low.get(key, model.get_submodule(key))
        owner = module.u_proj if isinstance(module, LowRankLinear) else module
        owner.bias = torch.nn.Parameter(torch.randn(module.out_features))
    folder = export(model)
    config = json.loads((folder / "config.json").read_text())
    found = config.pop("specomp_modules")
    assert set(found) == {*low, *biased}
    config["lowrank_ranks"] = {key: module.rank for key, module in low.items()}
    config["lowrank_pivoted"] = [key for key, x in low.items() if isinstance(x, PivotedLinear)]
    if biased:
        config["lowrank_biases"] = biased
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink()  # they had none
    reloaded = specomp.load(folder).model
    assert torch.equal(logits(reloaded), logits(model))
    export(reloaded, folder="again")
    again = folder.parent / "again"
    config = json.loads((again / "config.json").read_text())
    assert config["specomp_modules"] == found
    assert not [key for key in config if key.startswith("lowrank")]
    assert torch.equal(logits(specomp.load(again).model), logits(model))


def test_sharded_folders_reload(export, monkeypatch):
    monkeypatch.setattr("specomp.models.save.MAX_SHARD", "50KB")
    model = compress(tiny_model("llama"))
    folder = export(model)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (logits(specomp.load(folder).model) - logits(model)).abs().max() == 0.0


def test_factors_take_less_space_than_dense(export):
    model = compress(tiny_model("llama"))
    sizes = {
        form: (export(model, form, folder=form) / "model.safetensors").stat().st_size
        for form in ("factors", "dense")
    }
    assert sizes["factors"] < sizes["dense"]


def test_saving_leaves_the_model_as_it_was(export):
    model = compress(tiny_model("gemma2"), every=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    for form in ("factors", "dense"):
        export(model, form, folder=form)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.model_type == "gemma2"


def test_replaces_its_own_export_but_nothing_else(export, tmp_path):
    first, second = compress(tiny_model("llama")), compress(tiny_model("llama", seed=1))
    export(first)
    folder = export(second)
    assert (logits(specomp.load(folder).model) - logits(second)).abs().max() == 0.0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="not written by specomp"):
        export(first, folder="thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_full_disk_is_one_line_and_leaves_nothing(export, tmp_path, monkeypatch):
    model = compress(tiny_model("llama"))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left while writing"):
        export(model)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_factor_is_refused(export):
    from safetensors.torch import load_file, save_file

    folder = export(compress(tiny_model("llama")))
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.u_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors is not what it was when it"):
        specomp.load(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"lacks 1 weights .*up_proj\.u_proj"):
        specomp.load(folder)


def test_weights_on_disk_are_the_factors(export):
    folder = export(compress(tiny_model("llama")))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert (
        "model.layers.0.self_attn.q_proj.v_proj.weight" in names
        and "model.layers.0.self_attn.q_proj.weight" not in names
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_compiled_model_equals_eager(export):
    model = specomp.load(export(compress(tiny_model("llama")))).model
    compiled = torch.compile(model, backend="inductor")
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-5, rtol=0)


def test_static_cache_and_beams_run(export):
    model = specomp.load(export(compress(tiny_model("llama")))).model
    options = {"max_new_tokens": 4, "pad_token_id": VOCAB - 1}
    assert model.generate(IDS, num_beams=2, do_sample=False, **options).shape[1] <= IDS.shape[1] + 4
    greedy = model.generate(IDS, do_sample=False, **options)
    assert torch.equal(
        greedy, model.generate(IDS, do_sample=False, cache_implementation="static", **options)
    )
    assert model.config.max_position_embeddings == CONTEXT
