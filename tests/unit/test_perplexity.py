"""Perplexity against transformers' own loss; nothing is dropped; every message a user can see."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from specomp.errors import UserError
from specomp.evaluation import perplexity
from specomp.evaluation.perplexity import (
    Perplexity,
    TokenFilePerplexity,
    WindowLoss,
    cut_windows,
    summarize,
    window_nll,
)
from specomp.evaluation.suite import Suite

CONF = Path(__file__).parents[2] / "conf"
VOCABULARY = 128  # one token a character
TEXT = "Nothing is dropped; a window is a window. " * 12


class CharacterTokenizer:
    """Token = code point, as a tokenizer without special tokens."""

    def __call__(self, text: str, **_: Any) -> Any:
        return {"input_ids": [ord(character) for character in text]}


BOS = 1


class BosTokenizer(CharacterTokenizer):
    """The same, with BOS in front of every text, as LLaMA's and Gemma's."""

    bos_token_id: int | None = BOS

    def __init__(self, size: int = VOCABULARY) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [BOS, *ids] if add_special_tokens else ids}

    def get_vocab(self) -> dict[str, int]:
        return {chr(index): index for index in range(self.size)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return chr(index)


class FakeText:
    """A corpus in memory."""

    split, max_documents = "test", None

    def __init__(self, text: str) -> None:
        self.name, self._text = "fake", text

    def text(self) -> str:
        return self._text

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": hashlib.sha256(self._text.encode()).hexdigest()}


@pytest.fixture
def model() -> Iterator[LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    yield LlamaForCausalLM(config)


def make(text: str = TEXT, **changes: Any) -> Perplexity:
    return Perplexity(
        **(
            {
                "name": "fake",
                "version": 1,
                "corpus": FakeText(text),
                "window": 32,
                "max_windows": None,
                "batch_size": 1,
                "precision": "float32",
            }
            | changes
        )
    )


def test_equals_the_loss_of_transformers(model: LlamaForCausalLM) -> None:
    result = make()(model, CharacterTokenizer())
    ids = torch.tensor([ord(character) for character in TEXT])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        losses = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in windows])
    assert result["nll"] == pytest.approx(losses.double().mean().item(), rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(result["nll"]), rel=1e-12)
    assert result["ppl_finite"] == pytest.approx(result["ppl"], rel=1e-12)


def test_windows_are_the_quotient_and_the_remainder_is_dropped(model: LlamaForCausalLM) -> None:
    result = make()(model, CharacterTokenizer())
    assert len(TEXT) % 32
    assert (result["windows"], result["tokens"]) == (len(TEXT) // 32, len(TEXT) // 32 * 31)
    assert torch.equal(cut_windows(torch.arange(11), 3, None), torch.arange(9).view(3, 3))
    assert torch.equal(cut_windows(torch.arange(11), 3, 2), torch.arange(6).view(2, 3))


def test_batch_size_and_chunks_do_not_change_the_result(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(VOCABULARY, (7, 40))
    single = window_nll(model, windows, 1).per_window
    assert torch.allclose(window_nll(model, windows, 3).per_window, single, rtol=1e-6)
    monkeypatch.setattr(perplexity, "CHUNK", 16)  # 39 predictions: two whole chunks and a rest
    assert torch.allclose(window_nll(model, windows, 3).per_window, single, rtol=1e-6)


def test_products_in_bfloat16_are_named_in_the_id_and_change_little(
    model: LlamaForCausalLM,
) -> None:
    exact, rounded = make(), make(precision="bfloat16")
    assert (
        exact.id.split(":") == [(parts := rounded.id.split(":"))[0], parts[1], parts[3]]
        and parts[2] == "bf16"
    )
    nll, half = (x(model, CharacterTokenizer())["nll"] for x in (exact, rounded))
    assert half != nll and half == pytest.approx(nll, rel=1e-2)
    model.bfloat16()  # nothing left to choose
    assert make(precision="bfloat16")(model, CharacterTokenizer()) == make()(
        model, CharacterTokenizer()
    )


def test_the_mode_of_the_model_comes_back(model: LlamaForCausalLM) -> None:
    model.train()
    model.lm_head.eval()
    make(max_windows=1)(model, CharacterTokenizer())
    assert model.training and not model.lm_head.training


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_nan_is_reported(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    model.lm_head.weight.data[3, 0] = math.nan
    result = make()(model, CharacterTokenizer())
    assert math.isnan(result["ppl"]) and math.isnan(result["ppl_finite"])
    assert result["nonfinite_windows"] == result["windows"] and result["collapsed"] == 1.0
    assert "not finite in 15 of 15 windows" in caplog.text


def test_one_nonfinite_window_is_not_dropped(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    text = TEXT[:64] + "~" + TEXT[:63]  # '~' occurs in the third window only
    model.model.embed_tokens.weight.data[ord("~")] = math.inf
    result = make(text)(model, CharacterTokenizer())
    clean = make(TEXT[:64] + TEXT[31:63])(model, CharacterTokenizer())
    assert not math.isfinite(result["ppl"])
    assert (result["windows"], result["tokens"], result["nonfinite_windows"]) == (4, 4 * 31, 1)
    assert math.isfinite(result["ppl_finite"]) and math.isfinite(clean["ppl"])
    assert "1 of 4 windows" in caplog.text


@pytest.mark.parametrize(
    ("ppl", "collapsed"), [(1.0, 0.0), (127.9, 0.0), (128.1, 1.0), (math.inf, 1.0), (math.nan, 1.0)]
)
def test_collapsed_is_worse_than_guessing(ppl: float, collapsed: float) -> None:
    loss = WindowLoss(torch.full((2,), 31 * math.log(ppl), dtype=torch.float64), predictions=31)
    assert summarize(loss, name="fake", window=32, vocabulary=VOCABULARY)["collapsed"] == collapsed


def test_a_uniform_model_has_the_vocabulary_as_perplexity(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data.zero_()
    assert make()(model, CharacterTokenizer())["ppl"] == pytest.approx(VOCABULARY, rel=1e-5)


def test_overflow_of_exp_is_infinite(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data.normal_(std=1e6)
    result = make()(model, CharacterTokenizer())
    assert (
        result["ppl"] == math.inf
        and math.isfinite(result["nll"])
        and result["nonfinite_windows"] == 0
    )


def test_identity_names_what_the_number_depends_on() -> None:
    identity = make(window=16, max_windows=24).id
    assert identity.startswith("fake@1:16x24:")
    assert (
        len(
            {
                identity,
                make(window=16).id,
                make(window=16, max_windows=24, version=2).id,
                make("other text", window=16, max_windows=24).id,
            }
        )
        == 4
    )


def test_bos_stands_in_front_of_every_window(model: LlamaForCausalLM) -> None:
    """BOS and window - 1 tokens of text: as many predictions as without, none of a BOS."""
    benchmark, tokenizer = make(bos=True, max_windows=3), BosTokenizer()
    windows = benchmark.windows(tokenizer)
    text = torch.tensor([ord(x) for x in TEXT[: 3 * 31]]).view(3, 31)
    assert windows.shape == (3, 32) and torch.equal(windows[:, 1:], text)
    assert (windows[:, 0] == BOS).all() and not (windows[:, 1:] == BOS).any()
    result = benchmark(model, tokenizer)
    assert (result["tokens"], result["window"], result["windows"]) == (93, 32, 3)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert result["nll"] == pytest.approx(float(loss), rel=1e-6)
    off = make(bos=False, max_windows=3)
    assert (off.windows(tokenizer)[:, 0] == BOS).tolist() == [True, False, False]
    assert torch.equal(off.windows(tokenizer), make(max_windows=3).windows(tokenizer))


def test_bos_is_in_the_id_where_it_is_on() -> None:
    """auto is off for every family but Gemma's, and then the id is as it always was."""
    plain = make(max_windows=3)
    assert plain.id == make(max_windows=3, bos=False).id
    text = plain.id.rpartition(":")[2]
    gemma, llama = AutoConfig.for_model("gemma2"), LlamaConfig()
    assert plain.for_model(gemma).id == f"fake@1:32x3:bos:{text}"
    assert make(max_windows=3, precision="bfloat16", bos=True).id == f"fake@1:32x3:bf16:bos:{text}"
    assert plain.for_model(llama).id == plain.id
    assert make(bos=False).for_model(gemma).bos is False
    assert make(bos=True).for_model(llama).bos is True
    suite = Suite(name="s", parts={"a": plain}).for_model(gemma)
    assert [part.id for part in suite.benchmarks] == [f"fake@1:32x3:bos:{text}"]


