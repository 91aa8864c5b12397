"""Keys and points stay what they were: through every renaming, committed records are found by what
is typed today.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import CONF, compose_config

from specomp import rows
from specomp.experiment import names
from specomp.experiment.config import build
from specomp.experiment.making import make
from specomp.experiment.names import (
    LATER,
    OLD_TARGETS,
    WEIGHTS,
    method_identity,
    portable,
    without_later,
)
from specomp.experiment.record import COMMITTED, Record, RecordStore, point_of, record_key
from specomp.slots import Method, describe

RECORDS = RecordStore(COMMITTED).all()
# By choice: what a point was made of when the first records were made. Classes and settings,
# without values.
FIRST = json.loads((Path(__file__).parent / "first_names.json").read_text())
REQUIRED = {
    "calibration=token_ids": ["calibration.path=x"],
    "model=local": ["model.path=x"],
    "model=hub": ["model.repo=x/y", "model.revision=z"],
}
# A default has changed since, of method/training=polish and of method=specomp, which damps the
# inputs now: another command makes them today.
ANOTHER_DEFAULT = {"f61f6a91e7be", "e411dc644314", "ef386663da92"}
# Made before LoRA had this setting, which their keys do not name: found by their points alone.
NOT_IN_KEY = {"3f6f448b2978": {"num_samples": None}, "5d54ccc50b3a": {"num_samples": None}}


def key(record: Record) -> str:
    return record.key[:12]


def in_no_table() -> list[Record]:
    """Those of no committed table; tests/test_experiments.py makes the tables again from what is
    typed.
    """
    shown: set[str] = set()
    for path in COMMITTED.parent.glob("*/table.csv"):
        with path.open(newline="") as file:
            shown |= {x for row in csv.DictReader(file) for x in row["records"].split()}
    return [x for x in RECORDS if key(x) not in shown]


def container(*overrides: str) -> dict[str, Any]:
    """What `python run.py overrides...` composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["paths.data=null", *overrides])
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return plain


@cache
def typed(*overrides: str) -> tuple[str, Method]:
    """Point and method of a command as it is composed today."""
    plain = container(*overrides)
    cfg = OmegaConf.create(plain)
    return point_of(plain), make(cfg, "method", rounding=cfg.quantizer)


def loaded(group: str, choice: str) -> Any:
    return OmegaConf.to_container(rows.load(group, choice))


def in_todays_names(node: Any) -> Any:
    """A part of a stored config with the names that its classes have now."""
    if isinstance(node, list):
        return [in_todays_names(x) for x in node]
    if not isinstance(node, Mapping):
        return node
    today = {old: new for new, old in OLD_TARGETS.items()}
    kind = str(node.get("_target_")).rpartition(".")[2]
    later = LATER.get(kind, {})
    found = later | {k: in_todays_names(v) for k, v in node.items()}
    return found | {k: today.get(v, v) for k, v in node.items() if k == "_target_"}


def stored_method(record: Record) -> Method:
    """The method that a record was made with."""
    slots = {"refinement": loaded("method/refinement", "none")} | in_todays_names(
        record.config["method"]
    )
    if slots["compensation"]["_target_"].endswith(".BlockRefine"):
        slots["refinement"] = slots["compensation"]
        slots["compensation"] = loaded("method/compensation", "none")
    return rows.built(slots | {"rounding": in_todays_names(record.config["quantizer"])}, "method")


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from [node["_target_"]] if "_target_" in node else []
        for value in node.values():
            yield from targets(value)
    if isinstance(node, list):
        for value in node:
            yield from targets(value)


def exists(target: str) -> bool:
    module, _, attribute = target.rpartition(".")
    return hasattr(import_module(module), attribute)


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_there_are_records():
    assert len(RECORDS) > 100
    assert {key(x) for x in RECORDS} >= {*ANOTHER_DEFAULT, *NOT_IN_KEY}


@pytest.mark.parametrize("record", RECORDS, ids=key)
def test_a_record_has_the_point_of_its_own_config(record):
    """By which tables find it."""
    assert point_of(record.config) in record.points


