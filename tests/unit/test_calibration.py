"""Calibration sets: what their hash depends on, mixtures, token files, and the yamls as a user
composes them.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pydantic import ValidationError
from running import compose_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from specomp.data.calibration import (
    CalibrationSet,
    CalibrationSpec,
    MixedCalibration,
    Part,
    TextCalibration,
    TokenFile,
    allot,
    interleave,
)
from specomp.data.corpora import Corpus
from specomp.data.samplers import ContiguousWindows, SvdLlmSampler, TokenWindows
from specomp.data.text import describe_text
from specomp.data.token_ids import describe_tokenizer, embedding_rows
from specomp.errors import UserError
from specomp.experiment.config import build as built

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
DATA = Path(os.environ.get("SPECOMP_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data root: set SPECOMP_DATA")
CALIBRATIONS = sorted(path.stem for path in (CONF / "calibration").glob("[!_]*.yaml"))
COMMON: dict[str, Any] = {
    "upstream": "dense",
    "layers_at_once": None,
    "accumulate": "float32",
    "precision": "float32",
}


def byte_tokenizer(shift: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte and a BOS in front: 256 + 2 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        character: index
        for index, character in enumerate([*alphabet[shift:], *alphabet[:shift], "<unk>", "<s>"])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split("", behavior="isolated"),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


class Words:
    """A source of random words; the seed decides the text."""

    split, max_documents = "train", None

    def __init__(
        self, seed: int = 0, origin: str = "here", letters: str = "abcdef ", characters: int = 4000
    ) -> None:
        self.name, self.origin = f"words{seed}", origin
        draw = random.Random(seed)
        self.words = "".join(draw.choice(letters) for _ in range(characters))

    def text(self) -> str:
        return self.words

    def describe(self) -> dict[str, Any]:
        return describe_text(
            self.name, split="train", origin=self.origin, documents=[self.words], text=self.words
        )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def spec(**changes: Any) -> TextCalibration:
    settings = {
        "num_samples": 6,
        "length": 16,
        "batch_size": 4,
        "corpus": Words(),
        "sampler": SvdLlmSampler(seed=3),
    }
    return TextCalibration(**(COMMON | settings | changes))


def file_spec(path: Path, **changes: Any) -> TokenFile:
    return TokenFile(
        **(COMMON | {"num_samples": None, "length": None, "batch_size": 4, "path": path} | changes)
    )


def build(settings: CalibrationSpec, tokenizer: Any) -> CalibrationSet:
    return settings.build(tokenizer, max_length=64)


def composed(*overrides: str) -> Any:
    """The calibration spec of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose(overrides=list(overrides)).calibration)


def test_batches_hold_the_samples_in_order(tokenizer: Any) -> None:
    calibration = build(spec(), tokenizer)
    batches = calibration.batches()
    assert [tuple(batch.shape) for batch in batches] == [(4, 16), (2, 16)]
    assert torch.equal(torch.cat(batches), calibration.tokens)
    assert calibration.tokens.dtype == torch.int64


def test_description_accounts_for_everything(tokenizer: Any) -> None:
    description = build(spec(), tokenizer).description
    assert json.loads(json.dumps(description)) == description
    assert description["tokenizer"] == describe_tokenizer(tokenizer)
    assert description["source"]["sha256"] == Words().describe()["sha256"]
    assert description["sampler"] == {"name": "svd_llm", "seed": 3}
    assert [description[key] for key in ("samples", "samples_requested", "length", "tokens")] == [
        6,
        6,
        16,
        96,
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": Words(1)},
        {"sampler": SvdLlmSampler(seed=4)},
        {"sampler": TokenWindows(seed=3)},
        {"sampler": ContiguousWindows()},
        {"num_samples": 5},
        {"length": 15},
    ],
)
def test_hash_depends_on(changes: dict[str, Any], tokenizer: Any) -> None:
    assert build(spec(**changes), tokenizer).hash != build(spec(), tokenizer).hash


