"""The tasks of lm-eval that are known without its index, and may be read from local files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MMLU = "mmlu"
MMLU_SUBJECTS = 57
IFEVAL = "ifeval"


@dataclass(frozen=True, kw_only=True)
class KnownTask:
    """A task that is found without lm-eval's index of 14,000 tasks (19 s), and reads local files.

    definition: below lm-eval's folder of tasks (mmlu: one per subject). evaluated, examples: the
    splits of its documents and of the examples in a prompt. fields: the columns its numbers depend
    on. shots: the definition's own number of examples, None where it names none. published: split
    -> `content_of` the published one, where that is known.
    """

    definition: str
    evaluated: str
    examples: str
    fields: tuple[str, ...]
    shots: int | None = None
    published: Mapping[str, str] = field(default_factory=dict)

    def splits(self, num_fewshot: int) -> list[str]:
        """Those that are read."""
        return list(dict.fromkeys([self.evaluated, *([self.examples] if num_fewshot else [])]))


MULTIPLE_CHOICE = ("question", "choices", "answerKey")
TWO_ALTERNATIVES = ("premise", "choice1", "choice2", "question", "label")
KNOWN = {
    "piqa": KnownTask(
        definition="piqa/piqa.yaml",
        evaluated="validation",
        examples="train",
        fields=("goal", "sol1", "sol2", "label"),
        published={"validation": "92415049378f3e96"},
    ),
    "winogrande": KnownTask(
        definition="winogrande/default.yaml",
        evaluated="validation",
        examples="train",
        fields=("sentence", "option1", "option2", "answer"),
        published={"validation": "c6027d9c555eb457"},
    ),
    "arc_easy": KnownTask(
        definition="arc/arc_easy.yaml",
        evaluated="test",
        examples="train",
        fields=MULTIPLE_CHOICE,
        published={"test": "3edcadd66e55fdac"},
    ),
    "arc_challenge": KnownTask(
        definition="arc/arc_challenge.yaml",
        evaluated="test",
        examples="train",
        fields=MULTIPLE_CHOICE,
        published={"test": "02d85fe5c189409f"},
    ),
    "hellaswag": KnownTask(
        definition="hellaswag/hellaswag.yaml",
        evaluated="validation",
        examples="train",
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        published={"validation": "26648d3f40d4e051"},
    ),
    "openbookqa": KnownTask(
        definition="openbookqa/openbookqa.yaml",
        evaluated="test",
        examples="train",
        fields=("question_stem", "choices", "answerKey"),
        published={"test": "fb195ea080bb6504"},
    ),
    MMLU: KnownTask(
        definition="mmlu/default/mmlu_*.yaml",
        evaluated="test",
        examples="dev",
        fields=("question", "choices", "answer"),
        published={"test": "b8d135d346d9a490", "dev": "46ec4922b1a54787"},
    ),
    "boolq": KnownTask(
        definition="super_glue/boolq/default.yaml",
        evaluated="validation",
        examples="train",
        fields=("passage", "question", "label"),
    ),
    "copa": KnownTask(
        definition="super_glue/copa/default.yaml",
        evaluated="validation",
        examples="train",
        fields=TWO_ALTERNATIVES,
    ),
    "sciq": KnownTask(
        definition="sciq/sciq.yaml",
        evaluated="test",
        examples="train",
        fields=(
            "support",
            "question",
            "distractor1",
            "distractor2",
            "distractor3",
            "correct_answer",
        ),
    ),
    "mathqa": KnownTask(
        definition="mathqa/mathqa.yaml",
        evaluated="test",
        examples="train",
        fields=("Problem", "options", "correct"),
    ),
    "lambada_openai": KnownTask(
        definition="lambada/lambada_openai.yaml",
        evaluated="test",
        examples="test",
        fields=("text",),
    ),
    # their prompt brings six examples of its own
    "truthfulqa_mc1": KnownTask(
        definition="truthfulqa/truthfulqa_mc1.yaml",
        evaluated="validation",
        examples="validation",
        fields=("question", "mc1_targets"),
        shots=0,
    ),
    "truthfulqa_mc2": KnownTask(
        definition="truthfulqa/truthfulqa_mc2.yaml",
        evaluated="validation",
        examples="validation",
        fields=("question", "mc2_targets"),
        shots=0,
    ),
    "gsm8k": KnownTask(
        definition="gsm8k/gsm8k.yaml",
        evaluated="test",
        examples="train",
        fields=("question", "answer"),
        shots=5,
    ),
    IFEVAL: KnownTask(
        definition="ifeval/ifeval.yaml",
        evaluated="train",
        examples="train",
        fields=("prompt", "instruction_id_list", "kwargs"),
        shots=0,
    ),
    **{
        f"xcopa_{language}": KnownTask(
            definition=f"xcopa/default_{language}.yaml",
            evaluated="test",
            examples="validation",
            fields=TWO_ALTERNATIVES,
        )
        for language in ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
    },
}
