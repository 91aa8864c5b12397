"""python run.py [group=choice ...] [key=value ...]: one experiment; with -m, a sweep. See README.md."""

import logging
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger("specomp")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """The primary metric of the run (what a sweeper optimizes), or None."""
    from specomp.errors import UserError  # imported here: --help and tab completion need no torch
    from specomp.pipeline import run

    try:
        return run(cfg)
    except Exception as error:
        line = f"specomp: {error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("%s", line)  # Hydra tells only the first failure of a sweep, after its last job
        if not isinstance(error, UserError):
            raise
        # Hydra prints this class as the one line it is, lets the other jobs of a sweep go on, and exits 1.
        raise CompactHydraException(line) from error


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("Interrupted. Finished work is kept; the same command goes on from there.")
        sys.exit(130)
