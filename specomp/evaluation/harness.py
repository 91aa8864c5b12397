"""Tasks of lm-eval on a model in memory. The only file that imports lm_eval, and only inside
functions: it takes seconds.

The stock task definitions (prompts, scoring) are always used. With a data root only their data
changes: JSON lines at <root>/<task>/<split>.jsonl[.gz] (mmlu:
<root>/mmlu/<split>/<subject>.jsonl[.gz]), and nothing is asked from the network. An id without a
hash is of the published data, wherever it was read; any other data puts its hash into the id. The
published data is known by its content for the tasks of the papers' tables alone. That of the others
could not be had where this was written: an id without a hash then says that it came from the hub,
and local data puts its hash into the id even where it is the published one.

Special tokens are the tokenizer's own, as in lm-eval 0.4.13: Gemma's put BOS in front of every
request, and bos=auto has nothing to add.
"""

import copy
import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp.data.corpora import read_rows
from specomp.data.token_ids import check_rows, largest_id
from specomp.errors import UserError, one_line
from specomp.evaluation.metric import FRACTION, Metric
from specomp.evaluation.perplexity import ForwardPrecision, evaluating, precision_mark
from specomp.evaluation.tasks import IFEVAL, KNOWN, MMLU, MMLU_SUBJECTS
from specomp.evaluation.workload import LONGEST, Sure, Workload, task_tokens
from specomp.progress import track
from specomp.settings import configurable

log = logging.getLogger(__name__)
TaskConfig = dict[str, Any]

IFEVAL_PACKAGES = ("langdetect", "immutabledict", "nltk")  # its checks of answers import them
NLTK_DATA = "tokenizers/punkt_tab"  # lm-eval downloads it while it imports them
SUFFIXES = (".jsonl", ".jsonl.gz")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
FEWSHOT_SEED = 1234  # lm-eval's default
BOOTSTRAP_ITERS = (
    100  # only for metrics that are not means; an accuracy's standard error is closed form
)
BATCHES_PER_CHUNK = (
    32  # requests are sorted by length within a chunk; progress is reported between chunks
)
WRITTEN_PER_CHUNK = 4  # the same of requests whose answers are written, which take longer
ANSWER_TOKENS = 256  # lm-eval's number where a definition names none


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
        return [] if contents == published else [_sha256(contents)[:8]]

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
            self._check_metric(x for definition in definitions for x in _metric_names(definition))
        for definition in definitions:
            if definition["output_type"] == "generate_until":
                _check_room(self.task, definition["generation_kwargs"], max_length)
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
        if self.data_root is None and _offline():
            with _quiet():  # what an earlier run has left of it, or nothing
                _load(self._specification(), self.task, None)
        if largest_id(tokenizer) < rows and not mark:
            return
        try:
            if mark:
                self._check_answers()
            self._evaluate(_rehearsal(tokenizer, rows, self.id))
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
            lm = _language_model(model, tokenizer, self.batch_size, self.id)
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
        with _quiet():
            loaded = _load(self._specification(), self.task, self.data_root)
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

        with _quiet():
            loaded = _load(self._specification(), self.task, self.data_root)
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
            rows = [_sha256_of_rows(x.dataset[split], known.fields) for x in subjects]
            if known.published[split] != _sha256(rows):
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
        stock = _stock_configs(self.task)
        if self.data_root is None:
            if not stock:
                _check_name(self.task)
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
                _local_files(config, root, self.task),
                root / self.task,
                self.shots or 0,
            )
            for config in stock
        ]


def localize(
    config: Mapping[str, Any], files: Mapping[str, Path], folder: Path, num_fewshot: int
) -> TaskConfig:
    """A stock definition that reads `files` (split -> absolute path) and evaluates the split it
    always evaluated.

    Splits without a file are dropped. Raises UserError when the evaluated split, or the one
    few-shot examples come from, is among them.
    """
    evaluated = config.get("test_split") or config["validation_split"]  # lm-eval's own order
    needed = [evaluated]
    if num_fewshot:
        candidates = ("fewshot_split", "training_split", "validation_split")
        needed.append(next((config[key] for key in candidates if config.get(key)), evaluated))
    missing = [split for split in needed if split not in files]
    if missing:
        found = ", ".join(sorted(files)) or "none"
        raise UserError(
            f"{config['task']}: no {missing[0]}.jsonl under {folder} (splits found: {found};"
            f" {num_fewshot} few-shot examples asked for): add the file, lower num_fewshot, or set"
            " data_root=null to load the data from the hub."
        )
    splits = {key: config[key] for key in SPLIT_KEYS if config.get(key) in files}
    used = {split: str(files[split]) for split in splits.values()}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": used}}
    return {**config, **dict.fromkeys(SPLIT_KEYS), **splits, **data}


