"""The dense model as a teacher: its last hidden states, computed once per calibration set and
cached.

The student keeps the dense model's embeddings and LM head untouched, and these states are behind
the final norm, so times the shared head they are the teacher's logits: no second model is in
memory, and every ratio, start and ablation reads the same states.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from specomp.cache import Cache, digest, waiting
from specomp.compression.run import Run
from specomp.errors import UserError
from specomp.models.families import family_of
from specomp.progress import track

log = logging.getLogger(__name__)
VERSION = 1
Head = Callable[[Tensor], Tensor]


class TeacherStates:
    """Last hidden states (length, hidden) of the dense model, one sample at a time."""

    def __init__(self, run: Run) -> None:
        """Computes and stores what the cache does not have; the model must still be dense."""
        self.cache = run.cache
        self.key = digest(
            {
                "version": VERSION,
                "model": run.model_key,
                "calibration": run.training_samples.hash,
                "half": run.half_forward,
                "what": "teacher",
            }
        )
        count = run.training_samples.num_samples
        with waiting(self.cache.lock("teacher", self.key), "runs the teacher"):
            # read as a whole: once the student stands in the model's place, none can be made again
            hit = all(
                self.cache.load("teacher", self.key, part_name(i)) is not None for i in range(count)
            )
            self.cache.count("teacher", hit=hit)
            if not hit:
                assert run.is_dense, "the teacher is the dense model"
                self._compute(run)

    def _compute(self, run: Run) -> None:
        loader = run.training_samples.batches()
        batches = track(loader, f"teacher: {run.training_samples.num_samples} samples", len(loader))
        with run.forward_precision():
            keep_states(self.cache, ("teacher", self.key), run.model, batches)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), length, hidden), on the CPU."""
        parts = [self.cache.load("teacher", self.key, part_name(i)) for i in indices]
        missing = [i for i, part in zip(indices, parts, strict=True) if part is None]
        if missing:
            raise UserError(
                f"The cache lost the teacher's states of samples {missing}: run the same command"
                " again."
            )
        return torch.stack([part["hidden"] for part in parts if part is not None])


@torch.no_grad()
def keep_states(
    cache: Cache, entry: tuple[str, str], model: Any, batches: Iterable[Tensor]
) -> None:
    """Write the last hidden states (length, hidden) of every sample of batches of ids (batch,
    length) into the cache, under the kind and key of `entry` and `part_name`.
    """
    decoder, index = family_of(model.config).decoder(model), 0
    for batch in batches:
        ids = batch.to(model.device)
        for hidden in decoder(input_ids=ids, use_cache=False).last_hidden_state:
            cache.save(*entry, part_name(index), {"hidden": hidden.contiguous().cpu()})
            index += 1


def soft_capped(config: Any, logits: Tensor) -> Tensor:
    """As the families that have a soft cap of the last logits make them."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def part_name(sample: int) -> str:
    """File of one sample in an entry."""
    return f"sample_{sample:05d}"


def head_of(model: torch.nn.Module) -> Head:
    """Hidden states (..., hidden) -> float32 logits (..., vocabulary), with the soft cap of the
    families that have one.

    Under autocast the weight is cast once, here: autocast itself casts a frozen one anew at every
    product.
    """
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    kind = output.weight.device.type
    weight = (
        output.weight.to(torch.get_autocast_dtype(kind))
        if torch.is_autocast_enabled(kind)
        else output.weight
    )

    def head(hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, output.bias).float()
        return soft_capped(model.config, logits)

    return head


def distillation(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    chunk: int,
    labels: Tensor | None = None,
    weight: float = 0.0,
) -> Tensor:
    """Mean over tokens of KL(softmax(head(teacher)) || softmax(head(student))), for hidden states
    (batch, length, hidden); in nats.

    labels (batch, length), with a weight: adds weight times the next-token cross-entropy. The
    gradient reaches `student` only. Logits of `chunk` tokens at a time: neither model's logits of a
    whole batch are ever in memory, and none wait for the backward pass.
    """
    flat, target = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    following = None
    if labels is not None and weight > 0:
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    loss: Tensor = _Distillation.apply(flat, target, head, chunk, following, weight)  # type: ignore[no-untyped-call]
    return loss


class _Distillation(torch.autograd.Function):
    """The gradient with respect to the student's hidden states is taken chunk by chunk in the
    forward pass and kept: (tokens, hidden).
    """

    @staticmethod
    def forward(ctx, student, teacher, head, chunk, labels, weight):  # type: ignore[no-untyped-def]
        total, gradients = torch.zeros((), dtype=torch.float64, device=student.device), []
        followed = 0 if labels is None else max(1, int((labels != -100).sum()))
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            with torch.no_grad():
                reference = torch.log_softmax(head(teacher[part]), dim=-1)
            piece = student[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(piece)
            own = torch.log_softmax(logits.detach(), dim=-1)
            wanted, slope = reference.exp(), own.exp()
            total += (wanted * (reference - own)).sum(dtype=torch.float64) / len(student)
            # d KL / d logits = softmax(own) - softmax(reference), d cross-entropy / d logits =
            # softmax(own) - one-hot
            gradient = (slope - wanted) / len(student)
            if followed:
                rows = (labels[part] != -100).nonzero().flatten()
                chosen = labels[part][rows]
                # every sample's last token has no successor: the mean is over those that have
                total -= weight * own[rows, chosen].sum(dtype=torch.float64) / followed
                gradient[rows] += slope[rows] * (weight / followed)
                gradient[rows, chosen] -= weight / followed
            gradients.append(torch.autograd.grad(logits, piece, gradient)[0])
        ctx.save_for_backward(torch.cat(gradients))
        return total.float()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None, None, None
