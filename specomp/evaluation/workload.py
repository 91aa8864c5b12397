"""How many tokens a benchmark reads, known before its texts are: exactly, at most, by estimate, or
not at all.

Characters: of the joined texts as the corpora of conf/corpus give them. Documents: as published
with lm-eval's tasks. Tokens a request: means over 300 documents with SmolLM2's tokenizer; those of
other tokenizers differ by a tenth or two.
"""

from dataclasses import dataclass
from typing import Literal

from specomp.data.text import TextSource

# English text: 4.2 (SmolLM2, WikiText-2), 3.8 (LLaMA 2, WikiText-2).
CHARACTERS_PER_TOKEN = 4.0
CHARACTERS = {
    ("wikitext2", "test"): 1_294_336,
    ("wikitext2", "validation"): 1_149_668,
    ("ptb", "test"): 446_182,
}
# Of C4: 1,000 documents of the first training shard.
CHARACTERS_PER_DOCUMENT = {"c4": 2_017}
# task: (documents, requests a document, tokens a request); the answers to a question of mmlu are
# one request.
TASKS = {
    "piqa": (1838, 2, 36),
    "winogrande": (1267, 2, 23),
    "arc_easy": (2376, 4, 31),
    "arc_challenge": (1172, 4, 37),
    "hellaswag": (10042, 4, 85),
    "openbookqa": (500, 4, 15),
    "mmlu": (14042, 1, 132),
}
# Requests are padded to the longest of their batch, and the longest of all decides about memory:
# multiples of the mean.
PADDED, LONGEST = 1.3, 6
Sure = Literal["", "at most", "estimate", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a benchmark runs a model over. length: tokens of one sequence; batch: sequences a
    forward pass.
    """

    tokens: int | None  # None: unknown
    length: int
    batch: int
    sure: Sure
    longest: int = 0  # where sequences differ in length
    half: bool = False  # bfloat16 products of a float32 model
    decoded: int = 0  # steps of one token a sequence, which are bound by reading the weights


def text_tokens(
    corpus: TextSource, window: int, max_windows: int | None
) -> tuple[int | None, Sure]:
    """Of the windows of a text."""
    most = None if max_windows is None else window * max_windows
    characters: float | None = CHARACTERS.get((corpus.name, corpus.split))
    if corpus.max_documents is not None:
        each = CHARACTERS_PER_DOCUMENT.get(corpus.name)
        characters = None if each is None else each * corpus.max_documents
    whole = (
        None if characters is None else int(characters / CHARACTERS_PER_TOKEN) // window * window
    )
    if most is not None and (whole is None or most <= whole):
        return most, "at most"
    return whole, "unknown" if whole is None else "estimate"


def task_tokens(
    task: str, limit_each: int | None, subjects: int, shots: int, batch: int
) -> tuple[int | None, int]:
    """Of an lm-eval task, and of one request. Of several subjects the examples are the same within
    each, and run once a batch of requests.
    """
    if task not in TASKS:
        return None, 1
    documents, requests, length = TASKS[task]
    if limit_each is not None:
        documents = min(documents, limit_each * subjects)
    if subjects == 1:
        return int(documents * requests * length * (1 + shots) * PADDED), length * (1 + shots)
    batches = subjects * -(-documents // (subjects * batch))
    asked = documents * requests * length * PADDED
    return int(asked + batches * shots * length), length * (1 + shots)
