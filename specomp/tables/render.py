"""Text in rows and columns as markdown, csv or LaTeX (booktabs)."""

import re
from collections.abc import Sequence
from typing import Literal

import pandas

Form = Literal["markdown", "csv", "latex"]
FORMS: tuple[Form, ...] = ("markdown", "csv", "latex")
MISSING = "--"
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"}
ESCAPE = str.maketrans(SPECIAL | {x: f"\\{x}" for x in "_%&#{}$"})
NUMBER = re.compile(
    r"(\*\*)?[+-]?[\d.,]+( ?%)?( ± [\d.e+-]+)?(\*\*)?( (\*collapsed\*|\(collapsed\)))?|--|nan|inf|"
)
# What a wide table is made as narrow as the text by; a narrow one stays as it is.
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def render(header: Sequence[str], body: Sequence[Sequence[str]], form: Form) -> str:
    """The table as text that ends with a newline. A **bold** cell is bold in LaTeX too."""
    if form == "markdown":
        return _markdown(header, body)
    frame = pandas.DataFrame(body, columns=list(header))
    if form == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    numeric = [all(NUMBER.fullmatch(line[i]) for line in body) for i in range(len(header))]
    text = frame.map(_latex).to_latex(
        index=False,
        header=[_latex(x) for x in header],
        column_format="".join("r" if x else "l" for x in numeric),
    )
    return f"% \\usepackage{{booktabs,graphicx}}\n{FIT}\n{text}}}\n"


def captioned(tabular: str, caption: str) -> str:
    """A LaTeX table as a float."""
    title = f"\\caption{{{_latex(caption)}}}"
    return f"\\begin{{table}}[t]\n\\centering\n{title}\n{tabular}\\end{{table}}\n"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Not pandas' own: that leaves two more blanks in every column."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (header, *body)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _latex(cell: str) -> str:
    text = re.sub(r"^\*\*(.*)\*\*", r"\\textbf{\1}", cell.translate(ESCAPE))
    return re.sub(r"\*(\w+)\*", r"\\emph{\1}", text)
