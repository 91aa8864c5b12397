"""Text in rows and columns as markdown, csv or LaTeX (booktabs)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["markdown", "csv", "latex"]
FORMS: tuple[Form, ...] = ("markdown", "csv", "latex")
ESCAPE = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "{": r"\{", "}": r"\}"})


@dataclass(frozen=True)
class Bold:
    """A cell that is the best of its kind."""

    text: str


Cell = str | Bold


def render(header: Sequence[str], body: Sequence[Sequence[Cell]], form: Form) -> str:
    """The table as text that ends with a newline; csv has no bold."""
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([x.text if isinstance(x, Bold) else x for x in line] for line in body)
        return text.getvalue()
    if form == "latex":
        return _latex(header, body)
    lines = [list(header), *([f"**{x.text}**" if isinstance(x, Bold) else x for x in line] for line in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([aligned[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *aligned[1:]]) + "\n"


def _latex(header: Sequence[str], body: Sequence[Sequence[Cell]]) -> str:
    def text(cell: Cell) -> str:
        return r"\textbf{" + cell.text.translate(ESCAPE) + "}" if isinstance(cell, Bold) else cell.translate(ESCAPE)

    lines = [" & ".join(map(text, line)) + r" \\" for line in [list(header), *body]]
    parts = [
        r"\begin{tabular}{" + "l" * len(header) + "}",
        r"\toprule",
        lines[0],
        r"\midrule",
        *lines[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"