def test_hash_depends_on_the_tokenizer_even_at_equal_ids(tokenizer: Any) -> None:
    calibration = build(spec(), tokenizer)
    other = CalibrationSet(
        calibration.tokens,
        description={"tokenizer": describe_tokenizer(byte_tokenizer(1))},
        batch_size=4,
    )
    assert other.hash != calibration.hash


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": Words(0, origin="elsewhere")},
        {"batch_size": 1},
        {"upstream": "compressed"},
        {"layers_at_once": 2, "accumulate": "float64"},
    ],
)
def test_hash_does_not_depend_on(changes: dict[str, Any], tokenizer: Any) -> None:
    assert build(spec(**changes), tokenizer).hash == build(spec(), tokenizer).hash


def test_tokenizer_hash_is_about_content(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "copy")
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    before = describe_tokenizer(reloaded)
    assert before == describe_tokenizer(tokenizer)
    reloaded(["a", "bcd"], truncation=True, max_length=2)  # leaves its settings in the tokenizer
    assert describe_tokenizer(reloaded) == before
    assert describe_tokenizer(byte_tokenizer(1))["sha256"] != before["sha256"]


def test_subset_is_what_fewer_samples_would_have_been(tokenizer: Any) -> None:
    calibration = build(spec(), tokenizer)
    subset = calibration.subset(4)
    assert subset.hash == build(spec(num_samples=4), tokenizer).hash
    assert (
        subset.num_samples,
        subset.length,
        subset.description["samples"],
        subset.description["subset_of"],
    ) == (4, 16, 4, 6)
    for number in (0, 7):
        with pytest.raises(
            UserError, match=f"subset of {number} samples was asked for, the calibration set has 6"
        ):
            calibration.subset(number)


def test_fewer_samples_than_asked_for_show_in_the_description(tokenizer: Any) -> None:
    class Half:
        """A sampler that skips every other piece, as SvdLlmSampler skips short ones."""

        def __call__(self, *arguments: Any) -> Any:
            return SvdLlmSampler(seed=3)(*arguments)[::2]

        def moved(self, by: int) -> "Half":
            return self

        def describe(self) -> dict[str, Any]:
            return {"name": "half", "seed": 3}

    description = build(spec(sampler=Half()), tokenizer).description
    assert (description["samples"], description["samples_requested"]) == (3, 6)


def test_samples_longer_than_the_context(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match="Samples of 65 tokens do not fit the model's context of 64"
    ):
        build(spec(length=65), tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 0},
        {"length": 1},
        {"batch_size": 0},
        {"layers_at_once": 0},
        {"upstream": "both"},
        {"accumulate": "float16"},
        {"precision": "low"},
        {"num_samples": None},
        {"corpus": "wikitext2"},
        {"tokens": 3},
    ],
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


@pytest.mark.parametrize(
    ("weights", "total", "shares"),
    [
        ([1, 1], 4, [2, 2]),
        ([0.4, 0.4, 0.2], 256, [103, 102, 51]),
        ([1, 1, 1], 4, [2, 1, 1]),
        ([0.9, 0.1], 2, [2, 0]),
        ([3], 5, [5]),
    ],
)
def test_allot(weights: list[float], total: int, shares: list[int]) -> None:
    assert allot(weights, total) == shares


def test_interleave_keeps_proportions_in_every_beginning() -> None:
    order = interleave([6, 3, 3])
    assert sorted(order) == [
        (part, index) for part, count in enumerate([6, 3, 3]) for index in range(count)
    ]
    for length in range(1, 13):
        counts = [sum(part == which for part, _ in order[:length]) for which in range(3)]
        assert all(
            abs(count - length * share) <= 1
            for count, share in zip(counts, (0.5, 0.25, 0.25), strict=True)
        )
    for part in range(3):
        assert [index for which, index in order if which == part] == sorted(
            index for which, index in order if which == part
        )


