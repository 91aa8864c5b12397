"""Names and values of records are text in every format, and two different things have two names."""

import csv
import io
import re

import pytest

from specomp.experiment.label import (
    changes,
    folder_name,
    method_name,
    ratio_name,
    run_name,
    text_name,
)
from specomp.experiment.tracking import LONGEST, shown
from specomp.tables.render import (
    as_csv,
    as_file,
    as_html,
    as_latex,
    as_markdown,
    as_markdown_cell,
    captioned,
    render,
)

EVIL = [
    '=HYPERLINK("http://x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    " =1+1",
    "\t=1+1",
    "a|b",
    "a\nb",
    "a\r\nb",
    "`code`",
    "<script>alert(1)</script>",
    "[x](javascript:1)",
    "\\input{/etc/passwd}",
    "a_b%c&d#e{f}$g^h~i",
    'a,b;"c"',
    "\u2028x",
]


@pytest.mark.parametrize("text", EVIL, ids=repr)
def test_markdown_keeps_its_rows_and_columns(text):
    lines = render(["name", text], [[text, "1.0"], ["plain", text]], "markdown").splitlines()
    assert len(lines) == 4
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines)
    assert "<" not in "".join(lines) and "](" not in "".join(lines)
    assert all(re.sub(r"\\`", "", line).count("`") == 0 for line in lines)


@pytest.mark.parametrize("text", EVIL, ids=repr)
def test_csv_has_no_formula_and_no_line_breaks_in_cells(text):
    written = render(["name", "value"], [[text, "-1.5"]], "csv")
    header, (cell, number) = csv.reader(io.StringIO(written))
    assert header == ["name", "value"] and number == "-1.5"
    assert not cell.lstrip().startswith(("=", "+", "-", "@")) and "\n" not in cell


@pytest.mark.parametrize("number", ["-1.5", "+2.0 %", "--", "-3e-05", "-inf", "0.1", ""])
def test_numbers_stay_numbers_in_csv(number):
    assert as_csv(number) == number


@pytest.mark.parametrize("text", EVIL, ids=repr)
def test_latex_has_no_command_of_the_text(text):
    made = captioned(render(["a"], [[text]], "latex"), text)
    ours = r"textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textbf|emph"
    for command in re.findall(r"\\([a-z]+)", as_latex(text)):
        assert re.fullmatch(ours, command)
    assert not re.search(r"(?<!\\)[%&#$]", as_latex(text))
    assert "\\caption{" in made and made.count("\n\\end{table}") == 1


def test_html_escapes_but_for_our_marks():
    assert as_html("<b>x</b> `y` **z**") == "&lt;b&gt;x&lt;/b&gt; <code>y</code> <b>z</b>"


def test_lines_of_markdown_keep_code():
    assert as_markdown("made by `run x=[1](2) <y>`, <i>") == "made by `run x=[1](2) <y>`, &lt;i>"
    assert as_markdown_cell("a\\|b") == "a\\\\\\|b"


@pytest.mark.parametrize("text", ["../../x", "a/b\\c", "..", "", "ü" * 300, "x" * 300])
def test_files_are_named_safely(text):
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,99}", as_file(text))


def test_wandb_names_are_one_short_line():
    assert shown("a\nb\x00c") == "a b c"
    assert len(shown("x" * 500)) == LONGEST


# ---- names

CR40 = {"_target_": "specomp.forms.prices.Numbers", "compression": 0.4}
CHOICES = {"model": "local", "method": "svd_llm", "ratio": "cr40", "calibration": "pydocs"}


def config(**more):
    return {"model": {"name": "alpha"}, "method": {"name": "svd_llm"}, "ratio": CR40} | more


def test_a_ratio_is_called_by_its_numbers_where_they_are_not_those_of_its_choice():
    assert ratio_name("cr40", CR40) == "cr40"
    assert ratio_name("cr40", CR40 | {"compression": 0.333}) == "compression=0.333"
    assert ratio_name("bits", {"bits": 4.0}) == "bits"
    assert ratio_name("bits", {"bits": 3.4}) == "bits=3.4"
    assert ratio_name("mine", {"compression": 0.4}) == "compression=0.4"
    assert ratio_name("cr40", None) == "cr40"


DIFFERENT = [
    (CHOICES, config()),
    (CHOICES, config(model={"name": "beta"})),
    (CHOICES, config(method={"name": "own"})),
    (CHOICES, config(ratio=CR40 | {"compression": 0.333})),
    (CHOICES, config(ratio=CR40 | {"compression": 0.3334})),
    (CHOICES, config(overrides=["method.whitening.solve=float32"])),
    (CHOICES, config(overrides=["seed=3"])),
    (CHOICES | {"method/packing": "pivoted"}, config()),
    (CHOICES | {"quantizer": "rtn_int4"}, config()),
    (CHOICES | {"calibration": "mix"}, config()),
    (CHOICES, config(corpus={"name": "mine"})),
    (CHOICES | {"method": "dense", "ratio": "dense"}, config()),
]


def test_two_different_things_never_share_a_name():
    names = [run_name(*x) for x in DIFFERENT]
    assert len(set(names)) == len(names)
    assert names[0] == "alpha svd_llm cr40 pydocs"
    assert not any("cr40" in run_name(*x) for x in DIFFERENT[3:5])


def test_a_dense_reference_is_no_compressed_model():
    """Its record has the config of the run that measured it."""
    choices, of = DIFFERENT[-1]
    assert method_name(choices, of) == "dense"
    assert changes(choices, ["method.whitening.solve=float32", "seed=1"]) == []
    assert run_name(choices, of) == "alpha dense"


def test_folders_are_named_by_model_row_and_exact_ratio():
    assert folder_name(*DIFFERENT[0]) == "alpha-svd_llm-cr40"
    assert folder_name(*DIFFERENT[3]) == "alpha-svd_llm-compression_0.333"
    evil = config(model={"name": "../../x y"}, method={"name": "a/b" * 50})
    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,99}", folder_name(CHOICES, evil))


def test_the_text_is_that_of_the_corpus_where_one_is_chosen():
    assert text_name(CHOICES, config(corpus={"name": "mine"})) == "mine"
    assert text_name(CHOICES, config()) == "pydocs"
