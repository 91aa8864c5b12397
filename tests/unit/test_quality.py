"""How much of the dense model's accuracy is kept, and what the number says it counts."""

import io
from typing import Any

import pytest
from ledgers import made_ledger
from rich.console import Console

from specomp.evaluation.quality import kept_accuracy
from specomp.experiment.record import Record
from specomp.experiment.summary import show

DENSE = {
    "piqa@1": {"acc": 0.8, "acc_norm": 0.9},
    "gsm8k@3": {"exact_match.strict-match": 0.2, "exact_match.flexible-extract": 0.9},
    "wikitext2@1": {"ppl": 10.0},
}
SMALL = {
    "piqa@1": {"acc": 0.7, "acc_norm": 0.1, "chance": 0.5},
    "gsm8k@3": {
        "exact_match.strict-match": 0.15,
        "exact_match.flexible-extract": 0.1,
        "chance": 0.0,
    },
    "wikitext2@1": {"ppl": 20.0},
}


def test_by_hand() -> None:
    kept = kept_accuracy(SMALL, DENSE)
    assert kept is not None and (kept.counted, kept.counted_above, kept.left_out) == (2, 2, {})
    assert kept.plain == pytest.approx((0.7 / 0.8 + 0.15 / 0.2) / 2)
    assert kept.above == pytest.approx(((0.7 - 0.5) / (0.8 - 0.5) + 0.15 / 0.2) / 2)
    assert str(kept) == (
        "accuracy kept: 81.2% of the dense model's (mean of score / dense over 2 tasks); 70.8%"
        " of what it has above chance (mean of (score - chance) / (dense - chance) over 2)"
    )


def test_what_is_left_out_is_said() -> None:
    more = {"copa@1": {"acc": 0.5, "chance": 0.5}, "mc2@3": {"acc": 0.3}, "ifeval@4": {"acc": 0.0}}
    none = {"copa@1": {"acc": 0.4}, "mc2@3": {"acc": 0.4}, "ifeval@4": {"acc": 0.0}}
    kept = kept_accuracy(SMALL | more, DENSE | none)
    assert kept is not None and (kept.counted, kept.counted_above) == (4, 2)
    assert kept.plain == pytest.approx((0.7 / 0.8 + 0.15 / 0.2 + 0.5 / 0.4 + 0.3 / 0.4) / 4)
    assert str(kept).endswith(
        "; not counted above chance: copa@1: the dense model's 0.4000 is not above 0.5000; mc2@3:"
        " chance not known; ifeval@4: the dense model's is 0 (in neither mean)"
    )
    only = kept_accuracy({x: {"acc": 1.0} for x in "ab"}, {x: {"acc": 1.0} for x in "ab"})
    assert only is not None and only.above is None and "of what it has above" not in str(only)


def test_one_benchmark_needs_no_mean() -> None:
    assert kept_accuracy({"piqa@1": {"acc": 0.7}}, DENSE) is None
    assert kept_accuracy(SMALL, {}) is None


def test_the_summary_says_it() -> None:
    def printed(dense: Any) -> str:
        out = io.StringIO()
        record = Record(
            key="abcdef0123456789",
            choices={"model": "tiny_llama", "method": "svd"},
            ledger=made_ledger(),
            metrics=SMALL,
            dense_metrics=dense,
        )
        show(record, console=Console(file=out, width=250, force_terminal=False))
        return out.getvalue()

    assert str(kept_accuracy(SMALL, DENSE)) in printed(DENSE)
    assert "gsm8k@3 exact_match.strict-match" in printed(DENSE) and "0.1500" in printed(DENSE)
    assert "chance" not in printed({}), "what a number was measured on is no result"
