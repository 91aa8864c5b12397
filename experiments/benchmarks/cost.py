"""Cost of specomp against the published procedure, as ratios. See README.md in this folder."""

import argparse
import functools
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from published import factorize as published_factorize
from published import profile as published_profile

from specomp.cache import Cache, digest
from specomp.numerics.factors import GramNorm, truncate
from specomp.slots import Method
from specomp.models.modules import LowRankLinear, replace_linear
from specomp.numerics.ratio import Ratio, break_even_rank, rank_for_retention
from specomp.experiment.record import peak_memory
from specomp.compression.calibrate import dense_statistics
from specomp.compression.loop import compress
from specomp.compression.spectra import DenseSpectra
from specomp.compression.probe import make_probe
from specomp.compression.run import Setup

ROOT = Path(__file__).resolve().parents[2]
seconds: dict[str, float] = {}


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time of a block to `seconds`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def prepare(cache: Cache, overrides: list[str]) -> tuple[Setup, Method, Any]:
    """SmolLM2 with its calibration set, as run.py builds them."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["method=svd_llm", *overrides])
    source = instantiate(cfg.model)
    converted = Cache(Path("~/.cache/specomp").expanduser()) if cfg.paths.cache is None else Cache(str(cfg.paths.cache))
    loaded = source.load(converted)
    calibration = instantiate(cfg.calibration)
    setup = Setup(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        family=loaded.family,
        linears=loaded.family.linears(loaded.model),
        calibration=calibration,
        samples=calibration.build(loaded.tokenizer, max_length=source.max_length(converted)),
        cache=cache,
        model_key=digest(source.fingerprint(converted)),
        trainer=functools.partial(instantiate(cfg.trainer)),
    )
    return setup, instantiate(cfg.method), instantiate(cfg.quantizer)


def ours(setup: Setup, method: Method, quantizer: Any, compression: float, label: str) -> None:
    """Calibrate, factorize and pack with specomp; the cache decides what has to be computed."""
    with timed(f"{label} calibrate"):
        dense = dense_statistics(setup, method.whitening.needs)
    spectra = DenseSpectra(setup, method.target, method.whitening, dense)
    with timed(f"{label} factorize"):
        ranks = method.allocation(
            setup.linears, Ratio(compression=compression), dense, spectra, method.packing.stored, make_probe(setup, spectra, method.packing)
        )
        compress(setup, method, quantizer, ranks, spectra, dense)


def published(setup: Setup, compression: float, label: str) -> None:
    """The same by the published procedure."""
    with timed(f"{label} calibrate"):
        batches = list(setup.samples.predict_dataloader())
        grams = published_profile(setup.family.decoder(setup.model), setup.model, setup.linears, batches)
    with timed(f"{label} factorize"):
        for linear in setup.linears:
            module = setup.model.get_submodule(linear.name)
            rank = rank_for_retention(linear.m, linear.n, Ratio(compression=compression).retention)
            U, Vt = published_factorize(module.weight.detach(), grams[linear.name], rank)
            packed = LowRankLinear.from_factors(U, Vt, module.bias, dtype=module.weight.dtype, device=module.weight.device)
            replace_linear(setup.model, linear.name, packed)


def smollm2(options: argparse.Namespace) -> None:
    """Everything on SmolLM2, each from a freshly loaded model, interleaved over the repeats."""
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            ours(*prepare(Cache(folder), options.overrides), compression=0.2, label="ours")
            ours(*prepare(Cache(folder), options.overrides), compression=0.4, label="second ratio")
        published(prepare(Cache("unused"), options.overrides)[0], compression=0.2, label="published")
    total = {x: seconds[f"{x} calibrate"] + seconds[f"{x} factorize"] for x in ("ours", "second ratio", "published")}
    for name, value in seconds.items():
        print(f"{name:28s} {value / options.repeats:8.2f} s")
    print(f"whole, published / ours          {total['published'] / total['ours']:6.2f}   (at least 2)")
    print(f"factorize, published / ours      {seconds['published factorize'] / seconds['ours factorize']:6.2f}   (at least 3)")
    print(f"first / second ratio, ours       {total['ours'] / total['second ratio']:6.2f}   (at least 20)")


def llama7b_layer(options: argparse.Namespace) -> None:
    """One decoder layer of LLaMA-7B shapes: random weights, Grams with a decaying spectrum and a few dominant channels."""
    generator = torch.Generator().manual_seed(0)
    grams: dict[int, torch.Tensor] = {}
    for n in (4096, 11008):
        tokens = 2 * n if n == 4096 else 12288
        scale = torch.logspace(0, -1.5, n)[torch.randperm(n, generator=generator)]
        scale[:4] *= 30
        x = torch.randn(tokens, n // 4, generator=generator) @ torch.randn(n // 4, n, generator=generator) / (n // 4) ** 0.5
        x = (x + 0.5 * torch.randn(tokens, n, generator=generator)) * scale
        grams[n] = x.T @ x
    # One linear of each shape is timed; a decoder layer has that many of them.
    for name, count, m, n in (("q, k, v, o", 4, 4096, 4096), ("gate, up", 2, 11008, 4096), ("down", 1, 4096, 11008)):
        W = torch.randn(m, n, generator=generator) / n**0.5
        rank = rank_for_retention(m, n, 0.8)
        for label in ("ours", "published"):
            start = time.perf_counter()
            if label == "ours":
                factors = truncate(GramNorm(grams[n]).decompose(W, keep=math.ceil(break_even_rank(m, n))), rank)
                U, Vt = factors.U, factors.Vt
            else:
                U, Vt = published_factorize(W, grams[n], rank)
            spent = time.perf_counter() - start
            seconds[label] = seconds.get(label, 0.0) + count * spent
            print(f"{name:10s} {label:10s} {spent:7.1f} s each   loss {GramNorm(grams[n]).loss(U @ Vt - W):.6g}", flush=True)
    theirs, own = seconds["published"], seconds["ours"]
    print(f"one decoder layer: published {theirs:.1f} s, ours {own:.1f} s, ratio {theirs / own:.2f}   (at least 5)")


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of one run each, in a fresh process, beside the model's own bytes."""
    for label in ("ours", "published"):
        command = [sys.executable, __file__, "memory_of", label, "--threads", str(options.threads), *options.overrides]
        print(label, subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])


def memory_of(options: argparse.Namespace) -> None:
    """Internal: one run, peak memory as JSON."""
    label, *overrides = options.overrides
    with tempfile.TemporaryDirectory() as folder:
        before = peak_memory()
        setup, method, quantizer = prepare(Cache(folder), overrides)
        own = sum(p.numel() * p.element_size() for p in setup.model.parameters())
        loaded = peak_memory()
        if label == "ours":
            ours(setup, method, quantizer, 0.2, label)
        else:
            published(setup, 0.2, label)
        figures = {"imports": before, "model": own, "loaded": loaded, "peak": peak_memory(), "peak_minus_model": peak_memory() - own}
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