def split_files(root: Path, task: str, split: str) -> list[Path]:
    """The files of a split below a data root, by name (mmlu: by subject); .jsonl before
    .jsonl.gz.
    """
    folder, name = (root / task / split, "*") if task == MMLU else (root / task, split)
    found = {
        path.name.removesuffix(suffix): path
        for suffix in reversed(SUFFIXES)
        for path in folder.glob(name + suffix)
    }
    return [found[name] for name in sorted(found)]


def content_of(files: Sequence[Path], fields: Sequence[str]) -> str:
    """Hash (16 hex digits) of those columns of a split's rows: neither places, compression nor
    other columns play a part.

    Raises UserError for a row without one of them, with file and line.
    """
    stamps = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return _sha256([_content(*stamp, tuple(fields)) for stamp in stamps])


@functools.lru_cache(maxsize=256)
def _content(path: Path, changed: int, size: int, fields: tuple[str, ...]) -> str:
    def rows() -> Iterator[Mapping[str, Any]]:
        kinds: dict[str, type] = {}  # of the first row
        for where, row in read_rows(path):
            lacking = [x for x in fields if not isinstance(row, dict) or row.get(x) is None]
            if lacking:
                raise UserError(
                    f"{where}: no {lacking[0]!r}; every row needs {', '.join(fields)}, none of them"
                    " null."
                )
            for x in fields:
                first, kind = kinds.setdefault(x, type(row[x])), type(row[x])
                if kind is not first:
                    raise UserError(
                        f"{where}: {x!r} is a {kind.__name__}, in the first row a"
                        f" {first.__name__}; every row needs the same."
                    )
            yield row

    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; every row is a document.")
    return _sha256_of_rows(rows(), fields)


def _sha256_of_rows(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row[x] for x in fields], sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _local_files(config: Mapping[str, Any], root: Path, task: str) -> dict[str, Path]:
    """Split name -> existing file of a task."""
    splits = {config[key] for key in SPLIT_KEYS if config.get(key)}
    stems = {
        split: root / task / split / config["dataset_name"] if task == MMLU else root / task / split
        for split in splits
    }
    candidates = (
        (split, stem.with_name(stem.name + suffix))
        for split, stem in stems.items()
        for suffix in reversed(SUFFIXES)
    )
    return {split: path for split, path in candidates if path.is_file()}


@functools.cache
def _stock_configs(task: str) -> list[TaskConfig]:
    """lm-eval's definitions of a known task, includes resolved (mmlu: one per subject); empty for
    other tasks. Raises UserError where they cannot be loaded.
    """
    if task not in KNOWN:
        return []
    if task == IFEVAL:
        _check_ifeval()
    # the definitions hold !function tags, which only this loader knows
    from lm_eval.tasks import _yaml_loader

    folder = Path(_yaml_loader.__file__).parent
    return [_yaml_loader.load_yaml(x) for x in sorted(folder.glob(KNOWN[task].definition))]


def _check_ifeval() -> None:
    """Raises UserError where what checks its answers is not there: lm-eval imports it with the
    definition, and asks the network for nltk's data.
    """
    missing = [x for x in IFEVAL_PACKAGES if importlib.util.find_spec(x) is None]
    if missing:
        raise UserError(
            f"ifeval: its answers are checked with {', '.join(missing)}, not installed here: pip"
            " install 'lm_eval[ifeval]', or take this task out of the benchmark."
        )
    nltk = importlib.import_module("nltk")  # no dependency of specomp
    try:
        nltk.data.find(NLTK_DATA)
    except LookupError as error:
        name = NLTK_DATA.rpartition("/")[2]
        raise UserError(
            f"ifeval: its answers are checked with nltk's data {name}, which is in no folder of"
            f" nltk's: python -m nltk.downloader {name} (with network; NLTK_DATA names another"
            " folder), or take this task out of the benchmark."
        ) from error


