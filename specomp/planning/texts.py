"""How many tokens a benchmark reads, known before its texts are: exactly, at most, by estimate, or not at all.

Characters: of the joined texts as the corpora of conf/corpus give them. Documents: as published with lm-eval's tasks. Tokens a request:
means over 300 documents with SmolLM2's tokenizer; those of other tokenizers differ by a tenth or two.
"""

from dataclasses import dataclass
from typing import Any

from specomp.data.token_ids import read_token_ids
from specomp.evaluation.efficiency import Efficiency
from specomp.evaluation.harness import HarnessTask
from specomp.evaluation.perplexity import Perplexity, TokenFilePerplexity

# English text: 4.2 (SmolLM2, WikiText-2), 3.8 (LLaMA 2, WikiText-2).
CHARACTERS_PER_TOKEN = 4.0
CHARACTERS = {("wikitext2", "test"): 1_294_336, ("wikitext2", "validation"): 1_149_668, ("ptb", "test"): 446_182}
# Of C4: 1,000 documents of the first training shard.
CHARACTERS_PER_DOCUMENT = {"c4": 2_017}
# task: (documents, requests a document, tokens a request); the answers to a question of mmlu are one request.
TASKS = {
    "piqa": (1838, 2, 36),
    "winogrande": (1267, 2, 23),
    "arc_easy": (2376, 4, 31),
    "arc_challenge": (1172, 4, 37),
    "hellaswag": (10042, 4, 85),
    "openbookqa": (500, 4, 15),
    "mmlu": (14042, 1, 132),
}
SUBJECTS = 57
# Requests are padded to the longest of their batch, and the longest of all decides about memory: multiples of the mean.
PADDED, LONGEST = 1.3, 6


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one benchmark runs a model over. length: tokens of one sequence; batch: sequences a forward pass."""

    label: str
    tokens: int | None  # None: unknown
    length: int
    batch: int
    sure: str  # "", "at most", "estimate" or "unknown"
    longest: int = 0  # where sequences differ in length
    half: bool = False  # bfloat16 products of a float32 model
    decoded: int = 0  # steps of one token a sequence, which are bound by reading the weights


def readings(benchmark: Any, label: str) -> list[Reading]:
    """One benchmark's; several where it runs the model in several ways. Reads no text, but a file of token ids."""
    half = getattr(benchmark, "precision", "float32") == "bfloat16"
    if isinstance(benchmark, Perplexity):
        tokens, sure = _text_tokens(benchmark)
        return [Reading(label=label, tokens=tokens, length=benchmark.window, batch=benchmark.batch_size, sure=sure, half=half)]
    if isinstance(benchmark, TokenFilePerplexity):
        rows, length = read_token_ids(benchmark.path)[: benchmark.max_windows].shape
        return [Reading(label=label, tokens=rows * length, length=length, batch=benchmark.batch_size, sure="", half=half)]
    if isinstance(benchmark, Efficiency):
        runs, prompt, steps = 1 + benchmark.repeats, benchmark.prompt_tokens, benchmark.new_tokens
        return [
            Reading(label=f"{label} bs{b}", tokens=runs * b * (prompt + steps), length=prompt, batch=b, sure="", decoded=runs * steps)
            for b in benchmark.batch_sizes
        ]
    if isinstance(benchmark, HarnessTask) and benchmark.task in TASKS:
        documents, requests, length = TASKS[benchmark.task]
        if benchmark.limit_each is not None:
            documents = min(documents, benchmark.limit_each * (SUBJECTS if benchmark.task == "mmlu" else 1))
        length *= 1 + (benchmark.num_fewshot or 0)
        tokens, batch = int(documents * requests * length * PADDED), benchmark.batch_size
        return [Reading(label=label, tokens=tokens, length=length, batch=batch, sure="estimate", half=half, longest=LONGEST * length)]
    return [Reading(label=label, tokens=None, length=1, batch=1, sure="unknown", half=half)]


def _text_tokens(benchmark: Perplexity) -> tuple[int | None, str]:
    most = None if benchmark.max_windows is None else benchmark.window * benchmark.max_windows
    split, documents = getattr(benchmark.corpus, "split", ""), getattr(benchmark.corpus, "max_documents", None)
    characters: float | None = CHARACTERS.get((benchmark.corpus.name, split))
    if documents is not None:
        each = CHARACTERS_PER_DOCUMENT.get(benchmark.corpus.name)
        characters = None if each is None else each * documents
    whole = None if characters is None else int(characters / CHARACTERS_PER_TOKEN) // benchmark.window * benchmark.window
    if most is not None and (whole is None or most <= whole):
        return most, "at most"
    return whole, "unknown" if whole is None else "estimate"
