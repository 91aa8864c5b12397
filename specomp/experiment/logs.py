"""The folder that Hydra writes its logs into, made before Hydra does: it would answer one that
cannot be written with a traceback.
"""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from specomp.cache import make_folder
from specomp.errors import UserError


class LogsFolder(Callback):
    """Called by Hydra at the start of a run and of a sweep (hydra.callbacks in
    conf/config.yaml).
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit: Hydra makes a warning of any other exception here."""
        try:
            make_folder(Path(config.paths.outputs) / "logs")
        except UserError as error:
            raise SystemExit(f"specomp: {error}") from error

    on_multirun_start = on_run_start
