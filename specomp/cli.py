"""`specomp ...` and `python run.py ...`: an experiment, a sweep, or a command about results.

Nothing here imports torch before the first line is printed: help, completion and refusals are
quick.
"""

import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import specomp
from specomp.errors import UserError, meant, needed
from specomp.errors import first_line as first
from specomp.experiment.completed import completed
from specomp.experiment.environment import forget_empty, hidden, hide_in_logs
from specomp.experiment.guard import extra_of
from specomp.experiment.label import first_line
from specomp.experiment.making import make
from specomp.interrupts import heeded, until_interrupted
from specomp.settings import BESIDE, CONF, choices

log = logging.getLogger("specomp")
handle_error = logging.Handler.handleError
NO_NAME = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|null|true|false", re.IGNORECASE
)
COMMANDS = {
    "plan": "what an experiment will take here; nothing is run",
    "table": "results: of a paper's table, of a sweep, of a folder",
    "report": "a sweep as one HTML page with its figures",
    "dashboard": "the same in W&B",
    "push": "a model folder to the hub",
    "convert": "a checkpoint of SVD-LLM or ASVD to a model folder",
}
# how Hydra tells of a choice that there is not
UNKNOWN = re.compile(
    r"Could not find '(\S+)/([^'/]*)'\s+Available options in '[^']*':\s+(.*)", re.S
)
# how it begins where it answers with a ValueError: options that exclude each other, no name
OPTIONS = ("Only one of --", "The --resolve", "Config group override")
FULL = "HYDRA_FULL_ERROR"  # of the environment: tracebacks also where a line says it
INDENT = " " * 13
ABOUT = """\
specomp {version}: language models made smaller by factorizing their weight matrices

  specomp method=adasvd ratio=cr40                  compress a model, measure it, keep a record
  specomp -m method=svd_llm,adasvd ratio=cr20,cr40  every combination; finished jobs are skipped
  specomp debug=tiny                                seconds, on a random model: is all in place?
{commands}
  specomp --help                                    every choice and every setting
  specomp --config-dir FOLDER model=mine            yamls of your own beside these

{choices}
In Python: import specomp; specomp.compress(model, tokens, method="adasvd", ratio=0.4)
"""


PLAN = """\
usage: specomp plan [EXPERIMENT] [-m] [choices and settings, as after specomp]

Stages, time, memory and disk that an experiment takes on this machine, and what the compressed
model will hold: no weight is loaded, nothing is run. The same as plan=true.

  specomp plan method=adasvd ratio=cr40
  specomp plan model=llama2_7b method=specomp ratio=cr20
  specomp plan adasvd_table1                        every job of the sweep

specomp --help says every choice and every setting.
"""


class Refused(SystemExit):
    """Out of Hydra's sight, which would announce the one job there is as the one that failed."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def experiment(cfg: DictConfig) -> float | None:
    """The primary metric of the run (what a sweeper optimizes), or None."""
    try:
        with heeded():
            cfg = completed(cfg)
            log.info("%s", first_line(HydraConfig.get(), cfg))
            for group in ("options", "ratio"):  # what is known without a model, without the wait
                make(cfg, group)
            from specomp.experiment.pipeline import (
                run,  # imported here: it needs torch, and seconds
            )

            return run(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            # Hydra tells only the first failure of a sweep, after its last job
            log.error("%s", said(error) or hidden(f"{type(error).__name__}: {error}"))
        elif (line := said(error)) is not None:
            raise Refused(line) from error
        raise


def said(error: BaseException) -> str | None:
    """What is wrong in one line; None for a fault of the program, which has a traceback."""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, HydraException):
        text = _said_by_hydra(error)
    elif isinstance(error, OmegaConfBaseException):
        text = f"{error.full_key or 'config'}: {first(error)}"
    elif isinstance(error, OSError) and error.errno is not None:
        place = f" {error.filename}" if error.filename else ""
        text = f"Cannot use{place}: {error.strerror}; point paths.outputs or paths.cache elsewhere."
    elif isinstance(error, ValueError) and str(error).startswith(OPTIONS):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "Out of memory: a smaller model or model.stream=true needs less."
    else:
        return None
    return f"specomp: {hidden(' '.join(text.split()))}"


def _said_by_hydra(error: HydraException) -> str:
    """Its message, which goes over many lines, and what it was caused by."""
    text = str(error).partition("Config search path:")[0]
    if unknown := UNKNOWN.search(text):
        group, choice, there = unknown.groups()
        text = f"{group} has no choice {choice or repr(choice)}{meant(choice, there.split())}"
        return text + extra_of(f"{group} {choice}")
    cause = error.__cause__
    if text.startswith("Could not override") and isinstance(cause, OmegaConfBaseException):
        return _no_setting(text, cause)
    if isinstance(cause, OmegaConfBaseException):
        text += f": {first(cause)}"
    typed = getattr(error, "override", None)  # of one that cannot be read
    return text if typed is None or typed in text else f"{typed}: {text}"


def _no_setting(text: str, cause: OmegaConfBaseException) -> str:
    """Hydra advises to add what is only misspelled."""
    node = cause.parent_node
    there = [str(x) for x in node if not str(x).startswith("_")] if node is not None else []
    typed, key = text.partition("'")[2].partition("'")[0], str(cause.key)
    before = f".{typed}.".partition(f".{key}.")[0].strip(".")
    told = f"{before or 'The config'} has no setting {key}{meant(key, there) if there else '.'}"
    return f"{told} To add it: +{typed}=..." if typed.startswith("hydra.") else told


def main() -> int:
    """The command `specomp`; alone it says what it can do. The exit code."""
    typed = sys.argv[1:]
    if not typed:
        sys.stdout.write(about())
        return 0
    return run(typed)


def run(typed: Sequence[str]) -> int:
    """What was typed after `specomp` or `python run.py`; nothing typed is the default experiment.
    The exit code.
    """
    return until_interrupted(lambda: _run(list(typed)))


def _run(typed: list[str]) -> int:
    forget_empty()
    hide_in_logs()
    own, others = own_yamls(typed)
    first, rest = (others[0], others[1:]) if others else ("", [])
    if first == "plan" and {"-h", "--help"} & set(rest):
        sys.stdout.write(PLAN)
        return 0
    if first == "plan":
        rest = [f"experiment={x}" if x in choices("experiment") else x for x in rest]
        typed = [*own, *rest, "plan=true"]
    elif first in COMMANDS:
        return tool(first, rest)
    elif first and re.fullmatch(r"\w+", first):
        sys.stderr.write(
            f"specomp: no command {first}{meant(first, COMMANDS)} An experiment is typed as"
            " choices, such as method=adasvd.\n"
        )
        return 1
    check_choices(typed)
    # where Hydra reads them: options in front, for argparse takes none after the rest
    sys.argv[1:] = sorted(typed, key=lambda x: x[:1] == "~" or ("=" in x and x[:1] != "-"))
    try:
        code = told(experiment)
        show_sweep()
        sys.stdout.flush()
    except BrokenPipeError:  # `specomp --help | head`
        sys.stdout = None  # type: ignore[assignment]
        return 0
    return code


def own_yamls(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config-dir FOLDER`, from wherever it stands, and all else; from here on its choices are
    known.
    """
    own, others, left = [], [], list(typed)
    while left:
        word = left.pop(0)
        if word in ("--config-dir", "-cd") and left:
            own.append(left.pop(0))
        elif word.startswith("--config-dir="):
            own.append(word.partition("=")[2])
        else:
            others.append(word)
    BESIDE[:] = [Path(x).expanduser().absolute() for x in own]
    return [x for folder in own for x in ("--config-dir", folder)], others


