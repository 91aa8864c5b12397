"""Compression and retention meet here, and nowhere else: `1 -` for a ratio is written once in the
package.
"""


def retained(compression: float) -> float:
    """Fraction kept when `compression` is removed: the only place where one is made from
    the other.
    """
    return 1 - compression


def break_even_rank(m: int, n: int) -> float:
    """m n / (m + n): from here on two factors of an m x n matrix hold as many numbers as the
    matrix.
    """
    return m * n / (m + n)
