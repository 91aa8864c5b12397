"""Sharded training: what is large and frozen is shared out among the processes, what trains is
whole in each of them.

Of a decoder layer in training nearly everything is frozen, the components of its linears; what
trains is one score per component and one bias per linear. So torch's FSDP2 (`fully_shard`, after
Zhao et al., PyTorch FSDP, arXiv:2304.11277) keeps 1/N of every frozen matrix in each of N processes
and gathers them one decoder layer at a time, forward and backward, while DDP averages the few
gradients: the optimizer and the checkpoints are those of one process. Lightning's own strategies
for FSDP start the whole command once per process, and shard what trains.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger(__name__)


def sharded_trainer(*, strategy: str | Callable[[], Strategy], **options: Any) -> L.Trainer:
    """lightning.Trainer, but `strategy` may be what makes one: a run builds several trainers, and
    no two may share a strategy.
    """
    return L.Trainer(strategy=strategy if isinstance(strategy, str) else strategy(), **options)


# So that a misspelt setting is found before the trainer is made.
sharded_trainer.__signature__ = inspect.signature(L.Trainer)  # type: ignore[attr-defined]


class ShardedStrategy(DDPStrategy):
    """DDP over what trains, with the frozen matrices of the decoder layers sharded.

    The module to train names its `decoder` and the decoder's `layers`. One that only predicts has
    the whole model in every process.
    """

    shards: "Shards | None" = None  # made inside each process

    def model_to_device(self) -> None:
        """Shard first, layer by layer: the whole model is never on one device."""
        module: Any = self.lightning_module
        if module.trainer.predicting:
            return super().model_to_device()
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self.shards = Shards(module.decoder, module.layers, mesh)
        frozen = [
            name for name, parameter in module.named_parameters() if not parameter.requires_grad
        ]
        # The same in every process from the start, and DDP cannot broadcast a part.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super().model_to_device()


class Shards:
    """The decoder layers of a model, their frozen matrices shared out over a mesh of one
    dimension.
    """

    def __init__(self, decoder: nn.Module, layers: list[nn.Module], mesh: DeviceMesh) -> None:
        self.decoder, self.layers, self.mesh = decoder, layers, mesh
        self._undo: dict[nn.Module, Callable[[], None]] = {}
        for layer in layers:
            self._shard(layer)
        self._shard(decoder)
        self._report()

    def _shard(self, module: nn.Module) -> None:
        """A decoder layer; or the decoder around sharded ones, which shares out nothing but lets
        the next layer come while one computes.
        """
        shared = (
            {p for p in module.parameters() if not p.requires_grad and p.ndim > 1}
            if module in self.layers
            else set()
        )
        for parameter in shared:
            parameter.data = parameter.data.contiguous()
        self._undo[module] = restorer(module)
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=True,
            ignored_params=set(module.parameters()) - shared,
        )

    def each_whole(self) -> Iterator[nn.Module]:
        """One decoder layer after the other with whole parameters, which may change shape: they are
        shared out anew afterwards.
        """
        self._undo.pop(self.decoder)()
        for layer in self.layers:
            assert isinstance(layer, FSDPModule)
            layer.unshard()
            found = {
                (owner, name): parameter.detach().clone()
                for owner in layer.modules()
                for name, parameter in owner.named_parameters(recurse=False)
                if not parameter.requires_grad
            }
            layer.reshard()
            self._undo.pop(layer)()
            for (owner, name), value in found.items():
                setattr(owner, name, nn.Parameter(value, requires_grad=False))
            yield layer
            self._shard(layer)
        self._shard(self.decoder)
        self._report()

    def held(self) -> tuple[int, int]:
        """Numbers of the sharded matrices: in this process while nothing is gathered, and of the
        whole.
        """
        shares = [p for layer in self.layers for p in layer.parameters() if isinstance(p, DTensor)]
        return sum(p.to_local().numel() for p in shares), sum(p.numel() for p in shares)

    def _report(self) -> None:
        rank, (mine, total) = self.mesh.get_rank(), self.held()
        log.info(
            "Process %d of %d holds %d of %d frozen numbers of the decoder layers.",
            rank + 1,
            self.mesh.size(),
            mine,
            total,
        )


def each_whole(strategy: Strategy, layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The decoder layers one after the other, each with whole parameters while it is looked at."""
    return (
        strategy.shards.each_whole()
        if isinstance(strategy, ShardedStrategy) and strategy.shards
        else iter(layers)
    )


def restorer(module: nn.Module) -> Callable[[], None]:
    """Takes off what fully_shard is about to attach to a module: the class, the hooks, the state.
    Its parameters stay what they are.

    torch offers no way back from fully_shard, nor a way to change the shape of what is sharded.
    """
    kind = type(module)
    kept = {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }

    def restore() -> None:
        # Here and not above: torch's own, so that only a pruning depends on its being there.
        from torch.distributed._composable_state import _module_state_mapping

        mode = module.training
        _module_state_mapping.pop(module)
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(kept, training=mode)

    return restore
