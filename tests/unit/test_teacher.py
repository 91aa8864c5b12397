"""The distillation loss against torch's own, and the teacher's states against the dense model's."""

from types import SimpleNamespace

import pytest
import torch
from running import make_run
from tiny import FAMILY_NAMES
from torch import Tensor, nn

from specomp.cache import Cache
from specomp.errors import UserError
from specomp.models.modules import replace_linear
from specomp.training.teacher import TeacherStates, distillation, head_of, part_name

BATCH, LENGTH, HIDDEN, VOCAB = 2, 11, 8, 19


def states(seed: int) -> Tensor:
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))


def fake_model(cap: float | None = None) -> nn.Module:
    """What a head is read from."""
    output = nn.Linear(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        output.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)))
    config = SimpleNamespace(final_logit_softcapping=cap) if cap else SimpleNamespace()
    return SimpleNamespace(get_output_embeddings=lambda: output, config=config)  # type: ignore[return-value]


def direct(
    student: Tensor, teacher: Tensor, head, ids: Tensor | None = None, weight: float = 0.0
) -> Tensor:
    """sum_v p (log p - log q), averaged over tokens, in float64; plus the weighted next-
    token loss.
    """
    p, q = (torch.log_softmax(head(x).double(), -1) for x in (teacher, student))
    loss = (p.exp() * (p - q)).sum(-1).mean()
    if ids is not None:
        loss = loss + weight * nn.functional.cross_entropy(
            head(student)[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()
        )
    return loss


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 5, BATCH * LENGTH, 1000])
def test_equals_the_divergence_and_its_gradient(chunk, cap, weight):
    head, teacher = head_of(fake_model(cap)), states(1)
    first, second = (states(2).requires_grad_() for _ in range(2))
    found = distillation(first, teacher, head, chunk, labels(), weight)
    expected = direct(second, teacher, head, labels(), weight)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * found).backward()
    (3 * expected).backward()
    assert first.grad.shape == first.shape
    assert (first.grad - second.grad).norm() <= 1e-5 * second.grad.norm()


def test_labels_without_a_weight_change_nothing():
    head = head_of(fake_model())
    first = distillation(states(2), states(1), head, 5, labels(), 0.0)
    assert torch.equal(first, distillation(states(2), states(1), head, 5))


def test_equal_states_have_no_divergence():
    head = head_of(fake_model())
    student = states(1).requires_grad_()
    loss = distillation(student, states(1), head, 4)
    loss.backward()
    assert abs(loss.item()) <= 1e-6
    assert student.grad.abs().max() <= 1e-6


def test_it_is_never_negative_otherwise():
    head = head_of(fake_model())
    for seed in range(5):
        assert float(distillation(states(1) + 0.1 * states(seed + 2), states(1), head, 4)) > 0


def test_only_the_student_gets_a_gradient():
    model = fake_model()
    student, teacher = states(2).requires_grad_(), states(1).requires_grad_()
    distillation(student, teacher, head_of(model), 5, labels(), 0.5).backward()
    assert teacher.grad is None
    assert model.get_output_embeddings().weight.grad is None
    assert student.grad is not None


def test_logits_of_a_chunk_at_a_time():
    seen, inner = [], head_of(fake_model())

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return inner(hidden)

    distillation(states(2).requires_grad_(), states(1), head, 5)
    assert max(seen) <= 5


def test_without_gradients_it_can_be_measured():
    with torch.no_grad():
        loss = distillation(states(2), states(1), head_of(fake_model()), 5)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(
        direct(states(2), states(1), head_of(fake_model())).item(), rel=1e-5
    )


def test_half_precision_states_get_a_half_precision_gradient():
    head = head_of(fake_model())
    student = states(2).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation(student, states(1), lambda x: head(x.float()), 5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16


def test_the_soft_cap_bounds_the_logits():
    capped = head_of(fake_model(2.0))(100 * states(1))
    plain = head_of(fake_model())(100 * states(1))
    assert capped.abs().max() <= 2.0
    assert plain.abs().max() > 100
    assert torch.allclose(
        head_of(fake_model(2.0))(1e-2 * states(1)),
        head_of(fake_model())(1e-2 * states(1)),
        atol=1e-3,
    )


# --- the teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family_name", FAMILY_NAMES)
def test_its_states_and_head_are_the_dense_models(cache, family_name):
    run = make_run(family_name, cache, num_samples=3, batch_size=2)
    teacher = TeacherStates(run)
    with torch.no_grad():
        for index in range(3):
            ids = run.samples.tokens[index : index + 1]
            hidden = run.family.decoder(run.model)(input_ids=ids, use_cache=False).last_hidden_state
            assert (teacher([index]) - hidden).abs().max() <= 1e-5
            logits = run.model(input_ids=ids).logits
            assert (head_of(run.model)(teacher([index])) - logits).abs().max() <= 1e-4
    assert teacher([2, 0]).shape == (2, 24, 32)
    assert torch.equal(teacher([2, 0])[1], teacher([0])[0]), "in the order asked for"


def test_it_is_computed_once(cache):
    run = make_run("llama", cache)
    first = TeacherStates(run)([0, 4])
    replace_linear(
        run.model, run.linears[0].name, nn.Identity()
    )  # no longer dense: nothing may be computed
    again = TeacherStates(run)
    assert torch.equal(again([0, 4]), first)
    assert (cache.hits["teacher"], cache.misses["teacher"]) == (1, 1)


def test_it_depends_on_model_and_text(tmp_path):
    keys = {TeacherStates(make_run("llama", Cache(tmp_path))).key}
    for change in ({"seed": 1}, {"num_samples": 4}, {"length": 20}, {"precision": "bfloat16"}):
        keys.add(TeacherStates(make_run("llama", Cache(tmp_path), **change)).key)
    assert len(keys) == 5
    assert TeacherStates(make_run("llama", Cache(tmp_path), batch_size=5)).key in keys


def test_what_the_cache_lost_is_said(cache):
    run = make_run("llama", cache)
    teacher = TeacherStates(run)
    cache.path("teacher", teacher.key, part_name(1)).unlink()
    assert teacher([0]).shape == (1, 24, 32)
    with pytest.raises(UserError, match=r"lost the teacher's states of samples \[1\]"):
        teacher([0, 1])
    assert TeacherStates(run)([1]).shape == (1, 24, 32), "the next one makes it again"
