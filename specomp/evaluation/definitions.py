"""lm-eval's definitions of tasks, as they are found and loaded without its noise."""

import copy
import difflib
import functools
import importlib.util
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specomp.errors import UserError, one_line
from specomp.evaluation.task_data import TaskConfig
from specomp.evaluation.tasks import IFEVAL, KNOWN

log = logging.getLogger(__name__)
IFEVAL_PACKAGES = ("langdetect", "immutabledict", "nltk")  # its checks of answers import them
NLTK_DATA = "tokenizers/punkt_tab"  # lm-eval downloads it while it imports them


@functools.cache
def stock_configs(task: str) -> list[TaskConfig]:
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


@functools.cache
def full_manager() -> Any:
    from lm_eval.tasks import TaskManager

    log.info("Reading lm-eval's index of tasks (about 20 s, once).")
    return TaskManager()


def check_name(task: str) -> None:
    names = full_manager().all_tasks
    if task not in names:
        close = ", ".join(difflib.get_close_matches(task, names, n=3)) or "none"
        raise UserError(
            f"lm-eval knows no task {task} (close names: {close}): correct the task of the"
            " benchmark."
        )


def load_tasks(specification: list[TaskConfig] | None, name: str, data_root: Path | None) -> Any:
    """Task objects with their data; several become a group. Raises UserError when the data cannot
    be read.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    from lm_eval.tasks import TaskManager

    try:
        if specification is None:
            return full_manager().load([name])
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


def offline() -> bool:
    """Whether the hub is not to be asked."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


@contextmanager
def quiet() -> Iterator[None]:
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


def _bootstrapped(statistic: Callable[[Sequence[Any]], float], values: Any, iters: int) -> float:
    """lm-eval's standard error of what is no mean, without its processes and its printing."""
    from lm_eval.api.metrics import sample_stddev

    draw = random.Random(0)
    return float(
        sample_stddev([statistic(draw.choices(values, k=len(values))) for _ in range(iters)])
    )