@pytest.mark.parametrize("record", RECORDS, ids=key)
def test_a_record_has_the_key_of_what_made_it(record):
    """By which a run finds it."""
    assert record_key(record.identity) == record.key
    method, stored = stored_method(record), record.identity["method"]
    if stored == "dense":
        assert method.is_dense
        return
    training = stored["training"] | NOT_IN_KEY.get(key(record), {})
    assert plain(method_identity(method)) == stored | {"training": training}
    assert plain(without_later(describe(method.rounding))) == record.identity["quantizer"]
    if not method.spends:
        return
    budget = rows.built(in_todays_names(record.config["ratio"]), "ratio").identity()
    assert budget == {name: record.identity[name] for name in budget}


@pytest.mark.parametrize("record", in_no_table(), ids=key)
def test_a_record_of_no_table_is_found_by_its_command_as_it_is_composed_today(record):
    before = "units" not in record.config["method"]
    renamed = {"method=specomp": "method=specomp_low_rank"} if before else {}
    overrides = (x for x in record.config["overrides"] if not x.startswith("paths."))
    point, method = typed(*(renamed.get(x, x) for x in overrides))
    same = key(record) not in ANOTHER_DEFAULT
    assert (point in record.points) is same
    assert (method_identity(method) == method_identity(stored_method(record))) is same


def test_every_class_of_a_record_is_known_today():
    """Under its own name, or as the old name of another."""
    stored = {
        x for record in RECORDS for group in WEIGHTS for x in targets(record.config.get(group))
    }
    stored |= set(targets(list(FIRST.values())))
    assert len(stored) > 30
    for name in sorted(stored - set(OLD_TARGETS.values())):
        assert exists(name), f"{name} has moved: say so in OLD_TARGETS"


def test_every_old_name_is_one_of_a_class_that_exists():
    assert len(set(OLD_TARGETS.values())) == len(OLD_TARGETS), "two classes would be one"
    assert all(map(exists, OLD_TARGETS))


