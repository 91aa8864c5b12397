"""The same function of numbers on no grid."""

import pytest
import torch

from specomp.errors import UserError
from specomp.models.off_grid import moved_off_grid
from tests.running import random_tokens
from tests.tiny import tiny_model


def test_it_computes_the_same_with_every_weight_changed():
    model, moved = tiny_model("llama"), tiny_model("llama")
    moved_off_grid(moved)
    tokens = random_tokens(3, 24)
    with torch.no_grad():
        before, after = model(tokens).logits, moved(tokens).logits
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-5)
    layer = dict(moved.model.layers[1].named_parameters())
    for name, was in model.model.layers[1].named_parameters():
        assert (layer[name] != was).float().mean() > 0.99, name


def test_the_same_every_time():
    first, second = tiny_model("llama"), tiny_model("llama")
    moved_off_grid(first)
    moved_off_grid(second)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_models_built_otherwise_are_refused():
    with pytest.raises(UserError, match="model.off_grid=true knows.*'opt'"):
        moved_off_grid(tiny_model("opt"))
