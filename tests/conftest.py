"""Fixtures on tiny models: no network, no accelerator, one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SPECOMP_FRESH_CHECK", "0")  # a process a folder; test_door.py has it

from jaxtyping import install_import_hook

# Shapes in signatures are checked while tests run: before anything of these is imported.
CHECKED = ["numerics.factors", "numerics.gates", "numerics.grid", "numerics.linalg"]
CHECKED += ["quantization.gptq", "quantization.rtn"]
install_import_hook([f"specomp.{name}" for name in CHECKED], "beartype.beartype")


import composing  # noqa: F401  (before anything that composes)
import pytest
import torch
from fast import left_out
from tiny import FAMILY_NAMES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from specomp.cache import Cache
from specomp.settings import BESIDE

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only the slow suite runs."""
    for place in left_out([item.nodeid for item in items]):
        items[place].add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_yamls_of_another_test():
    """--config-dir belongs to a process, and tests share one."""
    yield
    BESIDE.clear()


@pytest.fixture
def cache(tmp_path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of the tiny models."""
    return tiny_tokenizer()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Three decoder layers, multi-head attention."""
    return tiny_model("llama")


@pytest.fixture
def tiny_opt() -> PreTrainedModel:
    """Three decoder layers, biases, tied head."""
    return tiny_model("opt")


@pytest.fixture(params=FAMILY_NAMES)
def tiny_any(request) -> PreTrainedModel:
    """One tiny model of every supported architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture
def no_weights_read(monkeypatch):
    """Fails the test if weights are opened or drawn."""

    def refuse(*args, **options):
        raise AssertionError("weights were opened")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)