def test_auto_is_what_the_model_needs(model: LlamaForCausalLM) -> None:
    for kind, bos in [("llama", False), ("gemma2", True), ("specomp_gemma2", True)]:
        model.config.model_type = kind
        assert make()(model, BosTokenizer()) == make(bos=bos)(model, BosTokenizer())


def test_tokens_are_checked_before_any_work(tmp_path: Path) -> None:
    benchmark = make()
    benchmark.check_tokens(BosTokenizer(VOCABULARY), VOCABULARY)
    benchmark.check_tokens(BosTokenizer(VOCABULARY), VOCABULARY + 64)  # rows to spare
    benchmark.check_tokens(BosTokenizer(VOCABULARY), ord("w") + 1)  # the others are not in the text
    with pytest.raises(UserError) as caught:
        benchmark.check_tokens(BosTokenizer(VOCABULARY), ord("w"))
    assert str(caught.value).startswith(
        "fake: token 119 ('w') has no row in the model's embedding, which has 119; the tokenizer"
        " has 128 tokens."
    )
    assert "model.resize_token_embeddings(128)" in str(caught.value)
    suite = Suite(name="s", parts={"a": benchmark})
    with pytest.raises(UserError, match="fake: token 119"):
        suite.check_tokens(BosTokenizer(VOCABULARY), ord("w"))
    rows = token_file(tmp_path / "ids.safetensors", torch.tensor([[0, 128]]))
    with pytest.raises(UserError, match="id 128 is outside the vocabulary of 128"):
        rows.check_tokens(BosTokenizer(), VOCABULARY)
    rows.check_tokens(BosTokenizer(), VOCABULARY + 1)


