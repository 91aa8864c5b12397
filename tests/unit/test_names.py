"""Keys and points stay what they were: through every renaming, committed records are found by what is typed today."""

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
from specomp.experiment.checks import make
from specomp.experiment.config import build
from specomp.experiment.names import OLD_TARGETS, WEIGHTS, method_identity, portable, without_later
from specomp.experiment.record import COMMITTED, Record, RecordStore, point_of, record_key
from specomp.slots import Method, describe

RECORDS = RecordStore(COMMITTED).all()
# By choice: what a point was made of when the first records were made. Class names and settings, without values.
FIRST = json.loads((Path(__file__).parent / "first_names.json").read_text())
REQUIRED = {"calibration=token_ids": ["calibration.path=x"], "model=local": ["model.path=x"]}
# The default of method/training=polish that was not typed for it has changed since.
ANOTHER_DEFAULT = {"f61f6a91e7be"}
# Made before LoRA had this setting, which their keys do not name: found by their points alone.
NOT_IN_KEY = {"3f6f448b2978": {"num_samples": None}, "5d54ccc50b3a": {"num_samples": None}}


def key(record: Record) -> str:
    return record.key[:12]


def container(*overrides: str) -> dict[str, Any]:
    """What `python run.py overrides...` composes, resolved where there is something to resolve."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["paths.data=null", *overrides])
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return plain


@cache
def typed(*overrides: str) -> tuple[str, Method, Any, Any]:
    """Point, method, quantizer and budget of a command as it is composed today."""
    cfg = OmegaConf.create(container(*overrides))
    made = make(cfg, "method", rounding=cfg.quantizer)
    return point_of(OmegaConf.to_container(cfg)), made, describe(made.rounding), make(cfg, "ratio").identity()


def overrides(record: Record) -> tuple[str, ...]:
    return tuple(x for x in record.config["overrides"] if not x.startswith(("paths.", "hydra.")))


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from [node["_target_"]] if "_target_" in node else []
        for value in node.values():
            yield from targets(value)
    if isinstance(node, list):
        for value in node:
            yield from targets(value)


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_there_are_records():
    assert len(RECORDS) > 100
    assert {key(x) for x in RECORDS} >= {*ANOTHER_DEFAULT, *NOT_IN_KEY}


@pytest.mark.parametrize("record", RECORDS, ids=key)
def test_a_record_is_found_by_its_own_config(record):
    assert record.points
    assert point_of(record.config) in record.points
    assert record_key(record.identity) == record.key


@pytest.mark.parametrize("record", [x for x in RECORDS if key(x) not in ANOTHER_DEFAULT], ids=key)
def test_a_record_is_found_by_its_command_as_it_is_composed_today(record):
    """By its point, which tables look for, and by its key, which a run looks for."""
    point, method, quantizer, budget = typed(*overrides(record))
    assert point in record.points
    stored = record.identity["method"]
    if stored == "dense":
        assert method.is_dense
        return
    training = stored["training"] | NOT_IN_KEY.get(key(record), {})
    assert plain(method_identity(method)) == stored | {"training": training}
    assert plain(quantizer) == record.identity["quantizer"]
    assert budget == {name: record.identity[name] for name in budget}


def test_every_class_of_a_record_is_known_today():
    """Under its own name, or as the old name of another."""
    stored = {x for record in RECORDS for group in WEIGHTS for x in targets(record.config.get(group))}
    stored |= set(targets(list(FIRST.values())))
    assert len(stored) > 30
    for name in sorted(stored - set(OLD_TARGETS.values())):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), f"{name} has moved: say so in OLD_TARGETS"


def test_every_old_name_is_one_of_a_class_that_exists():
    assert len(set(OLD_TARGETS.values())) == len(OLD_TARGETS), "two classes would be one"
    for new, old in OLD_TARGETS.items():
        module, _, attribute = new.rpartition(".")
        assert hasattr(import_module(module), attribute), new
        assert attribute in (old.rpartition(".")[2], "Numbers"), "a key names the class without its place"


def shape(value: Any) -> Any:
    """Names without values."""
    if isinstance(value, Mapping):
        return {k: v if k in ("_target_", "class") else shape(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(x, (Mapping, list)) for x in value):
        return [shape(x) for x in value]
    return None


def as_key(node: Any) -> Any:
    """What a key says where a point says this."""
    if not isinstance(node, Mapping):
        return node
    found = {k: as_key(v) for k, v in node.items() if k not in ("_target_", "_convert_")}
    return found | ({"class": node["_target_"].rpartition(".")[2]} if "_target_" in node else {})


@pytest.mark.parametrize("choice", FIRST)
def test_a_choice_is_called_what_it_was_called_first(choice):
    """In points; and a slot also in keys."""
    group = choice.partition("=")[0].partition("/")
    more = ["method=svd"] if group[0] == "method" else []
    found = portable(container(*more, choice, *REQUIRED.get(choice, [])))[group[0]]
    found = found[group[2]] if group[2] else found
    assert shape(found) == FIRST[choice]
    if group[0] == "method":
        slot = method_identity(typed("method=svd", choice)[1])[group[2]]
        assert shape(slot) == as_key(FIRST[choice])
    if group[0] == "quantizer":
        assert shape(typed("method=svd", choice)[2]) == as_key(FIRST[choice])


def test_a_method_has_the_slots_that_it_had_first():
    slots = {x.partition("/")[2].partition("=")[0] for x in FIRST if x.startswith("method/")}
    point = portable(container("method=svd"))["method"]
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
    before = typed("method=adasvd")[0]
    monkeypatch.setattr(names, "LATER", {"AdaComp": {"iterations": 15}, "Numbers": {"compression": 0.4}})
    config = container("method=adasvd", "method.compensation.iterations=15", "ratio=cr40")
    found = portable(config)
    assert "iterations" not in found["method"]["compensation"]
    assert "iterations" in config["method"]["compensation"], "the config is left as it is"
    assert "compression" not in found["ratio"], "of a class by the name that it has today"
    assert point_of(config) != before
    other = container("method=adasvd", "method.compensation.iterations=3", "ratio=cr60")
    assert portable(other)["method"]["compensation"]["iterations"] == 3
    assert portable(other)["ratio"]["compression"] == 0.6
    described = {"compensation": {"class": "AdaComp", "iterations": 15, "update": "svd"}, "list": [{"class": "X"}]}
    assert without_later(described)["compensation"] == {"class": "AdaComp", "update": "svd"}
    described["compensation"]["iterations"] = 3
    assert without_later(described) == described


@pytest.mark.parametrize(
    "override",
    [
        "model.device=cpu",
        "calibration.batch_size=1",
        "calibration.layers_at_once=1",
        "benchmark=none",
        "save=false",
        "trainer=ddp",
        "paths.data=elsewhere",
    ],
)
def test_a_point_is_the_same_on_every_machine(override):
    base = ("method=svd", "calibration=wikitext2")
    assert point_of(container(*base, override)) == point_of(container(*base))


@pytest.mark.parametrize(
    "override",
    ["method=adasvd", "ratio=cr60", "ratio=bits", "quantizer=rtn_int4", "seed=1", "calibration.upstream=compressed"],
)
def test_a_point_says_which_weights_are_wanted(override):
    base = "method=svd_llm"
    assert point_of(container(base, override)) != point_of(container(base))


def test_a_stored_config_has_the_point_of_its_command(tmp_path):
    """What a record keeps of a run, which is resolved and knows its overrides, asks for the same."""
    typed_here = ("method=adasvd", "ratio=cr60", "method/refinement=block_refine")
    stored = plain(build(compose_config(tmp_path, *typed_here)).config)
    assert point_of(stored) == point_of(container("debug=tiny", *typed_here))
