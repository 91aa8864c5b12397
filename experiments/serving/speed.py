"""Tokens/s in vLLM of compressed folders over those of the dense one, prefill and decode apart.

    python experiments/serving/speed.py .serving/bin/python svd_llm-factors-20 specomp-pivoted-40
    python experiments/serving/speed.py .serving/bin/python --shapes factors-20 cut-40-64

SmolLM2: row-packing-percent; with --shapes six decoder layers of LLaMA-7B with random weights:
form-percent, or form-percent-multiple, of which ranks and inner dimensions are then. Take two or
three: all engines are up in one run and take turns, so that a busy machine slows all of them; a
ratio is the mean over the rounds, with twice its standard error. Dense is served by the same
backend as the folders (transformers), and by vLLM's own class.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import shapes
from compare import by_engine, smollm2, text_ids
from transformers import PreTrainedModel

import specomp
from specomp.settings import default_cache

SHAPE = {"length": 256, "prompt": 128, "new": 32}
OWN = "dense, vLLM's own class"
Seconds = list[tuple[float, float]]  # of prefill and decode, round by round


def compressed(name: str) -> PreTrainedModel:
    """SmolLM2, by a name such as svd_llm-factors-20."""
    row, packing, removed = name.split("-")
    model, tokens = smollm2(), text_ids()[: 16 * 256].reshape(16, 256)
    method = specomp.method(row, packing=packing)
    specomp.compress(model, tokens, method, int(removed) / 100, cache=default_cache())
    return model


def of_shapes(name: str) -> PreTrainedModel:
    """By a name such as factors-20 or factors-20-64."""
    form, removed, *multiple = name.split("-")
    return shapes.small(form, int(removed) / 100, *map(int, multiple))


def ratios(dense: Seconds, own: Seconds) -> list[str]:
    """Of prefill, then decode."""
    said = []
    for part in (0, 1):
        each = [x[part] / y[part] for x, y in zip(dense, own, strict=True)]
        said.append(f"{mean(each):.2f} ± {2 * stdev(each) / len(each) ** 0.5:.2f}")
    return said


def weights(folder: str) -> int:
    """Bytes of a folder's weights."""
    return sum(x.stat().st_size for x in Path(folder).glob("*.safetensors"))


def main() -> None:
    """One table."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("python", type=Path, help="of the environment that has vLLM")
    parser.add_argument("names", nargs="+", help="of folders")
    parser.add_argument("--shapes", action="store_true", help="of LLaMA-7B, random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile in place of eager")
    typed = parser.parse_intermixed_args()
    make: Callable[[str], PreTrainedModel] = of_shapes if typed.shapes else compressed
    with tempfile.TemporaryDirectory() as temporary:
        dense = str(Path(temporary) / "dense")
        (shapes.dense() if typed.shapes else smollm2()).save_pretrained(dense)
        folders = {"dense": (dense, True), OWN: (dense, False)}
        for name in typed.names:
            specomp.save(make(name), Path(temporary) / name)
            folders[name] = (str(Path(temporary) / name), True)
        sizes = {name: weights(folder) for name, (folder, _) in folders.items()}
        job = {"folders": folders, "dtype": typed.dtype, "rounds": typed.rounds, **SHAPE}
        job |= {"batches": typed.batches, "eager": not typed.compile}
        found = by_engine(typed.python, "speed", job)

    def seconds(name: str, batch: int) -> Seconds:
        return [(a, both - a) for x, at, a, both in found if (x, at) == (name, batch)]

    parts = " | ".join(f"prefill, batch {x} | decode, batch {x}" for x in typed.batches)
    head = "| tokens/s over dense | dense bytes / its own |"
    print(f"{head} {parts} |\n|{'---|' * (2 + 2 * len(typed.batches))}")
    for name in list(folders)[1:]:
        cells = [y for x in typed.batches for y in ratios(seconds("dense", x), seconds(name, x))]
        print(f"| {name} | {sizes['dense'] / sizes[name]:.2f} | {' | '.join(cells)} |")
    for batch in typed.batches:
        prefill, decode = (mean(x) for x in zip(*seconds("dense", batch), strict=True))
        read, written = batch * SHAPE["prompt"] / prefill, batch * SHAPE["new"] / decode
        print(f"dense, batch {batch}: {read:.0f} and {written:.0f} tokens/s")


if __name__ == "__main__":
    main()
