"""Text in rows and columns as markdown, csv or LaTeX (booktabs), or as a part of an HTML page.

Names and messages come from records, which anyone may have written: what means something in a
format is escaped here, one function a format. Of markdown only **bold**, *emphasis* and `code` stay
what they are.
"""

import html
import re
from collections.abc import Sequence
from typing import Literal

import pandas

Form = Literal["markdown", "csv", "latex"]
FORMS: tuple[Form, ...] = ("markdown", "csv", "latex")
MISSING = "--"
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"}
SPECIAL |= {x: f"\\{x}" for x in "_%&#{}$"}
SPACE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")  # a cell is one line
CODE = re.compile(r"(`[^`]+`)")
FORMULA = ("=", "+", "-", "@")
NUMBER = re.compile(
    r"(\*\*)?[+-]?[\d.,]+( ?%)?( ± [\d.e+-]+)?( \(\d+( of \d+)?\))?(\*\*)?"
    r"( (\*collapsed\*|\(collapsed\)))?"
    r"|--|nan|inf|"
)
# What a wide table is made as narrow as the text by; a narrow one stays as it is.
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def render(header: Sequence[str], body: Sequence[Sequence[str]], form: Form) -> str:
    """The table as text that ends with a newline. A **bold** cell is bold in LaTeX too."""
    if form == "markdown":
        cells = [[as_markdown_cell(x) for x in line] for line in (header, *body)]
        return _markdown(cells[0], cells[1:])
    if form == "csv":
        frame = pandas.DataFrame([[*map(as_csv, x)] for x in body], columns=[*map(as_csv, header)])
        return str(frame.to_csv(index=False, lineterminator="\n"))
    numeric = [all(NUMBER.fullmatch(line[i]) for line in body) for i in range(len(header))]
    frame = pandas.DataFrame([[*map(as_latex, x)] for x in body], columns=list(header))
    text = frame.to_latex(
        index=False,
        header=[as_latex(x) for x in header],
        column_format="".join("r" if x else "l" for x in numeric),
    )
    return f"% \\usepackage{{booktabs,graphicx}}\n{FIT}\n{text}}}\n"


def one_line(text: str) -> str:
    """Text without line breaks and other control characters."""
    return SPACE.sub(" ", text)


def as_markdown(text: str) -> str:
    """A line of markdown: nothing outside of `code` is HTML or a link."""
    parts = CODE.split(one_line(text))
    parts[::2] = [x.replace("<", "&lt;").replace("](", "]\\(") for x in parts[::2]]
    return "".join(parts)


def as_markdown_cell(text: str) -> str:
    """A cell of markdown, which ends at no bar of its text and has no `code`."""
    escaped = one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")
    return escaped.replace("<", "&lt;").replace("](", "]\\(")


def as_csv(text: str) -> str:
    """A cell of a csv: text that a spreadsheet would calculate begins with an apostrophe."""
    line = one_line(text)
    calculated = line.lstrip().startswith(FORMULA) and not NUMBER.fullmatch(line)
    return f"'{line}" if calculated and not is_number(line) else line


def as_latex(text: str) -> str:
    """A cell or a caption of LaTeX."""
    text = "".join(SPECIAL.get(x, x) for x in one_line(text))
    text = re.sub(r"^\*\*(.*)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"\*(\w+)\*", r"\\emph{\1}", text)


def as_html(text: str) -> str:
    """Text in a page."""
    marks = {r"`([^`]+)`": "code", r"\*\*(.+?)\*\*": "b", r"\*(\w+)\*": "em"}
    text = html.escape(one_line(text))
    for pattern, tag in marks.items():
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


def as_file(text: str) -> str:
    """A part of the name of a file."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:100] or "unnamed"


def captioned(tabular: str, caption: str) -> str:
    """A LaTeX table as a float."""
    title = f"\\caption{{{as_latex(caption)}}}"
    return f"\\begin{{table}}[t]\n\\centering\n{title}\n{tabular}\\end{{table}}\n"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Not pandas' own: that leaves two more blanks in every column."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (header, *body)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def is_number(text: str) -> bool:
    """Whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
