"""Cost of specomp against the published procedure, as ratios. See README.md in this folder."""

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from published import factorize as published_factorize
from published import profile as published_profile
from published import rank_of

from specomp.cache import Cache
from specomp.compression.calibrate import calibrate
from specomp.compression.loop import compress
from specomp.compression.run import Run
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.experiment.record import peak_memory
from specomp.forms.factors import LowRankLinear
from specomp.models.modules import replace_linear
from specomp.numerics.factors import GramNorm, truncate
from specomp.numerics.ratio import break_even_rank, retained

# name, linears of this shape in a decoder layer, m, n
LLAMA_7B = (
    ("q, k, v, o", 4, 4096, 4096),
    ("gate, up", 2, 11008, 4096),
    ("down", 1, 4096, 11008),
)
seconds: dict[str, float] = {}


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time of a block to `seconds`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def prepare(cache: Cache, overrides: list[str], compression: float = 0.2) -> Run:
    """SVD-LLM on SmolLM2 with its calibration set, as run.py builds them, with statistics and
    spectra in this cache.
    """
    experiment = typed("method=svd_llm", f"ratio.compression={compression}", *overrides)
    return replace(run_of(experiment, experiment.source.load(experiment.cache)), cache=cache)


def ours(run: Run, label: str) -> None:
    """Calibrate, factorize and pack with specomp; the cache decides what has to be computed."""
    with timed(f"{label} calibrate"):
        statistics = calibrate(run)
    with timed(f"{label} factorize"):
        compress(run, statistics)


def published(run: Run, label: str) -> None:
    """The same by the published procedure."""
    with timed(f"{label} calibrate"):
        decoder = run.family.decoder(run.model)
        grams = published_profile(decoder, run.model, run.linears, run.samples.batches())
    with timed(f"{label} factorize"):
        for linear in run.linears:
            module = run.model.get_submodule(linear.name)
            rank = rank_of(linear.m, linear.n, run.budget.share(run.model.dtype))
            U, Vt = published_factorize(module.weight.detach(), grams[linear.name], rank)
            place = {"dtype": module.weight.dtype, "device": module.weight.device}
            packed = LowRankLinear.from_factors(U, Vt, module.bias, **place)
            replace_linear(run.model, linear.name, packed)


def smollm2(options: argparse.Namespace) -> None:
    """Everything on SmolLM2, each from a freshly loaded model, interleaved over the repeats."""
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            ours(prepare(Cache(folder), options.overrides), "ours")
            ours(prepare(Cache(folder), options.overrides, 0.4), "second ratio")
        published(prepare(Cache("unused"), options.overrides), "published")
    factorize = {x: seconds[f"{x} factorize"] for x in ("ours", "second ratio", "published")}
    total = {x: seconds[f"{x} calibrate"] + spent for x, spent in factorize.items()}
    ratios = {
        "whole, published / ours": (total["published"] / total["ours"], 2),
        "factorize, published / ours": (factorize["published"] / factorize["ours"], 3),
        "first / second ratio, ours": (total["ours"] / total["second ratio"], 20),
    }
    for name, value in seconds.items():
        print(f"{name:28s} {value / options.repeats:8.2f} s")
    for name, (ratio, aim) in ratios.items():
        print(f"{name:32s} {ratio:6.2f}   (at least {aim})")


def llama7b_layer(options: argparse.Namespace) -> None:
    """One decoder layer of LLaMA-7B shapes: random weights, Grams with a decaying spectrum and
    a few dominant channels.
    """
    generator = torch.Generator().manual_seed(0)
    grams: dict[int, torch.Tensor] = {}
    for n in (4096, 11008):
        tokens = 2 * n if n == 4096 else 12288
        scale = torch.logspace(0, -1.5, n)[torch.randperm(n, generator=generator)]
        scale[:4] *= 30
        few = torch.randn(tokens, n // 4, generator=generator)
        x = few @ torch.randn(n // 4, n, generator=generator) / (n // 4) ** 0.5
        x = (x + 0.5 * torch.randn(tokens, n, generator=generator)) * scale
        grams[n] = x.T @ x
    # One linear of each shape is timed; a decoder layer has that many of them.
    for name, count, m, n in LLAMA_7B:
        W = torch.randn(m, n, generator=generator) / n**0.5
        rank = rank_of(m, n, retained(0.2))
        for label in ("ours", "published"):
            start = time.perf_counter()
            if label == "ours":
                keep = math.ceil(break_even_rank(m, n))
                factors = truncate(GramNorm(grams[n]).decompose(W, keep=keep), rank)
                U, Vt = factors.U, factors.Vt
            else:
                U, Vt = published_factorize(W, grams[n], rank)
            spent = time.perf_counter() - start
            seconds[label] = seconds.get(label, 0.0) + count * spent
            loss = GramNorm(grams[n]).loss(U @ Vt - W)
            print(f"{name:10s} {label:10s} {spent:7.1f} s each   loss {loss:.6g}", flush=True)
    theirs, own = seconds["published"], seconds["ours"]
    times = f"published {theirs:.1f} s, ours {own:.1f} s"
    print(f"one decoder layer: {times}, ratio {theirs / own:.2f}   (at least 5)")


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of one run each, in a fresh process, beside the model's own bytes."""
    for label in ("ours", "published"):
        what = ["--threads", str(options.threads), "memory_of", label, *options.overrides]
        done = subprocess.run(
            [sys.executable, __file__, *what], stdout=subprocess.PIPE, text=True, check=True
        )
        print(label, done.stdout.strip().splitlines()[-1])


def memory_of(options: argparse.Namespace) -> None:
    """Internal: one run, peak memory as JSON."""
    label, *overrides = options.overrides
    with tempfile.TemporaryDirectory() as folder:
        before = peak_memory()
        run = prepare(Cache(folder), overrides)
        own = sum(p.numel() * p.element_size() for p in run.model.parameters())
        loaded = peak_memory()
        (ours if label == "ours" else published)(run, label)
        peak = peak_memory()
        figures = {"imports": before, "model": own, "loaded": loaded, "peak": peak}
        figures["peak_minus_model"] = peak - own
        print(json.dumps({name: f"{value / 2**20:.0f} MiB" for name, value in figures.items()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["smollm2", "llama7b_layer", "memory", "memory_of"])
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of model, calibration, paths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    globals()[chosen.what](chosen)