def _metric_names(definition: TaskConfig) -> list[str]:
    """What `_scores` calls the metrics of a definition."""
    filters = [x["name"] for x in definition.get("filter_list") or [{"name": "none"}]]
    return [
        _metric_name(x["metric"], chosen) for x in definition["metric_list"] for chosen in filters
    ]


def _metric_name(name: str, chosen: str) -> str:
    """One name for a metric and for what of an answer it looks at: exact_match, strict-match ->
    exact_match.strict-match; exact_match_stderr -> exact_match.strict-match_stderr.
    """
    if chosen == "none":
        return name
    metric = name.removesuffix("_stderr")
    return f"{metric}.{chosen}{name[len(metric) :]}"


def _answer_tokens(options: Mapping[str, Any]) -> int:
    """The most that are written."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(dict(options), ANSWER_TOKENS)["max_gen_toks"])


def _check_room(description: str, options: Mapping[str, Any], max_length: int) -> int:
    """The most tokens of a prompt beside an answer. Raises UserError where there is none."""
    answer = _answer_tokens(options)
    if answer >= max_length:
        raise UserError(
            f"{description}: answers of up to {answer} tokens leave no room for a prompt in the"
            f" model's context of {max_length}: take this task out of the benchmark."
        )
    return max_length - answer


@functools.cache
def _full_manager() -> Any:
    from lm_eval.tasks import TaskManager

    log.info("Reading lm-eval's index of tasks (about 20 s, once).")
    return TaskManager()


def _check_name(task: str) -> None:
    names = _full_manager().all_tasks
    if task not in names:
        close = ", ".join(difflib.get_close_matches(task, names, n=3)) or "none"
        raise UserError(
            f"lm-eval knows no task {task} (close names: {close}): correct the task of the"
            " benchmark."
        )


def _load(specification: list[TaskConfig] | None, name: str, data_root: Path | None) -> Any:
    """Task objects with their data; several become a group. Raises UserError when the data cannot
    be read.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    from lm_eval.tasks import TaskManager

    try:
        if specification is None:
            return _full_manager().load([name])
        manager = TaskManager(include_defaults=False)
        loaded = manager.load(copy.deepcopy(specification))
    except (OSError, ValueError, DatasetsError) as error:
        reason = one_line(error, 200)
        remedy = (
            "check the network, or set paths.data to a folder that holds it"
            if data_root is None
            else f"check the files in {data_root / name}, or set paths.data=null to read the hub's"
        )
        raise UserError(f"{name}: cannot load its data ({reason}): {remedy}.") from error
    if len(specification) == 1:
        return loaded
    # lm-eval's mmlu group without its four subgroups: subjects weighted by their number of
    # documents either way
    group = Group.from_config(
        GroupConfig(group=name, aggregate_metric_list=[{"metric": "acc", "weight_by_size": True}])
    )
    for task in loaded["tasks"].values():
        group.add(task)
    return manager.load([group])


