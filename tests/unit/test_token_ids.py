"""Token files: three formats read alike; nothing is ever unpickled; unfit content is one line for
the user.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specomp.data.token_ids import read_token_ids
from specomp.errors import UserError

IDS = torch.arange(24).reshape(4, 6)


def write(path: Path, ids: torch.Tensor = IDS) -> Path:
    if path.suffix == ".npy":
        np.save(path, ids.numpy())
    elif path.suffix == ".pt":
        torch.save(ids, path)
    else:
        save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, path)
    return path


@pytest.mark.parametrize("name", ["ids.safetensors", "ids.npy", "ids.pt"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_file_round_trip(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = write(tmp_path / name, IDS.to(dtype))
    assert torch.equal(read_token_ids(path), IDS)
    assert read_token_ids(path).dtype == torch.int64


def test_token_file_containers(tmp_path: Path) -> None:
    torch.save({"tokens": IDS, "other": IDS + 1}, tmp_path / "named.pt")
    save_file({"anything": IDS}, tmp_path / "single.safetensors")
    np.save(tmp_path / "wide.npy", IDS.numpy().astype(np.uint16))
    for name in ("named.pt", "single.safetensors", "wide.npy"):
        assert torch.equal(read_token_ids(tmp_path / name), IDS)
    save_file({"a": IDS, "b": IDS + 1}, tmp_path / "two.safetensors")
    with pytest.raises(
        UserError,
        match=r"needs a single tensor or one called input_ids or tokens \(tensors found: a, b\)",
    ):
        read_token_ids(tmp_path / "two.safetensors")
    torch.save([IDS], tmp_path / "list.pt")
    with pytest.raises(UserError, match="tensors found: none"):
        read_token_ids(tmp_path / "list.pt")


class Evil:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_content_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save(Evil(mark), tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(mark)))
    np.save(tmp_path / "evil.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("evil.pt", "plain.pt", "evil.npy", "plain.npy"):
        with pytest.raises(UserError, match="pickled objects, which are never loaded") as error:
            read_token_ids(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS.float(), "dtype torch.float32 is not an integer type"),
        (IDS > 3, "dtype torch.bool is not an integer type"),
        (IDS[0], r"shape \(6,\) is not \(samples, length\)"),
        (IDS[None], r"shape \(1, 4, 6\) is not \(samples, length\)"),
        (IDS[:0], r"shape \(0, 6\) is not"),
        (IDS - 1, "smallest id is -1"),
    ],
)
def test_unfit_token_files(tmp_path: Path, ids: torch.Tensor, message: str) -> None:
    for name in ("ids.pt", "ids.npy", "ids.safetensors"):
        with pytest.raises(UserError, match=message):
            read_token_ids(write(tmp_path / name, ids.clone()))


@pytest.mark.parametrize(
    "name",
    ["broken.pt", "broken.npy", "broken.safetensors", "empty.npy", "empty.pt", "empty.safetensors"],
)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nonsense" if "broken" in name else b"")
    with pytest.raises(UserError, match="cannot be read as a plain tensor"):
        read_token_ids(tmp_path / name)


def test_wrong_places(tmp_path: Path) -> None:
    (tmp_path / "ids.bin").touch()
    with pytest.raises(UserError, match="unknown suffix '.bin'; use .safetensors, .npy or .pt"):
        read_token_ids(tmp_path / "ids.bin")
    for name in ("gone.npy", ""):
        with pytest.raises(UserError, match="does not exist; set the path to"):
            read_token_ids(tmp_path / name)
