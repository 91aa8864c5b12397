"""What Hydra calls at the start of a run and of a sweep (hydra.callbacks in conf/config.yaml): the
folder of its logs, made before Hydra does, which would answer one that cannot be written with a
traceback; and the sweep is remembered, for its table at the end.
"""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from specomp.disk import make_folder
from specomp.errors import UserError

sweeps: list[DictConfig] = []  # that were started in this process


class LogsFolder(Callback):
    """Makes it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit: Hydra makes a warning of any other exception here."""
        try:
            make_folder(Path(config.paths.outputs) / "logs")
        except UserError as error:
            raise SystemExit(f"specomp: {error}") from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same, once for all jobs."""
        self.on_run_start(config)
        sweeps.append(config)
