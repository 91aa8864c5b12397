"""Text in rows and columns as markdown, csv or LaTeX (booktabs)."""

import re
from collections.abc import Sequence
from typing import Literal

import pandas

Form = Literal["markdown", "csv", "latex"]
FORMS: tuple[Form, ...] = ("markdown", "csv", "latex")
MISSING = "--"
ESCAPE = str.maketrans(
    {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "{": r"\{", "}": r"\}"}
)


def render(header: Sequence[str], body: Sequence[Sequence[str]], form: Form) -> str:
    """The table as text that ends with a newline. A **bold** cell is bold in LaTeX too."""
    if form == "markdown":
        return _markdown(header, body)
    frame = pandas.DataFrame(body, columns=list(header))
    if form == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    text = frame.map(_latex).to_latex(
        index=False, header=[_latex(x) for x in header], column_format="l" * len(header)
    )
    return str(text)


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Not pandas' own: that leaves two more blanks in every column."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (header, *body)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _latex(cell: str) -> str:
    return re.sub(r"^\*\*(.*)\*\*$", r"\\textbf{\1}", cell.translate(ESCAPE))