def test_short_texts_and_tokenizers_without_bos_are_found_before_any_work() -> None:
    tokenizer = BosTokenizer()
    with pytest.raises(UserError, match="the text has 6 tokens, .* set benchmark.window to 6 or"):
        make("short").check_tokens(tokenizer, VOCABULARY)
    with pytest.raises(UserError, match="the text has 5 tokens, .* set benchmark.window to 6 or"):
        make("short", bos=True).check_tokens(tokenizer, VOCABULARY)
    make("short", window=6).check_tokens(tokenizer, VOCABULARY)  # as the hint says
    make("short", window=6, bos=True).check_tokens(tokenizer, VOCABULARY)
    with pytest.raises(UserError, match=r"less than one window of 32: use a longer text\."):
        make("", bos=True).check_tokens(tokenizer, VOCABULARY)
    tokenizer.bos_token_id = None
    for wanted in (make(bos=True), make().for_model(AutoConfig.for_model("gemma2"))):
        with pytest.raises(UserError, match="has no BOS token: give it one, or set benchmark.bos="):
            wanted.check_tokens(tokenizer, VOCABULARY)
    make().check_tokens(tokenizer, VOCABULARY)


def test_ids_without_rows_in_tensors(model: LlamaForCausalLM) -> None:
    for ids in ([[0, 128]], [[-1, 3]]):
        with pytest.raises(UserError, match="tokens go from .*embedding has rows 0 to 127"):
            perplexity.mean_perplexity(model, torch.tensor(ids), 1)


def test_messages(model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"windows of 128 tokens do not fit the model's context of 64: set benchmark.window"
            r" to 64"
        ),
    ):
        make(window=128).validate(64)
    make(window=64).validate(64)
    with pytest.raises(
        UserError, match=r"the text has 5 tokens, less than one window of 32: set benchmark.window"
    ):
        make("short")(model, CharacterTokenizer())
    with pytest.raises(ValidationError, match="window"):
        make(window=1)
    make(max_windows=99)(model, CharacterTokenizer())
    assert "fills 15 windows of 32 tokens, not the 99 asked for" in caplog.text