def shape(value: Any) -> Any:
    """Names without values."""
    if isinstance(value, Mapping):
        return {k: v if k in ("_target_", "class") else shape(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(x, (Mapping, list)) for x in value):
        return [shape(x) for x in value]
    return None


def as_key(node: Any) -> Any:
    """What a key says where a point says this: the class without its place."""
    if not isinstance(node, Mapping):
        return node
    found = {k: as_key(v) for k, v in node.items() if k not in ("_target_", "_convert_")}
    return found | ({"class": node["_target_"].rpartition(".")[2]} if "_target_" in node else {})


@pytest.mark.parametrize("choice", [x for x in FIRST if x.startswith("method/")])
def test_a_slot_is_called_what_it_was_called_first(choice):
    """In points and in keys. (What Hydra composes of a choice is what the library reads:
    tests/test_configs.py.)
    """
    slot, _, name = choice.removeprefix("method/").partition("=")
    row = loaded("method", "svd")
    if (slot, name) == ("compensation", "block_refine"):
        row["refinement"] = loaded("method/refinement", name)
    else:
        row[slot] = loaded(f"method/{slot}", name)
    assert shape(portable({"method": row})["method"][slot]) == FIRST[choice]
    method = rows.built(row | {"rounding": loaded("quantizer", "none")}, "method")
    assert shape(method_identity(method)[slot]) == as_key(FIRST[choice])


@pytest.mark.parametrize("choice", [x for x in FIRST if not x.startswith("method/")])
def test_a_choice_is_called_what_it_was_called_first(choice):
    group, _, name = choice.partition("=")
    cfg = container(choice, *REQUIRED.get(choice, []))
    assert shape(portable(cfg)[group]) == FIRST[choice]
    if group == "quantizer":
        assert shape(without_later(describe(rows.built(loaded(group, name), group)))) == as_key(
            FIRST[choice]
        )


def test_a_class_that_only_a_command_line_names_is_called_what_it_was_called_first():
    until = {"_target_": "specomp.training.phases.Convergence", "window": 20, "tolerance": 0.01}
    row = loaded("method", "soco")
    row["training"]["stages"]["coarse"]["until"] = until
    found = portable({"method": row})["method"]["training"]["stages"]["coarse"]["until"]
    assert found == until | {"_target_": "specomp.phases.Convergence"}
    described = method_identity(
        rows.built(row | {"rounding": loaded("quantizer", "none")}, "method")
    )
    until = described["training"]["stages"]["coarse"]["until"]
    assert until == {"class": "Convergence", "window": 20, "tolerance": 0.01}


def test_a_method_has_the_slots_that_it_had_first():
    slots = {x.removeprefix("method/").partition("=")[0] for x in FIRST if x.startswith("method/")}
    point = portable({"method": loaded("method", "svd")})["method"]
    assert set(point) == {"_target_", "name", *slots}
    assert point["_target_"] == "specomp.methods.base.Method"
    assert point["name"] == "svd", "a point says what was typed, a key what is done"
    assert set(method_identity(rows.method("svd"))) == {"class", "name", *slots}
    assert method_identity(rows.method("svd"))["name"] is None


@pytest.mark.parametrize("row", ["svd", "specomp"])
def test_a_refinement_alone_is_the_compensation_that_it_was(row):
    old = typed(f"method={row}", "method/compensation=block_refine")
    new = typed(f"method={row}", "method/refinement=block_refine")
    assert old[0] == new[0]
    assert method_identity(old[1]) == method_identity(new[1])
    identity = method_identity(new[1])
    assert identity["compensation"]["class"] == "BlockRefine"
    assert "refinement" not in identity


def test_a_refinement_after_a_compensation_is_something_new():
    alone, both = typed("method=adasvd"), typed("method=adasvd", "method/refinement=block_refine")
    assert alone[0] != both[0]
    identity = method_identity(both[1])
    assert identity["refinement"]["class"] == "BlockRefine"
    assert identity["compensation"] == method_identity(alone[1])["compensation"]


def test_a_setting_that_came_later_is_left_out_at_its_first_value(monkeypatch):
    """By class, as it is called today."""
    config = container("method=adasvd", "method.compensation.iterations=15", "ratio=cr40")
    other = container("method=adasvd", "method.compensation.iterations=3", "ratio=cr60")
    before = plain(config)
    monkeypatch.setattr(
        names, "LATER", {"AdaComp": {"iterations": 15}, "Numbers": {"compression": 0.4}}
    )
    found, kept = portable(config), portable(other)
    assert config == before, "a config is left as it is"
    assert "iterations" not in found["method"]["compensation"]
    assert "compression" not in found["ratio"]
    assert kept["method"]["compensation"]["iterations"] == 3
    assert kept["ratio"]["compression"] == 0.6
    told = {"class": "AdaComp", "iterations": 15, "update": "svd"}
    assert without_later({"parts": [told]}) == {"parts": [{"class": "AdaComp", "update": "svd"}]}
    assert without_later({"parts": [told | {"iterations": 3}]}) == {
        "parts": [told | {"iterations": 3}]
    }


def test_a_point_is_the_same_on_every_machine():
    base = ("method=svd", "calibration=wikitext2")
    changes = ["model.device=cpu", "calibration.batch_size=1", "calibration.layers_at_once=1"]
    changes += ["benchmark=none", "save=false", "trainer=ddp", "paths.data=elsewhere"]
    assert point_of(container(*base, *changes)) == point_of(container(*base))


@pytest.mark.parametrize(
    "override",
    [
        "method=adasvd",
        "ratio=cr60",
        "ratio=bits",
        "quantizer=rtn_int4",
        "seed=1",
        "calibration.upstream=compressed",
    ],
)
def test_a_point_says_which_weights_are_wanted(override):
    base = "method=svd_llm"
    assert typed(base, override)[0] != typed(base)[0]


def test_a_stored_config_has_the_point_of_its_command(tmp_path):
    """What a record keeps of a run, which is resolved and knows its overrides, asks for the
    same.
    """
    command = ("method=adasvd", "ratio=cr60", "method/refinement=block_refine")
    stored = plain(build(compose_config(tmp_path, *command)).config)
    assert point_of(stored) == point_of(container("debug=tiny", *command))