def log_once(handler: logging.Handler, record: logging.LogRecord) -> None:
    """A log that cannot be written, on a full disk say, stops nothing: one line instead of a
    traceback for every message.
    """
    error = sys.exc_info()[1]
    if isinstance(error, OSError):
        handler.acquire()
        handler.setLevel(logging.CRITICAL + 1)
        handler.release()
        sys.stderr.write(f"specomp: the log ends here: {error.strerror}.\n")
    else:
        handle_error(handler, record)


def told(work: Callable[[], Any]) -> int:
    """What goes wrong in it is one line, or for a fault of the program the traceback. The exit
    code.
    """
    full = os.environ.get(FULL)
    os.environ[FULL] = "1"  # Hydra prints nothing of its own, and hands over what was raised
    logging.Handler.handleError = log_once  # type: ignore[assignment, method-assign]
    try:
        work()
    except Refused as refused:
        sys.stderr.write(f"{refused}\n")
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        line = said(error)
        if line is None or full == "1":
            traceback.print_exception(error)
        if line is not None:
            sys.stderr.write(f"{line}\n")
        return 1
    finally:
        logging.Handler.handleError = handle_error  # type: ignore[method-assign]
        os.environ.pop(FULL)
        if full is not None:
            os.environ[FULL] = full
    return 0


def tool(name: str, typed: Sequence[str]) -> int:
    """A command about results or about what was saved. The exit code."""
    try:
        if name in ("report", "dashboard"):
            needed("matplotlib", "figures", f"specomp {name}")
    except UserError as error:
        log.error("%s", error)
        return 1
    place = "models" if name in ("push", "convert") else "tables"
    command: Callable[[Sequence[str]], int] = import_module(f"specomp.{place}.{name}").main
    return command(typed)


def show_sweep() -> None:
    """The table of the sweep that has just ended, whether or not every job of it did."""
    logs = sys.modules.get("specomp.experiment.logs")  # Hydra imports it when it starts a run
    for cfg in logs.sweeps if logs else []:
        if not cfg.plan and not any(x.startswith("plan=") for x in cfg.hydra.overrides.task):
            from specomp.tables.table import after

            try:
                sys.stdout.write(after(cfg.hydra, str(cfg.paths.outputs)))
            except UserError as error:
                log.warning("No table of the sweep: %s", error)


def about() -> str:
    """What the command can do."""
    commands = [f"  specomp {f'{name} ...':<42}{text}" for name, text in COMMANDS.items()]
    there = [
        textwrap.fill(f"{f'{group}=':<13}{', '.join(choices(group))}", 99, subsequent_indent=INDENT)
        for group in ("model", "method", "experiment")
    ]
    return ABOUT.format(
        version=specomp.__version__, commands="\n".join(commands), choices="\n".join(there)
    )


def check_choices(arguments: Sequence[str]) -> None:
    """A number or null where a choice belongs, which Hydra answers with a traceback. Raises
    SystemExit.
    """
    for argument in arguments:
        group, _, value = argument.partition("=")
        if (
            not any(NO_NAME.fullmatch(x.strip()) for x in value.split(","))
            or not (CONF / group).is_dir()
        ):
            continue
        written = as_number(value) if group == "ratio" else ""
        number = f" A number is written {written}." if written else ""
        there = ", ".join(choices(group))
        raise SystemExit(f"specomp: {argument}: {group} is chosen by name: {there}.{number}")


def as_number(typed: str) -> str:
    """What was typed after ratio=, as the setting that takes it; "" where none does."""
    try:
        found = [float(x) for x in typed.split(",")]
    except ValueError:
        return ""
    if all(1 <= x < 100 for x in found):  # percent
        found = [x / 100 for x in found]
    return (
        f"ratio.compression={','.join(f'{x:g}' for x in found)}"
        if all(0 <= x < 1 for x in found)
        else ""
    )
