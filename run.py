"""python run.py [group=choice ...] [key=value ...]: one experiment; with -m, a sweep. See
README.md.
"""

import logging
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger("specomp")
CONF = Path(__file__).parent / "conf"
NO_NAME = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|null|true|false", re.IGNORECASE)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """The primary metric of the run (what a sweeper optimizes), or None."""
    from specomp.errors import UserError  # imported here: --help and tab completion need no torch
    from specomp.experiment.pipeline import run

    try:
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


def check_choices(arguments: list[str]) -> None:
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
        choices = ", ".join(sorted(x.stem for x in (CONF / group).glob("*.yaml")))
        number = f" A number is written ratio.compression={value}." if group == "ratio" else ""
        raise SystemExit(f"specomp: {argument}: {group} is chosen by name: {choices}.{number}")


if __name__ == "__main__":
    check_choices(sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:
        log.warning("Interrupted. Finished work is kept; the same command goes on from there.")
        sys.exit(130)
