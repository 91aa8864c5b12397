"""specomp: SVD-based compression of language models. `import specomp` also makes compressed folders loadable by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specomp.models.registration import register_when_needed

if TYPE_CHECKING:
    from specomp.models.load import LoadedModel

__version__ = "0.1.0"

register_when_needed()


def load(folder: Path | str, *, dtype: str | None = None, device_map: str | None = None, stream: bool = False) -> LoadedModel:
    """The model that `save_compressed` wrote into `folder`; see specomp.models.export.load."""
    from specomp.models.export import load as load_folder  # here: `import specomp` must not cost the import of torch

    return load_folder(folder, dtype=dtype, device_map=device_map, stream=stream)