def test_mixture_has_the_proportions(tokenizer: Any) -> None:
    parts = {
        "low": Part(corpus=Words(0, letters="abc"), weight=3),
        "high": Part(corpus=Words(1, letters="xyz"), weight=1),
    }
    settings = COMMON | {
        "num_samples": 8,
        "length": 16,
        "batch_size": 4,
        "sampler": SvdLlmSampler(seed=3),
    }
    calibration = build(MixedCalibration(**settings, parts=parts), tokenizer)
    kinds = [
        tokenizer.decode(sample[1:]).replace(" ", "")[0] in "abc" for sample in calibration.tokens
    ]
    assert sum(kinds) == 6
    assert sum(kinds[:4]) == 3
    accounts = calibration.description["source"]["parts"]
    assert {name: part["samples"] for name, part in accounts.items()} == {"low": 6, "high": 2}
    again = build(MixedCalibration(**settings, parts=parts), tokenizer)
    assert again.hash == calibration.hash


def test_mixture_says_when_a_part_gets_nothing(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"big": Part(corpus=Words(0), weight=0.9), "small": Part(corpus=Words(1), weight=0.1)}
    settings = COMMON | {
        "num_samples": 2,
        "length": 16,
        "batch_size": 4,
        "sampler": SvdLlmSampler(seed=3),
    }
    calibration = build(MixedCalibration(**settings, parts=parts), tokenizer)
    assert calibration.num_samples == 2
    assert "Part small of the mixture gets none of 2 samples" in caplog.text
    with pytest.raises(ValidationError):
        Part(corpus=Words(), weight=0)
    with pytest.raises(ValidationError):
        MixedCalibration(**settings, parts={})


IDS = torch.arange(24).reshape(4, 6)


def write(path: Path, ids: torch.Tensor = IDS) -> Path:
    np.save(path, ids.numpy())
    return path


def test_token_file_is_taken_whole_or_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "ids.npy")
    assert torch.equal(build(file_spec(path), tokenizer).tokens, IDS)
    assert torch.equal(
        build(file_spec(path, num_samples=2, length=3), tokenizer).tokens, IDS[:2, :3]
    )


def test_token_file_of_a_text_calibration_has_its_hash(tmp_path: Path, tokenizer: Any) -> None:
    calibration = build(spec(), tokenizer)
    first = build(file_spec(write(tmp_path / "a.npy", calibration.tokens)), tokenizer)
    second = build(
        file_spec(write(tmp_path / "b.npy", calibration.tokens), batch_size=1), tokenizer
    )
    assert first.hash == second.hash == calibration.hash
    assert str(tmp_path) not in json.dumps(first.description)


def test_token_file_errors(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="gone.npy does not exist"):
        build(file_spec(tmp_path / "gone.npy"), tokenizer)
    path = write(tmp_path / "ids.npy")
    for changes in ({"num_samples": 5}, {"length": 7}):
        with pytest.raises(UserError, match="holds 4 samples of 6 tokens, .* were asked for"):
            build(file_spec(path, **changes), tokenizer)
    with pytest.raises(UserError, match="Samples of 6 tokens do not fit the model's context of 5"):
        file_spec(path).build(tokenizer, max_length=5)


def test_ids_must_be_in_the_vocabulary(tmp_path: Path, tokenizer: Any) -> None:
    settings = file_spec(
        write(tmp_path / "ids.npy", IDS + 240)
    )  # largest id 263; the tokenizer has 258
    with pytest.raises(UserError, match="id 263 is outside the vocabulary of 258"):
        build(settings, tokenizer)
    with pytest.raises(UserError, match="id 263 is outside the vocabulary of 263"):
        settings.build(tokenizer, max_length=64, vocab_size=263)
    assert settings.build(tokenizer, max_length=64, vocab_size=264).num_samples == 4


