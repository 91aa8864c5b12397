"""profile=true leaves a trace, a flame graph's input and a table for every stage, and changes
nothing else.
"""

import gzip
import json

from command import command, typed


def test_every_stage_is_traced(tmp_path):
    done = command(tmp_path, "profile=true", "method=svd_llm")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "profiles").iterdir()
    assert "a run that torch's profiler watched" in done.stdout, "the record says so"
    tables = sorted(folder.glob("*.txt"))
    names = [path.stem[3:] for path in tables]
    assert [name.split("_")[0] for name in names] == [
        "pydocs",
        "calibrate",
        "compress",
        "pydocs",
    ], "dense first, then the compressed one"
    for table in tables:
        assert "Self CPU" in table.read_text()
        lines = table.with_suffix(".stacks").read_text().splitlines()
        assert all(line.rpartition(" ")[2].isdigit() for line in lines)
        assert len({line.rpartition(" ")[0] for line in lines}) == len(lines), "every stack once"
        with gzip.open(table.with_suffix(".json.gz"), "rt") as file:
            assert json.load(file)["traceEvents"]
    assert (
        "aten::mm" in (folder / f"{tables[1].stem}.txt").read_text()
        or "aten::matmul" in tables[1].read_text()
    )
    calibration = tables[1].with_suffix(".stacks").read_text()
    assert "statistics.py" in calibration and "update" in calibration, (
        "our own functions are in the stacks"
    )


def test_nothing_is_traced_unless_asked(tmp_path):
    assert typed(tmp_path, "debug=tiny", "method=svd_llm").returncode == 0
    assert not (tmp_path / "outputs" / "profiles").exists()
