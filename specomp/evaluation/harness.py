"""Tasks of lm-eval on a model in memory. It takes seconds to import, so functions do.

The stock task definitions (prompts, scoring) are always used (definitions.py). With a data root
only their data changes (task_data.py), and nothing is asked from the network. An id without a
hash is of the published data, wherever it was read; any other data puts its hash into the id. The
published data is known by its content for the tasks of the papers' tables alone. That of the others
could not be had where this was written: an id without a hash then says that it came from the hub,
and local data puts its hash into the id even where it is the published one.

Special tokens are the tokenizer's own, as in lm-eval 0.4.13: Gemma's put BOS in front of every
request, and bos=auto has nothing to add.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.data.token_ids import largest_id
from specomp.errors import UserError, one_line
from specomp.evaluation.definitions import check_name, load_tasks, offline, quiet, stock_configs
from specomp.evaluation.language_model import check_room, language_model, rehearsal
from specomp.evaluation.metric import FRACTION, Metric
from specomp.evaluation.perplexity import ForwardPrecision, evaluating, precision_mark
from specomp.evaluation.task_data import (
    TaskConfig,
    content_of,
    local_files,
    localize,
    sha256_of,
    sha256_of_rows,
    split_files,
)
from specomp.evaluation.tasks import KNOWN, MMLU, MMLU_SUBJECTS
from specomp.evaluation.workload import LONGEST, Sure, Workload, task_tokens
from specomp.settings import configurable

log = logging.getLogger(__name__)
FEWSHOT_SEED = 1234  # lm-eval's default
# only for metrics that are not means; an accuracy's standard error is closed form
BOOTSTRAP_ITERS = 100


@configurable
class HarnessTask:
    """One lm-eval task or group. `limit` is documents, shared evenly by the subjects of mmlu;
    `num_fewshot` None is the task's own number; `data_root` None loads the data from the hub;
    `metric` is the one the result must contain; `chat_template` True asks every request in the
    tokenizer's, each example a turn of its own.
    """

    volatile: ClassVar[bool] = False
    task: str
    version: PositiveInt
    num_fewshot: NonNegativeInt | None
    limit: PositiveInt | None
    batch_size: PositiveInt
    precision: ForwardPrecision
    data_root: Path | None
    metric: str
    chat_template: bool = False

    @property
    def id(self) -> str:
        """For example piqa@1, piqa@1:limit100, mmlu@1:5shot, mmlu@1:5shot:chat,
        mmlu@1:limit2each (subject); with a hash at its end where the data is not the published one:
        piqa@1:limit100:3f2a91c0. Raises UserError where local data cannot be read.
        """
        named = self.num_fewshot is not None and not self._shots_fixed
        settings = [f"{self.num_fewshot}shot"] if named else []
        settings += ["chat"] if self.chat_template else []
        settings += (
            [f"limit{self.limit_each}{'each' if self.task == MMLU else ''}"]
            if self.limit is not None
            else []
        )
        marks = [*precision_mark(self.precision), *self._data_mark]
        return ":".join([f"{self.task}@{self.version}", *settings, *marks])

    @property
    def protocol(self) -> str:
        """The id: tables of other data are other tables."""
        return self.id

    @property
    def _data_mark(self) -> list[str]:
        """What local data adds to the id; nothing where it is the published one."""
        if self.data_root is None or self.task not in KNOWN:
            return []
        root, known = self.data_root.expanduser().absolute(), KNOWN[self.task]
        files = {
            split: split_files(root, self.task, split) for split in known.splits(self.shots or 0)
        }
        if not all(files.values()):  # nothing can be measured, and `validate` says what is missing
            return []
        contents = {split: content_of(paths, known.fields) for split, paths in files.items()}
        published = {split: known.published.get(split) for split in files}
        return [] if contents == published else [sha256_of(contents)[:8]]

    @property
    def shots(self) -> int | None:
        """Examples in a prompt; None where only lm-eval knows."""
        known = KNOWN.get(self.task)
        if known is not None and (self.num_fewshot is None or self._shots_fixed):
            return known.shots or 0
        return self.num_fewshot

    @property
    def _shots_fixed(self) -> bool:
        """Whether the definition wants no examples beside those in its prompt: lm-eval keeps to
        that too.
        """
        return self.task in KNOWN and KNOWN[self.task].shots == 0

    @property
    def limit_each(self) -> int | None:
        """Documents of each task of the group."""
        return (
            None
            if self.limit is None
            else -(-self.limit // (MMLU_SUBJECTS if self.task == MMLU else 1))
        )

    @property
    def metrics(self) -> dict[str, Metric]:
        """The one that is quoted, and accuracies."""
        named = Metric("", "lower") if "perplexity" in self.metric else Metric(FRACTION, "higher")
        return {self.metric: named} | dict.fromkeys(("acc", "acc_norm"), Metric(FRACTION, "higher"))

    def workload(self) -> list[Workload]:
        """Its requests."""
        tokens, length = task_tokens(
            self.task,
            self.limit_each,
            MMLU_SUBJECTS if self.task == MMLU else 1,
            self.shots or 0,
            self.batch_size,
        )
        half, known = self.precision == "bfloat16", tokens is not None
        sure: Sure = "estimate" if known else "unknown"
        batch, longest = (self.batch_size, LONGEST * length) if known else (1, 0)
        return [
            Workload(
                tokens=tokens, length=length, batch=batch, sure=sure, half=half, longest=longest
            )
        ]

    def validate(self, max_length: int) -> None:
        """Raises UserError for an unknown task, a metric it is known to lack, packages that are not
        there, answers longer than a context of `max_length` tokens and, with a data root, for
        missing files.

        A prompt that is too long is none of that: lm-eval cuts it from the left, and the result
        counts those.
        """
        definitions = self._specification() or []
        if definitions:  # otherwise only a run tells the metrics
            self._check_metric(x for definition in definitions for x in metric_names(definition))
        for definition in definitions:
            if definition["output_type"] == "generate_until":
                check_room(self.task, definition["generation_kwargs"], max_length)
        if self.num_fewshot and self._shots_fixed:
            log.warning(
                "%s: its prompt is whole, and lm-eval adds no examples to it: num_fewshot=%d is not"
                " used.",
                self.task,
                self.num_fewshot,
            )
        _ = self._data_mark  # reads the rows

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Raises UserError where a request has a token without a row in the embedding, where local
        data that is not the published one makes no requests, where there is none and no network is
        to be used, or where the tokenizer has no chat template or nothing to begin a request with;
        loads no model. What can be none of that is left for later.
        """
        self._check_template(tokenizer)
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.task}: a request begins with BOS or EOS where nothing else does, and the"
                " tokenizer has neither: give it one, or take this task out of the benchmark."
            )
        mark = self._data_mark
        if self.data_root is None and offline():
            with quiet():  # what an earlier run has left of it, or nothing
                load_tasks(self._specification(), self.task, None)
        if largest_id(tokenizer) < rows and not mark:
            return
        try:
            if mark:
                self._check_answers()
            self._evaluate(rehearsal(tokenizer, rows, self.id))
        except UserError:
            raise
        except Exception as error:
            if not mark:
                raise
            # whatever a prompt or a score makes of rows that it was not written for
            raise UserError(
                f"{self.task}: the rows in {self.data_root}/{self.task} do not fit the task"
                f" ({type(error).__name__}: {one_line(error, 160)}); compare them with the"
                " published ones."
            ) from error

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """acc, acc_norm and what else the task defines, their _stderr, n (documents), chance (the
        accuracy of guessing, where that is known), nonfinite_requests, truncated_requests.
        """
        self._check_template(tokenizer)
        with evaluating(model, self.precision):
            lm = language_model(model, tokenizer, self.batch_size, self.id)
            scores = self._evaluate(lm)
        scores |= {
            "nonfinite_requests": float(lm.nonfinite),
            "truncated_requests": float(lm.truncated),
        }
        self._check_metric(scores)
        if lm.nonfinite or lm.truncated:
            log.warning(
                "%s: of %d requests %d had a non-finite log-likelihood or logit, %d were cut to the"
                " context.",
                self.id,
                lm.total,
                lm.nonfinite,
                lm.truncated,
            )
        log.info(
            "%s: %s %.4f on %d documents.", self.id, self.metric, scores[self.metric], scores["n"]
        )
        return scores

    def _check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError where there is none and it is asked for."""
        if not self.chat_template:
            return
        try:
            tokenizer.get_chat_template()
        except ValueError as error:  # none, or several and no default
            raise UserError(
                f"{self.task}: chat_template=true, but the tokenizer has no chat template of its"
                " own: set chat_template=false, or take a model that was tuned on conversations."
            ) from error

    def _check_answers(self) -> None:
        """Raises UserError where a row's right answer is none of its choices, which lm-eval counts
        as a wrong one.
        """
        with quiet():
            loaded = load_tasks(self._specification(), self.task, self.data_root)
        for name, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE != "multiple_choice":
                continue
            for number, doc in enumerate(task.eval_docs, start=1):
                choices = task.doc_to_choice(doc)
                right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
                if type(doc.get("label")) is int:  # copa reads the second choice out of all but 0
                    right = doc["label"]
                if right not in (range(len(choices)) if isinstance(right, int) else choices):
                    raise UserError(
                        f"{name}: the answer of row {number} in {self.data_root}/{self.task} is"
                        f" {right!r}, which is none of its {len(choices)} choices; correct the row"
                        " or leave it out."
                    )

    def _evaluate(self, lm: Any) -> dict[str, float]:
        """lm-eval's scores of a language model of its kind, and chance."""
        from lm_eval.evaluator import evaluate

        with quiet():
            loaded = load_tasks(self._specification(), self.task, self.data_root)
            for task in loaded["tasks"].values():
                shots = self.shots if self.shots is not None else task.get_config("num_fewshot")
                task.set_config(key="num_fewshot", value=shots or 0)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            self._check_published(loaded["tasks"].values())
            # not simple_evaluate: it reseeds every generator of the process and collects the
            # environment (1 s a call)
            results = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=self.limit_each,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=False,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.chat_template,
            )
        return _scores(results, self.task) | _chance(loaded["tasks"].values())

    def _check_published(self, tasks: Iterable[Any]) -> None:
        """Says so where the hub's data is no longer what the id stands for."""
        known = KNOWN.get(self.task)
        if self.data_root is not None or known is None:
            return
        subjects = sorted(tasks, key=lambda task: str(task.config.dataset_name))
        for split in known.splits(self.shots or 0):
            if split not in known.published:
                continue
            rows = [sha256_of_rows(x.dataset[split], known.fields) for x in subjects]
            if known.published[split] != sha256_of(rows):
                log.warning(
                    "%s: the %s split on the hub is not the one that %s stood for.",
                    self.task,
                    split,
                    self.id,
                )

    def _check_metric(self, known: Iterable[str]) -> None:
        known = sorted(known)
        if self.metric not in known:
            raise UserError(
                f"{self.task} has no metric {self.metric}: set metric to one of {', '.join(known)}."
            )

    def _specification(self) -> list[TaskConfig] | None:
        """The definitions to run, or None where lm-eval finds the task in its own index. Raises
        UserError as `validate` does.
        """
        stock = stock_configs(self.task)
        if self.data_root is None:
            if not stock:
                check_name(self.task)
            return stock or None
        root = self.data_root.expanduser().absolute()
        if not stock:
            raise UserError(
                f"{self.task}: only {', '.join(KNOWN)} can be read from a data root ({root}): set"
                " data_root=null to load it from the hub."
            )
        return [
            localize(
                config,
                local_files(config, root, self.task),
                root / self.task,
                self.shots or 0,
            )
            for config in stock
        ]


