"""The SVD-LLM procedure as published (arXiv:2403.07378, Algorithm 1, and the description of its
code): what specomp is timed against.

One Gram matrix per linear, float32; Cholesky factor and explicit inverse in float64; SVD of W S in
float32; two factors. Written from the description, without specomp's shortcuts: no sharing of
Grams, no triangle, no smaller eigenproblem.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from specomp.models.family import LinearSpec


@torch.no_grad()
def profile(
    decoder: nn.Module, model: nn.Module, linears: Iterable[LinearSpec], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """The Gram (n, n) of every linear's inputs, summed over all tokens."""
    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.detach().float().flatten(0, -2)
        product = x.T @ x
        grams[name] = grams[name] + product if name in grams else product

    handles = [
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args, name=linear.name: add(name, args[0])
        )
        for linear in linears
    ]
    for batch in batches:
        decoder(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def rank_of(m: int, n: int, retention: float) -> int:
    """That two factors may have."""
    return int(m * n * retention / (m + n))


def cholesky(gram: Tensor) -> Tensor:
    """Lower factor in float64, after the published shift by the smallest eigenvalue if needed."""
    gram = gram.double()
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        shift = 1e-6 - float(torch.linalg.eigvalsh(gram)[0])
        factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram), dtype=gram.dtype))
    return factor


def factorize(W: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and Vt (r, n) with W ~= U Vt."""
    S = cholesky(gram)
    inverse = torch.linalg.inv(S).float()
    U, s, Vt = torch.linalg.svd(W.float() @ S.float(), full_matrices=False)
    root = torch.diag(s[:rank].sqrt())
    return U[:, :rank] @ root, root @ (Vt[:rank] @ inverse)
