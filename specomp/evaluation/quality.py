"""How much of the dense model's accuracy is left, over several benchmarks at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

# The one that counts, the first that a benchmark has.
ACCURACIES = ("acc", "exact_match.strict-match", "prompt_level_strict_acc")
Metrics = Mapping[str, Mapping[str, float]]  # by benchmark id, then name


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Means over tasks, all weighted alike: of score / dense score, and of the same with the
    accuracy of guessing taken from both. left_out: id -> why it is not in the second.
    """

    plain: float
    counted: int
    above: float | None  # None: of no benchmark
    counted_above: int
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        """What it is, and what it counts."""
        text = (
            f"accuracy kept: {100 * self.plain:.1f}% of the dense model's (mean of score / dense"
            f" over {self.counted} tasks)"
        )
        if self.above is not None:
            text += (
                f"; {100 * self.above:.1f}% of what it has above chance (mean of"
                f" (score - chance) / (dense - chance) over {self.counted_above})"
            )
        left_out = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
        return text + (f"; not counted above chance: {left_out}" if left_out else "")


def kept_accuracy(metrics: Metrics, dense: Metrics) -> Kept | None:
    """Of the tasks with an accuracy of both models, each counted once: by its last result on all
    documents, else on some, and the languages of one task together. None where there are not two.
    Where the dense model is never right there is no quotient at all, where it is no better than
    guessing nothing is above chance.
    """
    plain: dict[str, list[float]] = {}
    above: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    last = {x.partition("@")[0]: x for x in sorted(metrics, key=lambda x: ":limit" not in x)}
    for task, name in last.items():
        values, group = metrics[name], re.sub(r"^xcopa_..$", "xcopa", task)
        accuracy = next((x for x in ACCURACIES if x in values), None)
        if accuracy is None or accuracy not in dense.get(name, {}):
            continue
        score, reference = values[accuracy], dense[name][accuracy]
        if reference == 0:
            left_out[name] = "the dense model's is 0 (in neither mean)"
            continue
        plain.setdefault(group, []).append(score / reference)
        chance = values.get("chance", dense[name].get("chance"))
        if chance is None:
            left_out[name] = "chance not known"
        elif reference <= chance:
            left_out[name] = f"the dense model's {reference:.4f} is not above {chance:.4f}"
        else:
            above.setdefault(group, []).append((score - chance) / (reference - chance))
    if len(plain) < 2:
        return None
    return Kept(
        plain=mean(map(mean, plain.values())),
        counted=len(plain),
        above=mean(map(mean, above.values())) if above else None,
        counted_above=len(above),
        left_out=left_out,
    )
