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
    save_file({"attention_mask": IDS}, tmp_path / "mask.safetensors")
    with pytest.raises(UserError, match=r"tensors found: attention_mask\)"):
        read_token_ids(tmp_path / "mask.safetensors")


ROWS = list(IDS.split(1))  # (1, 6) each


def masked(ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids) if mask is None else mask,
    }


@pytest.mark.parametrize(
    "content",
    [
        [masked(row) for row in ROWS],  # SVD-LLM, ASVD
        [masked(rows) for rows in IDS.split(3)],  # SVD-LLM with a batch size: 3 samples, then 1
        [(row, row.clone().index_fill(1, torch.arange(5), -100)) for row in ROWS],  # GPTQ
        [[row, row] for row in ROWS],
        ROWS,
        tuple(ROWS),
        list(IDS),  # (6,) each
        [row.to(torch.int32) for row in ROWS],
    ],
    ids=["svd_llm", "svd_llm_batches", "gptq", "pairs", "rows", "tuple", "flat", "int32"],
)
def test_calibration_files_of_others(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "theirs.pt")
    ids = read_token_ids(tmp_path / "theirs.pt")
    assert torch.equal(ids, IDS) and ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([IDS[:1], IDS[1:2], IDS[2:3, :4]], "sample 0 has 6 tokens, sample 2 has 4; cut all"),
        ([masked(IDS[:1]), masked(IDS[:1, 1:])], "sample 0 has 6 tokens, sample 1 has 5"),
        ([], "an empty list"),
        ([IDS[:1], "text"], "sample 1 is a str, not a tensor of token ids"),
        ([[1, 2, 3], [4, 5, 6]], "sample 0 is a list, not a tensor"),
        ([IDS[None]], r"sample 0 has shape \(1, 4, 6\), needs \(1, length\)"),
        ([IDS[:0]], r"sample 0 has shape \(0, 6\), needs"),
        ([IDS.float()], "dtype torch.float32 is not an integer type"),
        (
            [{"attention_mask": IDS}],
            r"needs .* input_ids or tokens \(tensors found: attention_mask",
        ),
        ([masked(IDS, (IDS > 1).long())], "attention_mask is 0 at 2 of 24 tokens; padding is not"),
        (masked(IDS, IDS > 0), "attention_mask is 0 at 1 of 24 tokens"),
        (masked(IDS, IDS[:, :2]), r"attention_mask has shape \(4, 2\), the ids have \(4, 6\)"),
        ([-ROWS[1]], "smallest id is -11"),
        ({"input_ids": [[1, 2]]}, r"tensors found: none\)"),
        ("text", "holds a str, not token ids"),
        (None, "holds a NoneType, not token ids"),
        (IDS.to_sparse(), "is not an integer type"),
        (IDS.bfloat16(), "dtype torch.bfloat16 is not an integer type"),
        (IDS.to(torch.complex64), "dtype torch.complex64 is not an integer type"),
    ],
)
def test_lists_and_tensors_that_are_no_samples(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=said) as caught:
        read_token_ids(tmp_path / "theirs.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["<i8", ">i8", ">i4", ">u2", ">u4", "<u8", ">u8", "u1", "i1"])
def test_byte_orders_and_widths(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "ids.npy", IDS.numpy().astype(dtype))
    assert torch.equal(read_token_ids(tmp_path / "ids.npy"), IDS)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    for name in ("ids.pt", "ids.safetensors"):
        assert torch.equal(read_token_ids(write(tmp_path / name, IDS.to(dtype))), IDS)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((2, 3), 2**31), "largest id is 2147483648"),
        (np.full((2, 3), 2**63, dtype=np.uint64), "largest id is 9223372036854775808"),
        (np.array([["a"]]), "dtype <U1 is not an integer type"),
        (np.array([["2026-01-01"]], dtype="datetime64[D]"), "is not an integer type"),
        (np.zeros((2, 3), dtype=np.longdouble), "is not an integer type"),
        (np.zeros((2, 3), dtype=[("a", "<i4")]), "is not an integer type"),
    ],
)
def test_arrays_that_are_no_ids(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(UserError, match=said) as caught:
        read_token_ids(tmp_path / "ids.npy")
    assert "\n" not in str(caught.value)


def test_damaged_bytes_are_one_line_wherever_they_are(tmp_path: Path) -> None:
    """Every loader, one byte changed or the end cut off: the ids, or one line."""
    for name in ("ids.pt", "ids.npy", "ids.safetensors"):
        whole = write(tmp_path / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            changed = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
            for content in (changed, whole[:place]):
                (tmp_path / name).write_bytes(content)
                try:
                    read_token_ids(tmp_path / name)
                except UserError as error:
                    assert "\n" not in str(error)


def test_an_archive_is_no_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", a=IDS.numpy())
    (tmp_path / "ids.npz").rename(tmp_path / "ids.npy")
    with pytest.raises(UserError, match="holds an .npz archive, not token ids"):
        read_token_ids(tmp_path / "ids.npy")


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
        (IDS.float(), r"dtype (torch\.)?float32 is not an integer type"),
        (IDS > 3, r"dtype (torch\.)?bool is not an integer type"),
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


def test_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ids.bin").touch()
    with pytest.raises(UserError, match="unknown suffix '.bin'; use .safetensors, .npy or .pt"):
        read_token_ids(tmp_path / "ids.bin")
    for name, said in [
        ("gone.npy", "does not exist"),
        ("", "is a folder"),
        ("ids.bin/ids.npy", r"cannot be read \(Not a directory\)"),
    ]:
        with pytest.raises(UserError, match=f"{said}; set the path to"):
            read_token_ids(tmp_path / name)

    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UserError, match=r"ids.bin cannot be read \(Permission denied\); set the"):
        read_token_ids(tmp_path / "ids.bin")