def test_tokens_must_have_rows(tokenizer: Any) -> None:
    """Counted by the ids that are drawn: rows to spare are fine, and so are tokens no text has."""
    largest = int(build(spec(), tokenizer).tokens.max())
    for rows in (largest + 1, 258, 1000):
        drawn = spec().build(tokenizer, max_length=64, vocab_size=rows)
        assert drawn.hash == build(spec(), tokenizer).hash
    with pytest.raises(UserError) as caught:
        spec().build(tokenizer, max_length=64, vocab_size=largest)
    for part in (
        f"token {largest} (",
        f"which has {largest};",
        f"{len(tokenizer)} tokens",
        "resize",
    ):
        assert part in str(caught.value)


def test_the_rows_of_a_config() -> None:
    assert embedding_rows(LlamaConfig(vocab_size=100, pad_token_id=99)) == 100
    assert embedding_rows(LlamaConfig(vocab_size=100, pad_token_id=-1)) == 100  # LLaMA 1
    with pytest.raises(
        UserError, match="pad_token_id=100, its embedding 100 rows: set pad_token_id"
    ):
        embedding_rows(LlamaConfig(vocab_size=100, pad_token_id=100))


@pytest.mark.parametrize("sampler", [SvdLlmSampler(seed=3), TokenWindows(seed=3)])
def test_bos_in_front_of_every_sample(sampler: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    plain, bos = build(spec(sampler=sampler), tokenizer), tokenizer.bos_token_id
    begun = build(spec(sampler=sampler, bos=True), tokenizer)
    assert begun.tokens.shape == plain.tokens.shape and (begun.tokens[:, 0] == bos).all()
    assert torch.equal(begun.tokens[:, 1:], plain.tokens[:, :-1])
    assert begun.hash != plain.hash and begun.description["bos"] is True
    auto = spec(sampler=sampler).build(tokenizer, max_length=64, needs_bos=True)
    assert auto.hash == begun.hash
    off = spec(sampler=sampler, bos=False).build(tokenizer, max_length=64, needs_bos=True)
    assert off.hash == plain.hash and "bos" not in plain.description


def test_a_bos_that_the_tokenizer_puts_there_is_not_doubled(tokenizer: Any) -> None:
    """SVD-LLM's samples are texts of their own, each with the tokenizer's BOS."""
    assert build(spec(bos=True), tokenizer).hash == build(spec(), tokenizer).hash


def test_a_tokenizer_without_bos() -> None:
    without = byte_tokenizer()
    without.bos_token = None
    build(spec(), without)
    for settings, needed in ((spec(bos=True), False), (spec(), True)):
        with pytest.raises(
            UserError, match="no BOS token: give it one, or set calibration.bos=fals"
        ):
            settings.build(without, max_length=64, needs_bos=needed)
    spec(bos=False).build(without, max_length=64, needs_bos=True)


def test_token_files_are_taken_as_they_are(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = file_spec(write(tmp_path / "ids.npy"))
    drawn = settings.build(tokenizer, max_length=64, needs_bos=True)
    assert drawn.hash == build(settings, tokenizer).hash
    assert "4 of 4 calibration samples do not begin with BOS" in caplog.text
    with pytest.raises(ValidationError, match="'auto' or False"):
        file_spec(tmp_path / "ids.npy", bos=True)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_yaml(name: str) -> None:
    settings = composed(
        f"+calibration={name}",
        "+paths.data=null",
        *(["calibration.path=ids.npy"] if name == "token_ids" else []),
    )
    assert isinstance(settings, CalibrationSpec)
    assert (settings.upstream, settings.layers_at_once) == ("dense", None)
    assert (settings.accumulate, settings.precision) == ("float32", "float32")


def test_yaml_of_the_papers() -> None:
    settings = composed("+calibration=wikitext2", "+paths.data=null")
    assert (settings.num_samples, settings.length, settings.corpus.split, settings.sampler) == (
        256,
        2048,
        "train",
        SvdLlmSampler(seed=3),
    )


def test_what_a_user_types(tmp_path: Path) -> None:
    settings = composed(
        "+calibration=wikitext2",
        f"+paths.data={tmp_path}",
        "calibration.corpus.split=validation",
        "calibration.num_samples=64",
        "calibration.length=512",
        "calibration/sampler=token_windows",
    )
    assert (settings.num_samples, settings.length, settings.sampler) == (
        64,
        512,
        TokenWindows(seed=0),
    )
    assert (settings.corpus.split, settings.corpus.data_root) == ("validation", tmp_path)


@pytest.mark.parametrize("name", ["c4", "mix"])
def test_the_corpus_can_be_exchanged_in_every_yaml(name: str) -> None:
    """What a calibration yaml sets inside its corpus (split, max_documents) must exist in every
    corpus: the slot rule.
    """
    place = "calibration.corpus" if name == "c4" else "calibration.parts.c4.corpus"
    for other in sorted(path.stem for path in (CONF / "corpus").glob("*.yaml")):
        more = [f"{place}.path=mine.txt"] if other == "text" else []
        settings = composed(
            f"+calibration={name}", "+paths.data=null", f"corpus@{place}={other}", *more
        )
        chosen = settings.corpus if name == "c4" else settings.parts["c4"].corpus
        assert chosen.name == other and chosen.split == "train"


def test_parts_of_the_mixture_come_and_go() -> None:
    more = composed(
        "+calibration=mix",
        "+paths.data=null",
        "+corpus@calibration.parts.german.corpus=multilingual_de",
        "+calibration.parts.german.weight=0.2",
    )
    assert list(more.parts) == ["wikitext2", "c4", "code", "german"]
    less = composed(
        "+calibration=mix",
        "+paths.data=null",
        "~corpus@calibration.parts.c4.corpus",
        "~calibration.parts.c4",
    )
    assert list(less.parts) == ["wikitext2", "code"]


def test_tiny_and_pydocs_need_no_network(tokenizer: Any) -> None:
    calibration = build(composed("+calibration=tiny"), tokenizer)
    assert tuple(calibration.tokens.shape) == (4, 32)
    assert calibration.description["source"]["name"] == "pydocs"
    assert composed("+calibration=pydocs").build(tokenizer, max_length=512).tokens.shape == (
        32,
        512,
    )


@needs_data
def test_real_texts(tokenizer: Any) -> None:
    root = f"+paths.data={DATA}"
    laptop = composed("+calibration=wikitext2_64x512", root).build(tokenizer, max_length=2048)
    assert tuple(laptop.tokens.shape) == (64, 512)
    assert laptop.description["source"]["origin"] == "local wikitext2/validation.jsonl"
    mixed = composed(
        "+calibration=mix",
        root,
        "calibration.parts.code.corpus.split=test",
        "calibration.num_samples=10",
        "calibration.length=64",
    )
    calibration = mixed.build(tokenizer, max_length=2048)
    assert {
        name: part["samples"] for name, part in calibration.description["source"]["parts"].items()
    } == {
        "wikitext2": 4,
        "c4": 4,
        "code": 2,
    }
    assert isinstance(mixed.parts["code"].corpus, Corpus)


def test_the_seed_of_a_run_moves_the_samplers_own(tmp_path: Path) -> None:
    """And nothing where it is 0; a file of tokens is what it is."""
    sampler = "calibration/sampler=token_windows"
    drawn = [built(compose_config(tmp_path, sampler, f"seed={x}")).samples for x in (0, 1, 1)]
    own = built(compose_config(tmp_path, sampler, "calibration.sampler.seed=1")).samples
    assert drawn[0].hash != drawn[1].hash == drawn[2].hash == own.hash
    assert drawn[1].description["sampler"] == {"name": "token_windows", "seed": 1}
    fixed = [
        built(compose_config(tmp_path, "calibration/sampler=contiguous", f"seed={x}")).samples
        for x in (0, 1)
    ]
    assert fixed[0].hash == fixed[1].hash
