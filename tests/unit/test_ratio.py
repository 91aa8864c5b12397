"""Ratios, and the one place where retention is made from compression."""

import ast
from pathlib import Path

import pytest
from pydantic import ValidationError

import specomp
from specomp.forms.prices import Numbers
from specomp.numerics.ratio import break_even_rank, retained


def test_break_even_of_llama_7b():
    assert break_even_rank(4096, 4096) == 2048
    assert break_even_rank(4096, 11008) == pytest.approx(2985.2, abs=0.05)
    # Keeping every component of the seven linears costs 1.58 times the dense decoder layer.
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    whole = sum(min(m, n) * (m + n) for m, n in shapes) / sum(m * n for m, n in shapes)
    assert whole == pytest.approx(1.58, abs=0.005)


@pytest.mark.parametrize("compression", [-0.1, 1, 1.2, "much", float("nan")])
def test_compression_out_of_range_is_refused(compression):
    with pytest.raises(ValidationError, match="compression"):
        Numbers(compression=compression)


def test_dense_is_compression_zero():
    assert Numbers(compression=0).retention == 1


def one_minus(source: str) -> list[str]:
    """What is subtracted from a literal 1 in a source text."""
    return [
        ast.unparse(node.right)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and isinstance(node.left, ast.Constant)
        and node.left.value == 1
    ]


def test_retention_is_made_from_compression_once_in_the_package():
    words = ("compression", "retention", "ratio", "removed", "share")
    found = []
    for path in sorted(Path(specomp.__file__).parent.rglob("*.py")):
        subtracted = one_minus(path.read_text(encoding="utf-8"))
        found += [
            (path.name, operand)
            for operand in subtracted
            if any(word in operand.lower() for word in words)
        ]
    assert found == [("ratio.py", "compression")]
    assert retained(0.25) == 0.75
