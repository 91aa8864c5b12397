"""Perplexity against stored bits of the decoder's linears: every record of one model on the same
text, whatever made it, and the front of those that nothing smaller beats.

    python experiments/pareto/pareto.py [--records FOLDER ...] [--model NAME] [--write FOLDER]

front.md; pareto.svg, all texts; wikitext-2.svg, the first alone.

Bits are what is stored: values on their grids, scales, zeros, indices. Numbers on no grid count 16
bits each, whatever the evaluation held them in. Trained rows are left out.
"""

import argparse
import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from specomp.experiment.label import changes, method_name
from specomp.experiment.record import COMMITTED, Record, RecordStore, companions

# Perplexity on these texts, in these windows; products in bfloat16 change them by a thousandth.
TEXTS = {
    "WikiText-2": r"wikitext2@1:512x24(:bf16)?:\w+",
    "C4": r"c4@1:512x8(:bf16)?:\w+",
    "code": r"code@1:512x8(:bf16)?:\w+",
}
HELD = 16  # bits of a number on no grid
TOP = 12  # of a panel, times the dense model's perplexity


@dataclass(frozen=True)
class Spot:
    """One model on one text."""

    name: str
    bits: float
    value: float
    dense: float


def stored_bits(record: Record) -> float:
    """A weight."""
    found = record.counted
    if not found.compressed.linear_bits:  # from before bits were counted: nothing was rounded then
        return HELD * found.measured_retention
    held = found.dense.linear_bits / found.dense.linear_params
    (path,) = companions([RecordStore(COMMITTED)], record, "linears.csv") or [None]
    linears = [] if path is None else list(csv.DictReader(path.read_text().splitlines()))
    plain = sum(int(x["stored"]) for x in linears if not x.get("quantization_error"))
    if not linears:
        plain = found.compressed.linear_params
    return found.measured_bits - plain * (held - HELD) / found.dense.linear_params


def name_of(record: Record) -> str:
    """Method and what differs from its row."""
    words = [method_name(record.choices, record.config)]
    words += changes(record.choices, record.config.get("overrides") or [])
    return " ".join(x.removeprefix("method/") for x in words if "bits=" not in x)


def spots(records: Iterable[Record], model: str, pattern: str) -> list[Spot]:
    """Of all closed-form records of a model on a text, the fewest bits first."""
    found = []
    for record in records:
        if record.label("model") != model or record.status != "ok" or record.training:
            continue
        if str(record.choices.get("method")) == "dense" and not record.counted.in_bits:
            continue
        bits = stored_bits(record)
        for name, metrics in record.metrics.items():
            if re.fullmatch(pattern, name):
                dense = record.dense_metrics.get(name, {}).get("ppl")
                if dense:
                    found.append(Spot(name_of(record), bits, metrics["ppl"], dense))
    return sorted(found, key=lambda x: (round(x.bits, 2), x.value))


def front(found: Sequence[Spot]) -> list[Spot]:
    """Those that no other of as few bits beats; found: the fewest bits first."""
    kept: list[Spot] = []
    for spot in found:
        if not kept or spot.value < kept[-1].value:
            kept.append(spot)
    return kept


def draw(by_text: dict[str, list[Spot]]) -> Figure:
    """A panel a text: the front in colour with its rows' names, all else grey."""
    figure = Figure(figsize=(6.4, 3.4 * len(by_text)), layout="constrained")
    panels = figure.subplots(len(by_text), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (text, found) in zip(panels, by_text.items(), strict=True):
        best = front(found)
        others = [x for x in found if x not in best]
        grey = {"color": "0.75", "label": "other rows, low rank in 16 bits among them"}
        axes.plot([x.bits for x in others], [x.value for x in others], ".", **grey)
        for name in dict.fromkeys(x.name for x in best):
            mine = [x for x in best if x.name == name]
            axes.plot(
                [x.bits for x in mine], [x.value for x in mine], "o", markersize=4, label=name
            )
        line = {"color": "0.4", "linewidth": 1, "zorder": 0}
        axes.plot([x.bits for x in best], [x.value for x in best], **line)
        if found:
            axes.axhline(found[0].dense, color="0.5", linewidth=1, linestyle=":", label="dense")
            axes.set_ylim(0.85 * found[0].dense, TOP * found[0].dense)
        axes.set(yscale="log", ylabel=f"{text} perplexity", xlim=(2, 14))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=7, loc="upper right")
    panels[-1].set_xlabel("stored bits a weight of the decoder's linears")
    return figure


def table(by_text: dict[str, list[Spot]]) -> str:
    """The fronts, in Markdown."""
    lines = ["| text | bits | perplexity | over dense | row |", "|---|---|---|---|---|"]
    for text, found in by_text.items():
        for x in front(found):
            ratio = f"{x.value / x.dense:.3f}"
            lines.append(f"| {text} | {x.bits:.2f} | {x.value:.2f} | {ratio} | `{x.name}` |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", nargs="+", type=Path, default=[COMMITTED])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--write", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args(arguments)
    records = [x for folder in asked.records for x in RecordStore(folder).all()]
    by_text = {text: spots(records, asked.model, pattern) for text, pattern in TEXTS.items()}
    asked.write.mkdir(parents=True, exist_ok=True)
    (asked.write / "front.md").write_text(table(by_text))
    drawn = {"metadata": {"Date": None, "Creator": None}}  # the same file from the same records
    matplotlib.rcParams["svg.hashsalt"] = "specomp"
    draw(by_text).savefig(asked.write / "pareto.svg", **drawn)
    first = next(iter(TEXTS))
    draw({first: by_text[first]}).savefig(asked.write / f"{first.lower()}.svg", **drawn)
    print(table(by_text))


if __name__ == "__main__":
    main()