def token_file(path: Path, rows: torch.Tensor | None = None) -> TokenFilePerplexity:
    if rows is not None:
        save_file({"input_ids": rows}, path)
    return TokenFilePerplexity(
        name="token_ids", version=1, path=path, max_windows=None, batch_size=2, precision="float32"
    )


def test_token_file_rows_are_windows(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path, rows = tmp_path / "ids.safetensors", torch.randint(VOCABULARY, (3, 20))
    benchmark = token_file(path, rows)
    benchmark.validate(64)
    result = benchmark(model, CharacterTokenizer())
    assert result["nll"] == pytest.approx(window_nll(model, rows, 1).mean(), rel=1e-6)
    assert (result["windows"], result["window"], result["tokens"]) == (3, 20, 57)
    identities = {
        benchmark.id,
        token_file(path, rows + 1).id,
        token_file(path, (rows + 1).view(4, 15)).id,
    }
    assert len(identities) == 3 and all(
        identity.startswith("token_ids@1:xall:") for identity in identities
    )


def test_token_file_messages(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    with pytest.raises(UserError, match=r"ids\.safetensors does not exist; set the path"):
        token_file(path).validate(64)
    with pytest.raises(
        UserError,
        match="rows of 65 tokens do not fit the model's context of 64: write shorter rows",
    ):
        token_file(path, torch.zeros(1, 65, dtype=torch.int64)).validate(64)
    with pytest.raises(
        UserError, match="rows of 1 token leave nothing to predict: write rows of 2"
    ):
        token_file(path, torch.zeros(3, 1, dtype=torch.int64)).validate(64)
    with pytest.raises(UserError, match="id 128 is outside the vocabulary of 128"):
        token_file(path, torch.tensor([[0, 128]]))(model, CharacterTokenizer())


def test_suite_checks_its_parts() -> None:
    with pytest.raises(UserError, match="measures fake@1:32xall:.* twice"):
        Suite(name="s", parts={"a": make(), "b": make()}).validate(64)
    with pytest.raises(
        UserError, match=r"benchmark.parts.a is a int, which is no Benchmark: it lacks"
    ):
        Suite(name="s", parts={"a": 3}).validate(64)
    with pytest.raises(UserError, match="do not fit"):
        Suite(name="s", parts={"a": make()}).validate(16)
    suite = Suite(name="s", parts={"a": make(), "b": make(window=16)})
    suite.validate(64)
    assert [part.window for part in suite.benchmarks] == [32, 16]


def suites() -> list[str]:
    return sorted(path.stem for path in (CONF / "benchmark").glob("*.yaml"))


@pytest.mark.parametrize("name", suites())
def test_every_suite_composes(name: str, tmp_path: Path) -> None:
    text = (CONF / "benchmark" / f"{name}.yaml").read_text()
    wanted = [line.rsplit(":", 1)[1].strip() for line in text.splitlines() if "/corpus@" in line]
    missing = [corpus for corpus in wanted if not (CONF / "corpus" / f"{corpus}.yaml").exists()]
    if missing:
        pytest.skip(f"no conf/corpus for {missing}")
    overrides = [f"+benchmark={name}", f"+paths.data={tmp_path}"]
    overrides += ["benchmark.path=ids.bin"] if name == "token_ids" else []
    if wanted:
        size, count = (
            ("window", "max_windows") if "window:" in text else ("prompt_tokens", "prompts")
        )
        overrides += [f"benchmark.{size}=16", f"benchmark.{count}=3"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=overrides)
    assert not OmegaConf.missing_keys(cfg)
    suite = instantiate(cfg.benchmark)
    assert isinstance(suite, Suite) and suite.name == name
    texts = [part for part in suite.benchmarks if isinstance(part, Perplexity)]
    assert len(texts) == len(wanted)
    assert all((part.window, part.max_windows) == (16, 3) for part in texts)
