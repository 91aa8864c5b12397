"""Tokens/s in vLLM of compressed folders over those of the dense one, prefill and decode apart.

    python experiments/serving/speed.py .serving/bin/python [--dtype bfloat16] [NAME ...]

All engines are up in one run and take turns, so that a busy machine slows all of them; a ratio is
the mean over the rounds, with twice its standard error. Dense is served by the same backend as the
folders (transformers), and by vLLM's own class.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

from compare import by_engine, smollm2, text_ids

import specomp
from specomp.settings import default_cache

SHAPE = {"length": 256, "prompt": 128, "new": 32}
Seconds = list[tuple[float, float]]  # of prefill and decode, round by round


def row_of(name: str) -> tuple[specomp.Method, float]:
    """Row and ratio of a name such as svd_llm-factors-20."""
    row, packing, removed = name.split("-")
    return specomp.method(row, packing=packing), int(removed) / 100


def ratios(dense: Seconds, own: Seconds) -> list[str]:
    """Of prefill, then decode."""
    said = []
    for part in (0, 1):
        each = [x[part] / y[part] for x, y in zip(dense, own, strict=True)]
        said.append(f"{mean(each):.2f} ± {2 * stdev(each) / len(each) ** 0.5:.2f}")
    return said


def main() -> None:
    """One table."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("python", type=Path, help="of the environment that has vLLM")
    parser.add_argument("names", nargs="+", help="row-packing-percent, such as svd_llm-factors-20")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        dense = str(Path(temporary) / "dense")
        smollm2().save_pretrained(dense)
        folders = {"dense": (dense, True), "dense, vLLM's own class": (dense, False)}
        for name in typed.names:
            model, (row, ratio) = smollm2(), row_of(name)
            tokens = text_ids()[: 16 * 256].reshape(16, 256)
            specomp.compress(model, tokens, row, ratio, cache=default_cache())
            specomp.save(model, Path(temporary) / name)
            folders[name] = (str(Path(temporary) / name), True)
        job = {"folders": folders, "dtype": typed.dtype, "rounds": typed.rounds, **SHAPE}
        found = by_engine(typed.python, "speed", {**job, "batches": typed.batches})

    def seconds(name: str, batch: int) -> Seconds:
        return [(a, both - a) for x, at, a, both in found if (x, at) == (name, batch)]

    parts = " | ".join(f"prefill, batch {x} | decode, batch {x}" for x in typed.batches)
    print(f"| tokens/s over dense | {parts} |\n|{'---|' * (1 + 2 * len(typed.batches))}")
    for name in list(folders)[1:]:
        cells = [y for x in typed.batches for y in ratios(seconds("dense", x), seconds(name, x))]
        print(f"| {name} | {' | '.join(cells)} |")
    for batch in typed.batches:
        prefill, decode = (mean(x) for x in zip(*seconds("dense", batch), strict=True))
        read, written = batch * SHAPE["prompt"] / prefill, batch * SHAPE["new"] / decode
        print(f"dense, batch {batch}: {read:.0f} and {written:.0f} tokens/s")


if __name__ == "__main__":
    main()
