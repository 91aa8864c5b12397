"""Scripts of experiments/: each can be imported, which by itself does nothing, and those that look
at one model run on a tiny one.
"""

import argparse
import csv
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from running import ROOT

EXPERIMENTS = ROOT / "experiments"
SCRIPTS = {
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix(): path
    for path in sorted(EXPERIMENTS.rglob("*.py"))
}
# No dependency of ours; the script that compares with it says how to get it.
FOREIGN = ("gptqmodel", "gptqmodel.quantization", "gptqmodel.quantization.gptq")


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """The module of a script; those beside it can be imported until the test ends."""

    def loaded(name: str) -> ModuleType:
        path = SCRIPTS[name]
        monkeypatch.syspath_prepend(path.parent)
        for foreign in FOREIGN:
            monkeypatch.setitem(sys.modules, foreign, MagicMock())
        for sibling in path.parent.glob("*.py"):
            monkeypatch.setitem(sys.modules, sibling.stem, None)  # so that it is gone afterwards
            del sys.modules[sibling.stem]
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Overrides for a run of seconds."""
    folder = tmp_path_factory.mktemp("shared")
    places = [f"paths.cache={folder / 'cache'}", f"paths.outputs={folder / 'outputs'}"]
    return ["debug=tiny", *places, "paths.data=null"]


def test_scripts_were_found():
    assert len(SCRIPTS) >= 11


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing_else(name, script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    threads, before = torch.get_num_threads(), sorted(SCRIPTS[name].parent.glob("*.*"))
    assert script(name).__doc__
    assert torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir()) and sorted(SCRIPTS[name].parent.glob("*.*")) == before


def test_importances_of_decoder_layers(script, tiny, tmp_path, monkeypatch):
    figure4 = script("adasvd_figure4/importance")
    monkeypatch.setattr(figure4, "HERE", tmp_path)
    figure4.main(tiny)
    with (tmp_path / "tiny_llama.csv").open(newline="") as file:
        importance = [float(row["importance"]) for row in csv.DictReader(file)]
    assert sum(importance) / len(importance) == pytest.approx(1, abs=1e-4)
    assert "tiny_llama" in (tmp_path / "importance.svg").read_text()


def test_distributions_of_outputs(script, tiny, tmp_path, monkeypatch):
    """Repair never makes the output error larger, and the whitened start is a fixed point."""
    figure3c = script("adasvd_figure3c/outputs")
    monkeypatch.setattr(figure3c, "HERE", tmp_path)
    figure3c.main([*tiny, "ratio=cr60"])
    with (tmp_path / "outputs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        errors.setdefault((row["linear"], row["start"]), []).append(float(row["output error"]))
        assert 0 < float(row["overlap"]) <= 1
    assert len(errors) == 14 and len(rows) == 4 * len(errors)
    for (_, start), found in errors.items():
        assert found == sorted(found, reverse=True)
        assert start == "svd" or max(found) - min(found) <= 1e-4
    assert "outputs.svg" in {path.name for path in tmp_path.iterdir()}


def test_gates_on_one_matrix(script, tiny, monkeypatch, capsys):
    """In the Gram norm the order of singular values is the best one, and no gate improves on it."""
    reconstruction = script("soco/reconstruction")
    monkeypatch.setattr(reconstruction, "STEPS", 60)
    reconstruction.main(tiny)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["SVD of W", "Gram"]
    for row in rows:
        by_value, best, learned = map(float, row[2:5])
        assert best <= by_value and best <= learned + 1e-4
    assert rows[1][2] == rows[1][3]


def test_four_bits(script, tiny, monkeypatch, capsys):
    four = script("benchmarks/int4_factors")
    monkeypatch.setattr(four, "LINEARS", ("0.self_attn.q_proj", "1.mlp.down_proj"))
    monkeypatch.setattr(sys, "argv", ["int4_factors.py", *tiny])
    four.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    errors = {name.strip("| "): float(first) for name, first, *_ in (x.split(" | ") for x in rows)}
    assert set(errors) == set(four.WAYS)
    assert errors["gptq, rebalanced"] < errors["nearest"]


def test_published_procedure_and_ours(script, tiny, tmp_path, monkeypatch, capsys):
    """Both make the same of a model's linears."""
    cost = script("benchmarks/cost")
    monkeypatch.setattr(cost, "seconds", {})
    cost.smollm2(argparse.Namespace(overrides=tiny, repeats=1))
    assert "first / second ratio, ours" in capsys.readouterr().out
    made = []
    for who in (cost.ours, cost.published):
        run = cost.prepare(cost.Cache(tmp_path / "cache"), tiny)
        who(run, "again")
        modules = (run.model.get_submodule(x.name) for x in run.linears)
        made.append([module.merged_weight().detach() for module in modules])
    for mine, theirs in zip(*made, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_front_is_what_nothing_as_small_beats(script):
    pareto = script("pareto/pareto")
    spots = [
        pareto.Spot(name, bits, value, 10.0)
        for name, bits, value in (
            ("a", 2, 90),
            ("b", 3, 50),
            ("c", 3, 60),
            ("d", 4, 55),
            ("e", 5, 20),
        )
    ]
    assert [x.name for x in pareto.front(spots)] == ["a", "b", "e"]
    assert "| text | 3.00 | 50.00 | 5.000 | `b` |" in pareto.table({"text": spots})


def test_committed_records_cost_the_bits_that_their_parts_do(script):
    """GPTQ in groups of 128 with zeros: 4 + (16 + 8) / 128 and what a row of 576 leaves; low rank
    on no grid: 16 bits a number, and its indices.
    """
    pareto = script("pareto/pareto")
    committed = pareto.RecordStore(pareto.COMMITTED).all()
    records = [x for x in committed if x.status == "ok" and x.label("model") == "smollm2_135m"]
    found = {
        (pareto.name_of(x), round(x.counted.measured_retention, 1)): pareto.stored_bits(x)
        for x in records
    }
    gptq = "dense quantizer=gptq_int4 quantizer.group_size=128 quantizer.search=6"
    bits = [pareto.stored_bits(x) for x in records if pareto.name_of(x) == gptq]
    assert sorted(round(x, 2) for x in bits) == [2.20, 3.20, 4.20]
    assert found["svd_llm", 0.6] == pytest.approx(0.5987 * 16, rel=1e-3)
    assert 9.6 <= found["specomp", 0.6] < 9.7