def metric_names(definition: TaskConfig) -> list[str]:
    """What `_scores` calls the metrics of a definition."""
    filters = [x["name"] for x in definition.get("filter_list") or [{"name": "none"}]]
    return [
        metric_name(x["metric"], chosen) for x in definition["metric_list"] for chosen in filters
    ]


def metric_name(name: str, chosen: str) -> str:
    """One name for a metric and for what of an answer it looks at: exact_match, strict-match ->
    exact_match.strict-match; exact_match_stderr -> exact_match.strict-match_stderr.
    """
    if chosen == "none":
        return name
    metric = name.removesuffix("_stderr")
    return f"{metric}.{chosen}{name[len(metric) :]}"


def _scores(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """lm-eval's row of a task or group as plain names: "acc,none" -> acc; others see
    `metric_name`.
    """
    rows = {**results["results"], **results.get("groups", {})}
    if task not in rows:
        raise UserError(
            f"{task} is a tag of {len(rows)} tasks without a common score: make one benchmark of"
            f" each ({', '.join(list(rows)[:3])}, ...)."
        )
    scores: dict[str, float] = {}
    for key, value in rows[task].items():
        name, comma, chosen = key.partition(",")
        # a standard error of one document is the text "N/A"
        if comma and isinstance(value, int | float):
            scores[metric_name(name, chosen)] = float(value)
    scores["n"] = float(sum(counts["effective"] for counts in results["n-samples"].values()))
    return scores


def _chance(tasks: Iterable[Any]) -> dict[str, float]:
    """The accuracy of guessing on the documents that were asked: the mean of 1 / choices, 0 where
    the answer is written or a word of the language. Nothing where the score is no share of
    documents answered right.
    """
    shares: list[float] = []
    for task in tasks:
        documents = {x.doc_id: x.doc for x in task.instances}
        if task.OUTPUT_TYPE in ("generate_until", "loglikelihood"):
            shares += [0.0] * len(documents)
        elif task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results):
            shares += [1 / len(task.doc_to_choice(x)) for x in documents.values()]
        else:
            return {}
    return {"chance": sum(shares) / len(shares)} if shares else {}
