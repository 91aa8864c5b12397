"""LowRankLinear, what every substitute has, and replace_linear."""

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from specomp.forms.factors import LowRankLinear
from specomp.forms.pivoted import PivotedLinear
from specomp.models.modules import replace_linear, weight_of
from specomp.training.gated import GatedLinear

M, N, RANK = 6, 10, 3


def factors(rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, rank, generator=generator), torch.randn(rank, N, generator=generator)


def test_computes_the_product_of_its_factors_plus_bias():
    U, Vt = factors()
    bias = torch.arange(M, dtype=torch.float32)
    module = LowRankLinear.from_factors(U, Vt, bias, dtype=torch.float32, device="cpu")
    x = torch.randn(4, 5, N)
    assert torch.allclose(module(x), x @ (U @ Vt).T + bias, atol=1e-5)
    assert (module.in_features, module.out_features, module.rank) == (N, M, RANK)


def test_at_full_rank_equals_the_linear():
    dense = nn.Linear(N, M, dtype=torch.float64)
    U, s, Vt = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    module = LowRankLinear.from_factors(U * s, Vt, dense.bias, dtype=torch.float64, device="cpu")
    x = torch.randn(7, N, dtype=torch.float64)
    assert torch.allclose(module(x), dense(x), atol=1e-12)
    assert torch.allclose(module.merged_weight(), dense.weight, atol=1e-12)


def test_parameters_are_the_factors_and_the_bias_only():
    U, Vt = factors()
    names = dict(
        LowRankLinear.from_factors(
            U, Vt, None, dtype=torch.float32, device="cpu"
        ).named_parameters()
    )
    assert set(names) == {"v_proj.weight", "u_proj.weight"}
    assert sum(p.numel() for p in names.values()) == RANK * (M + N)


def test_copies_its_input_and_casts_it():
    U, Vt = factors()
    module = LowRankLinear.from_factors(U, Vt, None, dtype=torch.bfloat16, device="cpu")
    before = module.merged_weight()
    U.zero_()
    assert module.u_proj.weight.dtype == module.v_proj.weight.dtype == torch.bfloat16
    assert before.dtype == torch.float32  # the product is not rounded to the dtype of the factors
    assert torch.equal(module.merged_weight(), before)


def test_merged_weight_multiplies_in_float32():
    U, Vt = factors()
    module = LowRankLinear.from_factors(U, Vt, None, dtype=torch.bfloat16, device="cpu")
    expected = module.u_proj.weight.float() @ module.v_proj.weight.float()
    assert torch.equal(module.merged_weight(), expected)


def test_repr_says_the_rank():
    assert "in_features=10, out_features=6, rank=3, bias=True" in repr(
        LowRankLinear(N, M, RANK, bias=True)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [LowRankLinear, PivotedLinear])
def test_its_arguments_make_a_module_of_the_same_shapes(kind, bias):
    module = kind(N, M, RANK, bias=bias)
    again = kind(**module.arguments(), dtype=torch.float32, device="cpu")
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, N)
    assert torch.equal(again(x), module(x))
    assert json.loads(json.dumps(module.arguments())) == module.arguments()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_as_it_acts_is_that_of_the_outputs(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    eye = torch.eye(N, dtype=dtype)
    for module in (
        nn.Linear(N, M, dtype=dtype),
        LowRankLinear(N, M, RANK, bias=True, dtype=dtype),
        PivotedLinear(N, M, RANK, bias=True, dtype=dtype),
    ):
        weight = weight_of(module)
        assert weight.dtype == wide
        assert not weight.requires_grad
        out = (module(eye) - module(0 * eye)).T.to(wide)
        assert torch.allclose(weight, out, atol=5e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_replace_linear(training):
    model = nn.Sequential(nn.Sequential(nn.Linear(N, M)), nn.Linear(M, M)).train(training)
    replacement = LowRankLinear(N, M, RANK, bias=True)
    replace_linear(model, "0.0", replacement)
    assert model[0][0] is replacement
    assert replacement.training is training
    replace_linear(model, "1", nn.Identity())  # a direct child has no parent in its name
    assert isinstance(model[1], nn.Identity)


def test_replace_linear_refuses_a_name_that_does_not_exist():
    with pytest.raises(AttributeError):
        replace_linear(nn.Sequential(nn.Linear(N, M)), "7", nn.Identity())


def test_gates_are_those_of_the_components_that_exist():
    module = GatedLinear(*factors(), None, to_gate=torch.sigmoid, start=0.0, deviation=True)
    with torch.no_grad():
        module.scores.copy_(torch.arange(RANK))
    for keep in ([True, False, True], [False, True]):
        module.prune(torch.tensor(keep))
    assert module.alive.tolist() == [False, False, True]
    assert module.existing.tolist() == [2]
    assert torch.equal(module.gates(), torch.sigmoid(torch.tensor([2.0])))


class Operations(TorchDispatchMode):
    """Names of the operations that run while it is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_training_step_never_waits_for_the_device():
    """Boolean masks and numbers read off a tensor stop a GPU; with hundreds of linears that is most
    of a step.
    """
    module = GatedLinear(*factors(), None, to_gate=torch.sigmoid, start=0.0, deviation=True)
    module.prune(torch.tensor([True, False, True]))
    with Operations() as operations:
        module(torch.ones(2, N)).sum().backward()
    assert module.scores.grad is not None
    assert "index_select" in operations.seen
    assert not operations.seen & {
        "index",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "nonzero",
        "_local_scalar_dense",
    }
