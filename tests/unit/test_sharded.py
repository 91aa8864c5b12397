"""Sharded frozen matrices: two real processes over gloo compute what one does, hold half, gather
one layer at a time, and can prune.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from running import CONF
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from specomp.numerics.gates import two_sigmoid
from specomp.training.gated import GatedLinear
from specomp.training.sharded import Shards, restorer

WIDTH, INNER, RANK = 6, 9, 5  # shares of 5 and 9 rows are uneven
LAYERS, PROCESSES = 4, 2


class Layer(nn.Module):
    """A residual block of two gated linears, with a frozen vector and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.up, self.down = gated(INNER, WIDTH), gated(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x * self.scale)))


class Decoder(nn.Module):
    """Embeddings and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def gated(m: int, n: int) -> GatedLinear:
    U = torch.randn(RANK, m).T  # as a decomposition may leave it, not contiguous
    return GatedLinear(
        U, torch.randn(RANK, n), torch.randn(m), to_gate=two_sigmoid, start=0.1, deviation=True
    )


def contiguous(model: Decoder) -> Decoder:
    """A copy with the same memory layout as gathered shares have, so that results are equal to the
    bit.
    """
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.data = parameter.data.contiguous()
    return copy


def matrices(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.ndim > 1]


def whole(model: Decoder) -> int:
    """Layers with gathered parameters."""
    return sum(not all(isinstance(p, DTensor) for p in matrices(layer)) for layer in model.layers)


def step(model: Decoder) -> list[Tensor]:
    """Output and gradients of one forward and backward pass."""
    model.zero_grad()
    out = model(torch.arange(22).view(2, 11) % 11)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 1 + 4 * LAYERS
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def check_share(shards: Shards, model: Decoder, components: int) -> None:
    """Half of the matrices, to the row that cannot be halved; everything else is whole."""
    mine, total = shards.held()
    assert total == sum(2 * (WIDTH + INNER) * components for _ in model.layers)
    assert abs(mine - total / 2) <= LAYERS * (WIDTH + INNER + 2 * components) / 2
    stored = sum(
        p.to_local().untyped_storage().nbytes() // 4
        for layer in model.layers
        for p in matrices(layer)
    )
    assert mine <= stored <= total / 2 + LAYERS * (WIDTH + INNER + 2 * components) / 2, (
        "padding included"
    )
    assert not any(
        isinstance(p, DTensor) for p in model.parameters() if p.ndim < 2 or p.requires_grad
    )
    assert not isinstance(model.embedding.weight, DTensor)


def trains_in_shares(mesh) -> None:
    torch.manual_seed(0)
    model = Decoder().train()
    alone = contiguous(model)
    names = list(model.state_dict())
    seen = {"forward": [], "backward": []}
    shards = Shards(model, list(model.layers), mesh)
    check_share(shards, model, RANK)
    for layer in model.layers:
        layer.up.register_forward_hook(lambda *_: seen["forward"].append(whole(model)))
        layer.down.scores.register_hook(lambda _: seen["backward"].append(whole(model)))
    for _ in range(2):
        same(step(model), step(alone))
        assert whole(model) == 0, "nothing stays gathered"
    assert max(seen["forward"]) == 1
    assert max(seen["backward"]) <= 2, "the next one may be on its way"
    check_share(shards, model, RANK)
    assert list(model.state_dict()) == names


def can_be_pruned(mesh) -> None:
    torch.manual_seed(1)
    model = Decoder().eval()
    alone, keep = contiguous(model), torch.tensor([True, False, True, True, False])
    shards = Shards(model, list(model.layers), mesh)
    for components in (RANK, 3, 2):
        same(step(model), step(alone))
        check_share(shards, model, components)
        for layer, other in zip(shards.each_whole(), alone.layers, strict=True):
            assert whole(model) == 1, "the others stay in shares"
            assert type(layer) is Layer and not layer.training
            for one, two in ((layer.up, other.up), (layer.down, other.down)):
                assert torch.equal(one.U, two.U) and torch.equal(one.rows, two.rows)
                one.prune(keep[: len(one.rows)])
                two.prune(keep[: len(two.rows)])
        assert not any(p.requires_grad for x in model.layers for p in matrices(x))
    assert len(model.layers) == LAYERS and whole(model) == 0


def in_a_process(rank: int, folder: Path, check: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    try:
        check(init_device_mesh("cpu", (PROCESSES,)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("check", [trains_in_shares, can_be_pruned])
def test_two_processes(tmp_path, check):
    torch.multiprocessing.spawn(in_a_process, (tmp_path, check), nprocs=PROCESSES)


def test_what_was_attached_is_taken_off_again():
    """As fully_shard attaches it: another class, hooks, attributes; the mode and what lies inside
    stay as they are now.
    """
    from torch.distributed._composable_state import _insert_module_state, _State

    layer = Layer()
    before, restore = dict(vars(layer)), restorer(layer)
    _insert_module_state(layer, _State())
    layer.__class__ = type("Other", (Layer,), {})
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.extra = 1
    layer.eval()
    weight = layer.up.U = nn.Parameter(torch.zeros(2, 2))
    restore()
    assert type(layer) is Layer
    assert (
        vars(layer).keys() == before.keys()
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )
    assert not layer.training and layer.up.U is weight
    _insert_module_state(layer, _State())  # refuses a second one


def test_the_trainer_is_made_anew_each_time():
    factory = instantiate(OmegaConf.load(CONF / "trainer" / "fsdp_cpu.yaml"))
    one, two, loop = factory(), factory(), factory(devices=1, strategy="auto")
    assert one.strategy is not two.strategy
    assert (one.world_size, two.world_size, loop.world_size) == (2, 2, 1)
    assert type(loop.strategy).__name__ == "SingleDeviceStrategy"
