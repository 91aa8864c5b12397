"""A suite: the benchmarks of one yaml in conf/benchmark, and the contract every benchmark keeps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import PositiveInt
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from specomp.data.token_ids import Bos
from specomp.errors import UserError
from specomp.evaluation.divergence import ComparesDense, DenseModel
from specomp.evaluation.metric import Metric
from specomp.evaluation.perplexity import ForwardPrecision, Perplexity
from specomp.evaluation.workload import Workload
from specomp.settings import configurable
from specomp.slots import check_protocol


class Benchmark(Protocol):
    """Something that turns a model into named numbers. volatile: they belong to the machine at that
    moment.
    """

    volatile: bool

    @property
    def id(self) -> str:
        """Name, version and what the numbers depend on: "wikitext2@1:2048xall"; results are stored
        under it.
        """

    @property
    def protocol(self) -> str:
        """What of the id is known without reading any text; it ends with a colon where the content
        follows.
        """

    @property
    def metric(self) -> str:
        """The metric that tables quote."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What its numbers are, by name: at least of the one that tables quote, those worth a line
        on a terminal too.
        """

    def workload(self) -> Sequence[Workload]:
        """What it runs a model over; reads no text."""

    def validate(self, max_length: int) -> None:
        """Raise UserError when the benchmark cannot run on a model with a context of `max_length`
        tokens; loads no model.
        """

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """Measure. The model comes back as it was."""


@runtime_checkable
class ReadsTokens(Protocol):
    """A benchmark that can say before any work whether a model knows its tokens. Optional."""

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Raise UserError where not; rows: of the model's embedding. Loads no model."""


@configurable
class Suite:
    """Several benchmarks. The fields below `parts` are what the parts have in common: the yaml of a
    part points at them (`${...window}`), so one override (`benchmark.window=512`) reaches every
    part. A suite names only those its parts read.
    """

    name: str
    parts: dict[str, Any]  # label -> Benchmark
    path: Path | None = None
    window: PositiveInt | None = None
    max_windows: PositiveInt | None = None
    bos: Bos | None = None
    batch_size: PositiveInt | None = None
    precision: ForwardPrecision | None = None
    prompts: PositiveInt | None = None
    prompt_tokens: PositiveInt | None = None
    new_tokens: PositiveInt | None = None
    limit: PositiveInt | None = None
    num_fewshot: int | None = None
    chat_template: bool | None = None
    task_batch_size: PositiveInt | None = None

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """The parts in the order of the yaml."""
        return tuple(self.parts.values())

    def for_model(self, config: PreTrainedConfig) -> "Suite":
        """The same, with what "auto" means for a model."""
        parts = {
            label: part.for_model(config) if isinstance(part, Perplexity) else part
            for label, part in self.parts.items()
        }
        return replace(self, parts=parts)

    def beside(self, dense: DenseModel) -> "Suite":
        """The same, for models that come from this dense one."""
        parts = {
            label: part.beside(dense) if isinstance(part, ComparesDense) else part
            for label, part in self.parts.items()
        }
        return replace(self, parts=parts)

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Check every part's text against the rows of a model's embedding. Raises UserError."""
        for part in self.benchmarks:
            if isinstance(part, ReadsTokens):
                part.check_tokens(tokenizer, rows)

    def validate(self, max_length: int) -> None:
        """Check every part against a model context of `max_length` tokens. Raises UserError."""
        for label, part in self.parts.items():
            check_protocol(part, Benchmark, f"benchmark.parts.{label}")
            part.validate(max_length)
        repeated = [
            identity
            for identity, count in Counter(part.id for part in self.benchmarks).items()
            if count > 1
        ]
        if repeated:
            raise UserError(
                f"Suite {self.name} measures {repeated[0]} twice and would keep one result: rename"
                " or remove one of the parts."
            )
