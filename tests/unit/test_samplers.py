"""Samplers: the published procedures to the token, and honest errors when the text is too short."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from specomp.data.samplers import ContiguousWindows, Sampler, SvdLlmSampler, TokenWindows
from specomp.data.token_ids import tokenize
from specomp.errors import UserError

WORDS = [f"w{number}" for number in range(200)]


def word_tokenizer(*, words: list[str] = WORDS, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, and a BOS like LLaMA's; pieces of words are <unk>."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=16
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def text() -> str:
    draw = random.Random(0)
    return " ".join(draw.choice(WORDS) for _ in range(3000))


@pytest.fixture(autouse=True)
def _global_random_state() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


def published(text: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """get_calib_train_data as described for batch size 1, with the global generator."""
    random.seed(seed)
    dataset, pending = [], None
    for _ in range(nsamples + 1):
        start = random.randint(0, len(text) - seqlen - 1)
        ids = tokenizer(text[start : start + seqlen * 10], return_tensors="pt").input_ids
        if ids.shape[1] < seqlen:
            continue
        if pending is not None:
            dataset.append(pending)
        pending = ids[:, :seqlen]
    return torch.cat(dataset)


@pytest.mark.parametrize("seed", [3, 0])
def test_svd_llm_sampler_is_the_published_one(tokenizer: Any, text: str, seed: int) -> None:
    tokens = SvdLlmSampler(seed=seed)(text, tokenizer, 20, 12)
    assert torch.equal(tokens, published(text, tokenizer, 20, 12, seed))
    assert tokens.shape == (20, 12) and tokens.dtype == torch.int64
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()


def test_svd_llm_sampler_skips_short_pieces(
    tokenizer: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    short = text[:500]  # late starts leave fewer than 32 words
    tokens = SvdLlmSampler(seed=3)(short, tokenizer, 40, 32)
    assert torch.equal(tokens, published(short, tokenizer, 40, 32, 3))
    assert 0 < len(tokens) < 40
    assert f"{len(tokens)} samples instead of 40" in caplog.text
    assert "samples repeat each other" in caplog.text


def test_token_windows_are_the_published_ones(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    random.seed(0)
    starts = [random.randint(0, ids.shape[1] - 12 - 1) for _ in range(20)]
    expected = torch.cat([ids[:, start : start + 12] for start in starts])
    assert torch.equal(TokenWindows(seed=0)(text, tokenizer, 20, 12), expected)


def test_contiguous_windows_read_from_the_start(tokenizer: Any, text: str) -> None:
    tokens = ContiguousWindows()(text, tokenizer, 20, 12)
    assert torch.equal(tokens.flatten(), tokenize(text, tokenizer)[:240])


@pytest.mark.parametrize("make", [SvdLlmSampler, TokenWindows])
def test_seed_decides_and_global_state_does_not(make: Any, tokenizer: Any, text: str) -> None:
    random.seed(1)
    first = make(seed=5)(text, tokenizer, 8, 12)
    state = random.getstate()
    again = make(seed=5)(text, tokenizer, 8, 12)
    assert random.getstate() == state
    assert torch.equal(first, again)
    assert not torch.equal(first, make(seed=6)(text, tokenizer, 8, 12))


@pytest.mark.parametrize(
    ("sampler", "words", "num_samples", "message"),
    [
        (
            SvdLlmSampler(seed=3),
            3,
            2,
            r"has 8 characters, needs more than 12 for a sample of 12 tokens",
        ),
        (
            SvdLlmSampler(seed=3),
            5,
            2,
            r"3 of 3 pieces of the text gave fewer than 12 tokens.* needs 120 characters",
        ),
        (TokenWindows(seed=0), 11, 2, r"has 12 tokens, needs 13 for random samples of 12"),
        (ContiguousWindows(), 22, 2, r"has 23 tokens, needs 24 for 2 samples of 12"),
    ],
)
def test_too_little_text(
    sampler: Sampler, words: int, num_samples: int, message: str, tokenizer: Any
) -> None:
    with pytest.raises(
        UserError,
        match=message
        + r".*lower calibration.num_samples / calibration.length or choose a bigger corpus",
    ) as error:
        sampler(" ".join(WORDS[:words]), tokenizer, num_samples, 12)
    assert "\n" not in str(error.value)


def test_no_warning_about_long_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        tokenization_utils_base.logger, "warning", lambda message, *_: warnings.append(message)
    )
    TokenWindows(seed=0)(text, word_tokenizer(), 2, 12)
    assert warnings == []
    word_tokenizer()(text)
    assert "longer than" in warnings[0]  # what would have been said


@pytest.mark.parametrize("make", [SvdLlmSampler, TokenWindows])
def test_a_moved_sampler_is_one_of_another_seed(make: Any, tokenizer: Any, text: str) -> None:
    moved = make(seed=3).moved(2)
    assert moved == make(seed=5)
    assert torch.equal(moved(text, tokenizer, 8, 12), make(seed=5)(text, tokenizer, 8, 12))
    assert make(seed=3).moved(0) == make(seed=3)
    assert ContiguousWindows().moved(2) == ContiguousWindows()


def test_descriptions() -> None:
    samplers: list[Sampler] = [SvdLlmSampler(seed=3), TokenWindows(seed=0), ContiguousWindows()]
    assert [sampler.describe() for sampler in samplers] == [
        {"name": "svd_llm", "seed": 3},
        {"name": "token_windows", "seed": 0},
        {"name": "contiguous", "seed": None},
    ]
    assert all(isinstance(sampler, Sampler) for sampler in samplers)
