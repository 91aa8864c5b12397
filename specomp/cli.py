"""`specomp ...` and `python run.py ...`: an experiment, a sweep, or a command about results.

Nothing here imports torch before the first line is printed: help, completion and refusals are
quick.
"""

import logging
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

import specomp
from specomp.errors import UserError, meant, needed
from specomp.experiment.completed import completed
from specomp.experiment.label import first_line
from specomp.settings import CONF, choices

log = logging.getLogger("specomp")
NO_NAME = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|null|true|false", re.IGNORECASE)
COMMANDS = {
    "plan": "what an experiment will take here; nothing is run",
    "table": "results: of a paper's table, of a sweep, of a folder",
    "report": "a sweep as one HTML page with its figures",
    "dashboard": "the same in W&B",
}
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


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def experiment(cfg: DictConfig) -> float | None:
    """The primary metric of the run (what a sweeper optimizes), or None."""
    try:
        cfg = completed(cfg)
        log.info("%s", first_line(HydraConfig.get(), cfg))
        from specomp.experiment.pipeline import run  # imported here: it needs torch, and seconds

        return run(cfg)
    except Exception as error:
        line = (
            f"specomp: {error}"
            if isinstance(error, UserError)
            else f"{type(error).__name__}: {error}"
        )
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            # Hydra tells only the first failure of a sweep, after its last job
            log.error("%s", line)
        if not isinstance(error, UserError):
            raise
        # Hydra prints this class as the one line it is, lets the other jobs of a sweep go on, and
        # exits 1.
        raise CompactHydraException(line) from error


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
    first, rest = (typed[0], list(typed[1:])) if typed else ("", [])
    if first == "plan":
        typed = [*rest, "plan=true"]
    elif first in COMMANDS:
        return tool(first, rest)
    elif first and re.fullmatch(r"\w+", first):
        sys.stderr.write(
            f"specomp: no command {first}{meant(first, COMMANDS)} An experiment is typed as"
            " choices, such as method=adasvd.\n"
        )
        return 1
    check_choices(typed)
    sys.argv[1:] = typed  # where Hydra reads them
    try:
        experiment()
    except KeyboardInterrupt:
        log.warning("Interrupted. Finished work is kept; the same command goes on from there.")
        return 130
    except BrokenPipeError:  # `specomp --help | head`
        sys.stdout = None  # type: ignore[assignment]
        return 0
    finally:
        show_sweep()
    return 0


def tool(name: str, typed: Sequence[str]) -> int:
    """A command about results. The exit code."""
    try:
        if name != "table":
            needed("matplotlib", "figures", f"specomp {name}")
    except UserError as error:
        log.error("%s", error)
        return 1
    command: Callable[[Sequence[str]], int] = import_module(f"specomp.tables.{name}").main
    return command(typed)


def show_sweep() -> None:
    """The table of the sweep that has just ended, whether or not every job of it did."""
    logs = sys.modules.get("specomp.experiment.logs")  # Hydra imports it when it starts a run
    for cfg in logs.sweeps if logs else []:
        if not cfg.plan:
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
        number = f" A number is written ratio.compression={value}." if group == "ratio" else ""
        there = ", ".join(choices(group))
        raise SystemExit(f"specomp: {argument}: {group} is chosen by name: {there}.{number}")
