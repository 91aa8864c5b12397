"""Calibration by two real processes over gloo: sums over tokens are shared out and added up once,
and equal those of one process.
"""

from pathlib import Path

import pytest
import torch
from command import command
from safetensors.torch import load_file

# Statistics of sites, of decoder layers and of gradients; seven samples in batches of two, so that
# the processes see unequal shares.
UNEVEN = ["calibration.num_samples=7", "calibration.batch_size=2", "benchmark=none"]
READS_MUCH = ["method=two_sided", "method/allocation=adacr", *UNEVEN]
SEVERAL = {
    "range by range": [*READS_MUCH, "trainer=ddp_cpu", "calibration.layers_at_once=1"],
    "as on GPUs": [
        "method=svd_llm",
        *UNEVEN,
        "trainer=ddp_cpu",
        "trainer.strategy=ddp_spawn",
    ],  # slow to start: the Gram alone
}


def statistics_of(folder: Path) -> dict[str, torch.Tensor]:
    """All of a cache, by entry, decoder layer and place."""
    files = sorted((folder / "cache" / "statistics").glob("*/*.safetensors"))
    return {
        f"{file.parent.name}/{file.stem}/{name}": value
        for file in files
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("one")
    done = command(folder, *READS_MUCH)
    assert done.returncode == 0, done.stderr
    return statistics_of(folder)


@pytest.mark.parametrize("several", SEVERAL)
def test_two_processes_calibrate_as_one(tmp_path, one_process, several):
    done = command(tmp_path, *SEVERAL[several])
    assert done.returncode == 0, done.stderr
    assert "by 2 processes" in done.stdout + done.stderr
    found = statistics_of(tmp_path)
    assert found.keys() <= one_process.keys() and len(found) > 10
    for name, value in found.items():
        assert float((value - one_process[name]).norm()) <= 1e-5 * float(value.norm()), name


def test_what_follows_the_order_of_the_samples_is_left_to_one_process(tmp_path):
    """Bucket means of consecutive samples; the Gram beside them is shared out."""
    stacked = [
        "method=adasvd",
        "method.compensation.stack_of_batch=mean",
        "method.compensation.upstream=dense",
    ]
    done = command(tmp_path, *stacked, "benchmark=none", "trainer=ddp_cpu")
    assert done.returncode == 0, done.stderr
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "calibrate" in line and "samples of" in line
    ]
    assert any("stacked_gram" in line and line.endswith("by one of them") for line in said), said
    assert any(" gram" in line and line.endswith("by 2 processes") for line in said), said
