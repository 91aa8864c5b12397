"""Memory of a streamed model (model.stream=true), every run in a process of its own. Linux, whose
/proc tells the peaks.

    python experiments/benchmarks/streamed.py smollm2
    python experiments/benchmarks/streamed.py llama7b

smollm2: streamed against in memory, equal factors, peak memory of both. llama7b: a checkpoint of
LLaMA-7B shapes with 6 decoder layers, random weights. Further arguments are overrides of run.py for
every run. --folder: where caches, checkpoints and models go (a temporary folder otherwise).
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from specomp.cache import Cache
from specomp.experiment.config import composed
from specomp.experiment.pipeline import run
from specomp.models.save import Export
from specomp.models.sources import byte_tokenizer

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
COMMON = ("benchmark=none", "reference=false", "model.device=cpu")
MIB = 2**20


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("smollm2", "llama7b", "worker"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    known, overrides = parser.parse_known_args()
    if known.what == "worker":
        worker(known.folder, overrides)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = known.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shared = [f"threads={known.threads}", *COMMON]
        if known.what == "smollm2":
            smollm2(folder, [*shared, *overrides])
        else:
            llama7b(folder, known.layers, [*shared, *overrides])


def smollm2(folder: Path, overrides: list[str]) -> None:
    """SVD-LLM and AdaSVD at 40 %, streamed and not."""
    source = ["model=smollm2_135m", f"paths.cache={folder / 'converted'}"]
    cfg = composed(*source)
    converted = instantiate(cfg.model)._converted(Cache(str(cfg.paths.cache))).path
    print("method    stream  peak MiB  seconds")
    for method in ("svd_llm", "adasvd"):
        models = []
        for stream in ("false", "true"):
            where = folder / f"{method}-{stream}"
            model = local("smollm2", converted, "float32", stream)
            report = started(where, [*model, f"method={method}", "ratio=cr40", *overrides])
            models.append(Path(report["model"]))
            peak, seconds = report["peak"], report["seconds"]
            print(f"{method:9} {stream:6} {peak:9.0f} {seconds:8.1f}", flush=True)
        print(compared(*models), flush=True)


def llama7b(folder: Path, layers: int, overrides: list[str]) -> None:
    """SVD-LLM at 40 % on random weights, decoder layer by decoder layer."""
    checkpoint = folder / f"llama7b-{layers}"
    if not (checkpoint / "config.json").exists():
        write_checkpoint(checkpoint, layers)
    size = sum(x.stat().st_size for x in checkpoint.glob("*.safetensors"))
    print(f"checkpoint: {layers} decoder layers, {size / MIB:.0f} MiB")
    model = local("llama7b", checkpoint, "bfloat16", "true")
    method = ["method=svd_llm", "ratio=cr40", "method.whitening.solve=float32"]
    few = ["calibration.num_samples=8", "calibration.length=256", "calibration.batch_size=2"]
    report = started(folder / "run", [*model, *method, *few, *overrides])
    print("stage      decoder layer  seconds  peak MiB  held MiB")
    for stage, index, seconds, peak, after in report["steps"]:
        print(f"{stage:10} {index:13} {seconds:8.1f} {peak:9.0f} {after:10.0f}")
    print(f"in all: {report['seconds']:.1f} s, peak {report['peak']:.0f} MiB")


def local(name: str, path: Path | str, dtype: str, stream: str) -> list[str]:
    """Overrides for a model in a folder."""
    named = ["model=local", f"model.name={name}", f"model.path={path}"]
    return [*named, f"model.dtype={dtype}", f"model.stream={stream}"]


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random bfloat16 weights of LLaMA-7B shapes, one file for every decoder layer, so that writing
    takes the memory of one.
    """
    folder.mkdir(parents=True)
    what = {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], **LLAMA_7B}
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, **what)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).state_dict()
    generator, weight_map = torch.Generator().manual_seed(0), {}
    parts: dict[str, list[str]] = {}
    for name in empty:
        layer = re.search(r"layers\.\d+", name)
        parts.setdefault(layer.group() if layer else "rest", []).append(name)
    for part, names in sorted(parts.items()):
        state = {name: torch.ones(empty[name].shape, dtype=torch.bfloat16) for name in names}
        for name, numbers in state.items():
            if "norm" not in name:
                numbers.normal_(0, 0.02, generator=generator)
        file = f"model-{part.replace('.', '-')}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    byte_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)


def started(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the worker in a process of its own and read back its report."""
    command = [sys.executable, __file__, "worker", "--folder", str(folder), *overrides]
    threads = next(x for x in overrides if x.startswith("threads=")).partition("=")[2]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    return json.loads((folder / "report.json").read_text())  # type: ignore[no-any-return]


def worker(folder: Path, overrides: list[str]) -> None:
    """One run; reports its peak, and of every decoder layer, calibrated or compressed, the seconds,
    the peak and what was held after it.

    Held is anonymous memory: pages of files and libraries, which the peak counts too, come and go
    as the system likes.
    """
    logging.basicConfig(level=logging.WARNING)
    steps: list[tuple[str, int, float, float, float]] = []
    begun, peaks = time.perf_counter(), []

    def step(stage: str) -> None:
        nonlocal last
        peak, now = memory("VmHWM"), time.perf_counter()
        peaks.append(peak)
        index = sum(x[0] == stage for x in steps)
        steps.append((stage, index, now - last, peak, memory("RssAnon")))
        last = now
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    save, add = Cache.save, Export.add

    def saving(self: Cache, kind: str, *arguments: Any) -> None:
        save(self, kind, *arguments)
        if kind == "statistics":
            step("calibrate")

    def adding(self: Export, *arguments: Any) -> None:
        add(self, *arguments)
        step("compress")

    Cache.save, Export.add = saving, adding  # type: ignore[method-assign]
    last = begun
    places = (f"paths.cache={folder / 'cache'}", f"paths.outputs={folder / 'outputs'}")
    run(composed(*overrides, *places))
    [model] = (folder / "outputs" / "models").iterdir()
    report = {
        "model": str(model),
        "seconds": time.perf_counter() - begun,
        "peak": max([*peaks, memory("VmHWM")]),
        "steps": steps,
    }
    (folder / "report.json").write_text(json.dumps(report))


def memory(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def compared(whole: Path, streamed: Path) -> str:
    """The largest difference between the weights of two folders, beside the largest weight."""
    first, second = (
        {k: v for x in f.glob("*.safetensors") for k, v in load_file(x).items()}
        for f in (whole, streamed)
    )
    assert first.keys() == second.keys()
    difference = max(float((first[name] - second[name]).abs().max()) for name in first)
    equal = sum(torch.equal(first[name], second[name]) for name in first)
    largest = max(float(x.abs().max()) for x in first.values())
    sizes = f"largest difference {difference:.2g}, largest weight {largest:.3g}"
    return f"{'':9} {equal} of {len(first)} tensors are equal bit by bit; {sizes}"


if __name__ == "__main__":
    main()