def _offline() -> bool:
    """Whether the hub is not to be asked."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def _rehearsal(tokenizer: PreTrainedTokenizerBase, rows: int, description: str) -> Any:
    """A language model of lm-eval's that answers nothing, and only checks the tokens of what it is
    asked.
    """
    from lm_eval.api.model import LM

    class Rehearsal(LM):  # type: ignore[misc]
        tokenizer_name = ""  # of lm-eval's cache of requests, which is not used

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(self._checked(*x.args), False) for x in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [self._checked(x.args[0]) for x in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.loglikelihood_rolling(requests)
            return [""] * len(requests)

        def _checked(self, context: str, continuation: str = "") -> float:
            # lm-eval tokenizes both
            for text in {context, context + continuation}:
                check_rows(torch.tensor(tokenizer.encode(text)), rows, tokenizer, description)
            return 0.0

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return Rehearsal()


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, description: str
) -> Any:
    """HFLM around the model, with progress, and counts of what lm-eval would pass over."""
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):  # type: ignore[misc]
        nonfinite = truncated = total = 0

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            chunks = _chunks(requests, BATCHES_PER_CHUNK * batch_size)
            answers: list[tuple[float, bool]] = []
            for chunk in track(chunks, description, len(chunks)):
                answers += super().loglikelihood(chunk, disable_tqdm=True)
            return answers

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[float]:
            chunks = _chunks(requests, batch_size)  # whole texts, many windows each
            answers: list[float] = []
            for chunk in track(chunks, description, len(chunks)):
                answers += super().loglikelihood_rolling(chunk, disable_tqdm=True)
            return answers

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            for context, options in (x.args for x in requests):
                room = _check_room(description, options, self.max_length)
                self.truncated += len(self.tok_encode(context)) > room
            self.total += len(requests)
            chunks = _chunks(requests, WRITTEN_PER_CHUNK * batch_size)
            answers: list[str] = []
            for chunk in track(chunks, description, len(chunks)):
                answers += super().generate_until(chunk, disable_tqdm=True)
            return answers

        def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
            broken = torch.zeros(len(context), dtype=torch.bool, device=context.device)

            def watch(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                # the largest is the one chosen; others may be -inf
                broken.logical_or_(~logits.amax(-1).isfinite())
                return logits

            written: torch.Tensor = super()._model_generate(
                context=context, logits_processor=[watch], **options
            )
            self.nonfinite += int(broken.sum())
            return written

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **options: Any
        ) -> list[tuple[float, bool]]:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise UserError(
                    f"{description}: an answer of {longest} tokens does not fit the model's context"
                    f" of {self.max_length}: take this task out of the benchmark."
                )
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, **options | {"disable_tqdm": True}
            )
            self.total += len(answers)
            self.truncated += sum(
                len(context) + len(continuation) > self.max_length + 1
                for _, context, continuation in requests
            )
            self.nonfinite += sum(not math.isfinite(logprob) for logprob, _ in answers)
            return answers

    # a copy, because a padding token is given to it: HFLM's own choice may have no row. What is
    # padded is masked, so any token will do.
    padded = copy.deepcopy(tokenizer)
    rows = model.config.get_text_config().vocab_size
    if padded.pad_token_id is None or padded.pad_token_id >= rows:
        usable = padded.eos_token_id is not None and padded.eos_token_id < rows
        padded.pad_token = padded.eos_token if usable else padded.convert_ids_to_tokens(0)
    with _quiet():  # that the model is in memory already is meant
        return CountingLM(pretrained=model, tokenizer=padded, batch_size=batch_size)


def _chunks(requests: Sequence[Any], size: int) -> list[list[Any]]:
    """At least `size` requests each; those with one context stay together, since lm-eval answers
    them with one forward.
    """
    chunks: list[list[Any]] = []
    for request in requests:
        if not chunks or (len(chunks[-1]) >= size and chunks[-1][-1].args[0] != request.args[0]):
            chunks.append([])
        chunks[-1].append(request)
    return chunks


def _scores(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """lm-eval's row of a task or group as plain names: "acc,none" -> acc; others see
    `_metric_name`.
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
            scores[_metric_name(name, chosen)] = float(value)
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


def _bootstrapped(statistic: Callable[[Sequence[Any]], float], values: Any, iters: int) -> float:
    """lm-eval's standard error of what is no mean, without its processes and its printing."""
    from lm_eval.api.metrics import sample_stddev

    draw = random.Random(0)
    return float(
        sample_stddev([statistic(draw.choices(values, k=len(values))) for _ in range(iters)])
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no chatter of lm_eval and datasets inside; errors still show, and our own counts
    stand in for the warnings.
    """
    import datasets
    import lm_eval.api.metrics as metrics_module
    import lm_eval.api.task as task_module

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, tqdm = logger.level, task_module.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task_module.tqdm = functools.partial(tqdm, disable=True)  # the bar over documents has no switch
    bootstrap = metrics_module.bootstrap_stderr
    metrics_module.bootstrap_stderr = _bootstrapped
    try:
        yield
    finally:
        metrics_module.bootstrap_stderr = bootstrap
        logger.setLevel(level)
        task_module.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
