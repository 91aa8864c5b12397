"""Every yaml composes, builds without a network, says what it is, and names nothing that its class
does not know.
"""

import importlib
import inspect
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from running import CONF, compose_config

from specomp import rows
from specomp.errors import UserError
from specomp.experiment.completed import completed
from specomp.experiment.config import build
from specomp.experiment.making import make
from specomp.forms.prices import Bits, Numbers
from specomp.settings import default_cache
from specomp.slots import Method, describe

FILES = sorted(CONF.rglob("*.yaml"))
# What a choice cannot do without on the command line.
REQUIRED = {
    ("model", "local"): ["model.path=some/folder"],
    ("model", "gguf"): ["model.path=some/file.gguf"],
    ("model", "hub"): ["model.repo=someone/a-model", "model.revision=main"],
    ("calibration", "token_ids"): ["calibration.path=ids.npy"],
    ("benchmark", "token_ids"): ["benchmark.path=ids.npy"],
}
GROUPS = (
    "model",
    "method",
    "ratio",
    "calibration",
    "benchmark",
    "quantizer",
    "trainer",
    "tracking",
)
SLOTS = sorted(path.name for path in (CONF / "method").iterdir() if path.is_dir())
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("[!_]*.yaml"))
]
SLOT_CHOICES = [
    (slot, path.stem) for slot in SLOTS for path in sorted((CONF / "method" / slot).glob("*.yaml"))
]


def name(path: Path) -> str:
    return path.relative_to(CONF).as_posix()


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return completed(compose("config", overrides=["paths.data=null", *overrides]))


def made(cfg: DictConfig, group: str) -> Any:
    """One group as a run makes it: a method with the quantizer that was chosen."""
    return make(cfg, group, **({"rounding": cfg.quantizer} if group == "method" else {}))


def targets(node: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(place, mapping) of everything with a `_target_` inside a composed group."""
    found = []
    if isinstance(node, dict):
        if "_target_" in node:
            found.append((path, node))
        for key, value in node.items():
            found += targets(value, f"{path}.{key}")
    return found


def resolve(target: str) -> Any:
    module, _, attribute = target.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def parameters(cls: Any) -> tuple[set[str], set[str]]:
    """(all, required) constructor parameters."""
    if is_dataclass(cls):
        known = [field for field in fields(cls) if field.init]
        return {x.name for x in known}, {
            x.name for x in known if x.default is MISSING and x.default_factory is MISSING
        }
    signature = inspect.signature(cls).parameters.values()
    return {x.name for x in signature}, {
        x.name for x in signature if x.default is inspect.Parameter.empty
    }


def check_parameters(place: str, node: dict[str, Any]) -> None:
    known, required = parameters(resolve(node["_target_"]))
    given = {key for key in node if not key.startswith("_")}
    assert given <= known, f"{place}: {node['_target_']} does not know {sorted(given - known)}"
    if not node.get("_partial_"):
        assert required <= given, (
            f"{place}: {node['_target_']} also needs {sorted(required - given)}"
        )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_first_line_says_what_it_is(path):
    lines = path.read_text().splitlines()
    if lines[0].startswith("# @package"):
        lines = lines[1:]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 10


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_parameter_says_what_it_means(path):
    """In the groups that explain their numbers line by line, there or in the file that it starts
    from; values inside `config`, `hub` and the like have a comment of their own.
    """
    lines = path.read_text().splitlines()
    content = yaml.safe_load(path.read_text()) or {}
    for base in content.get("defaults", []):
        if isinstance(base, str) and base != "_self_" and path.parent.name == "model":
            lines += path.with_name(f"{base}.yaml").read_text().splitlines()
    if path.parent.name in SLOTS or path.parent.name in {"model", "tracking", "ratio"}:
        for key in content:
            if not key.startswith("_") and key != "defaults":
                found = [x for x in lines if x.startswith(f"{key}:")]
                assert any(" # " in x for x in found), f"{name(path)}: {key} has no comment"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name != "debug" and p.stem != "none"], ids=name
)
def test_no_file_is_empty(path):
    assert yaml.safe_load(path.read_text())


def test_nothing_is_a_named_class_everywhere():
    """An empty none.yaml composes to {}, which is not None."""
    none = [path for path in FILES if path.stem == "none"]
    assert len(none) >= 6
    for path in none:
        if path.parent.name not in {
            "debug",
            "budget",
        }:  # packages of settings, not choices of a class
            assert "_target_" in yaml.safe_load(path.read_text()), name(path)


@pytest.mark.parametrize("path", [p for p in FILES if "\n_target_:" in p.read_text()], ids=name)
def test_targets_can_be_imported(path):
    target = yaml.safe_load(path.read_text())["_target_"]
    if target.startswith("hydra_plugins."):
        pytest.importorskip(target.rpartition(".")[0], reason="a launcher's extra is not installed")
    assert callable(resolve(target))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds_without_a_network(group, choice, no_weights_read):
    cfg = composed(f"{group}={choice}", *REQUIRED.get((group, choice), []))
    for place, node in targets(OmegaConf.to_container(cfg[group], resolve=False), group):
        if node["_target_"] != "specomp.evaluation.suite.Suite":
            more = {"rounding": {}} if place == "method" else {}
            check_parameters(place, node | more)
    found = made(cfg, group)
    assert found is not None
    assert type(found).__name__ != "DictConfig"


def alone_of(slot, choice):
    """A slot's choice by itself, with the choices that it is a variant of."""
    own = OmegaConf.load(CONF / "method" / slot / f"{choice}.yaml")
    order = [x for x in own.pop("defaults", ["_self_"]) if isinstance(x, str)]
    parts = [own if name == "_self_" else alone_of(slot, name) for name in order]
    return OmegaConf.to_container(OmegaConf.merge(*parts))


@pytest.mark.parametrize(("slot", "choice"), SLOT_CHOICES)
def test_every_slot_choice_fits_into_every_method(slot, choice):
    """Swapping one slot leaves nothing of the former choice behind (the reason for the slot
    rule).
    """
    for method in ("svd", "adasvd"):
        cfg = composed(f"method={method}", f"method/{slot}={choice}")
        node = OmegaConf.to_container(cfg.method[slot])
        check_parameters(f"method.{slot}", node)
        assert node == alone_of(slot, choice)
        assert made(cfg, "method").name == method


@pytest.mark.parametrize("method", ["svd", "adasvd"])
def test_the_old_name_of_a_refinement_sets_both_slots(method):
    """Also beside a refinement of one's own: what is typed about it wins."""
    cfg = composed(
        f"method={method}", "method/compensation=block_refine", "method.refinement.steps=3"
    )
    assert OmegaConf.to_container(cfg.method.compensation) == alone_of("compensation", "none")
    assert OmegaConf.to_container(cfg.method.refinement) == alone_of(
        "refinement", "block_refine"
    ) | {"steps": 3}
    new = composed(
        f"method={method}", "method/refinement=block_refine", "method.refinement.steps=3"
    )
    assert cfg.method.refinement == new.method.refinement
    assert OmegaConf.to_container(new.method.compensation) == OmegaConf.to_container(
        composed(f"method={method}").method.compensation
    ), "the new name leaves the compensation as it is"


METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
ALIASES = {("compensation", "block_refine")}


def same(found: Method, *overrides: str) -> None:
    assert describe(found) == describe(made(composed(*overrides), "method"))


@pytest.mark.parametrize("method", METHODS)
def test_the_library_reads_every_row_as_hydra_does(method):
    same(rows.method(method), f"method={method}")
    assert sorted(rows.method_names()) == METHODS


@pytest.mark.parametrize(("slot", "choice"), [x for x in SLOT_CHOICES if x not in ALIASES])
def test_the_library_reads_every_slot_choice_as_hydra_does(slot, choice):
    for method in ("svd", "adasvd"):
        same(rows.method(method, **{slot: choice}), f"method={method}", f"method/{slot}={choice}")


@pytest.mark.parametrize(("slot", "choice"), sorted(ALIASES))
def test_the_library_names_what_an_old_name_stands_for(slot, choice):
    with pytest.raises(UserError, match="is an old name of method/refinement=block_refine"):
        rows.method("svd", **{slot: choice})


@pytest.mark.parametrize(
    "choice", sorted(path.stem for path in (CONF / "quantizer").glob("*.yaml"))
)
def test_the_library_reads_every_quantizer_as_hydra_does(choice):
    same(rows.method("svd", quantizer=choice), "method=svd", f"quantizer={choice}")


def test_the_library_changes_settings_as_the_command_line_does():
    changed = rows.method("adasvd", allocation="sensitivity", compensation={"iterations": 3})
    typed = ("method/allocation=sensitivity", "method.compensation.iterations=3")
    same(changed, "method=adasvd", *typed)
    changed = rows.method(
        "soco", training={"stages": {"coarse": {"steps": 7}}, "phases": ["coarse"]}
    )
    typed = ("method.training.stages.coarse.steps=7", "method.training.phases=[coarse]")
    same(changed, "method=soco", *typed)
    rounding = made(composed("quantizer=rtn_int4"), "quantizer")
    same(rows.method("svd", quantizer=rounding), "method=svd", "quantizer=rtn_int4")


@pytest.mark.parametrize(
    ("row", "slots", "message"),
    [
        ("adasdv", {}, "method has no choice 'adasdv'; did you mean adasvd?"),
        (
            "svd",
            {"whitening": "gramm"},
            "method/whitening has no choice 'gramm'; did you mean gram?",
        ),
        ("svd", {"packaging": "factors"}, "A method has no slot 'packaging'"),
        ("adasvd", {"compensation": {"iteration": 3}}, "compensation.iteration"),
        ("adasvd", {"compensation": {"iterations": 0}}, "compensation.iterations=0"),
        ("svd", {"whitening": 3}, "method.whitening is a int, which is no Whitening: it lacks"),
    ],
)
def test_what_the_library_cannot_read_is_one_line(row, slots, message):
    with pytest.raises(UserError) as caught:
        rows.method(row, **slots)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")))
def test_the_library_reads_every_loop_as_hydra_does(choice):
    assert rows.load("trainer", choice) == composed(f"trainer={choice}").trainer


def test_the_library_calibrates_as_a_run_does():
    base, whole = rows.load("calibration", "_base"), composed("calibration=wikitext2").calibration
    assert {key: whole[key] for key in base} == base


def test_every_slot_of_a_method_has_a_group():
    assert sorted(x.name for x in fields(Method) if x.name not in ("name", "rounding")) == SLOTS


@pytest.mark.parametrize("path", sorted((CONF / "method").glob("*.yaml")), ids=name)
def test_a_method_selects_slots_and_sets_nothing_inside_them(path):
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"defaults", "_target_", "name"}
    assert content["name"] == path.stem
    chosen = {
        key: value
        for entry in content["defaults"]
        if isinstance(entry, dict)
        for key, value in entry.items()
    }
    assert sorted(chosen) == SLOTS, "every slot is chosen, by name"
    assert content["defaults"][-1] == "_self_"


@pytest.mark.parametrize("path", sorted((CONF / "ratio").glob("cr*.yaml")), ids=name)
def test_a_ratio_is_what_its_name_says(path):
    ratio = make(composed(f"ratio={path.stem}"), "ratio")
    assert isinstance(ratio, Numbers)
    assert ratio.compression == pytest.approx(int(path.stem[2:]) / 100)


def test_a_ratio_may_be_in_bits():
    assert make(composed("ratio=bits", "ratio.bits=3.4"), "ratio") == Bits(bits=3.4)


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=name)
def test_a_model_is_called_by_its_file(path):
    called = yaml.safe_load(path.read_text())["name"]
    assert called == (None if path.stem in ("hub", "local") else path.stem)  # by where they are


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=name)
def test_hub_models_are_pinned_and_run_no_foreign_code(path):
    content = yaml.safe_load(path.read_text())
    if content.get("repo", "???") != "???":
        assert len(content["revision"]) == 40
    assert content.get("trust_remote_code", False) is False


@pytest.mark.parametrize("group", [*(g for g in GROUPS if g != "trainer"), "options"])
def test_unknown_keys_fail(group):
    with pytest.raises(ConfigCompositionException, match="nonsense"):
        composed(f"{group}.nonsense=1")  # a typo on the command line
    with pytest.raises(UserError, match="nonsense") as caught:
        made(composed(f"+{group}.nonsense=1"), group)  # insisted on
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slot", SLOTS)
def test_unknown_keys_inside_a_slot_fail(slot):
    with pytest.raises(UserError, match=rf"method\.{slot}.*nonsense"):
        made(composed(f"+method.{slot}.nonsense=1"), "method")


def test_an_unknown_key_of_the_trainer_fails_before_a_model_is_loaded(tmp_path, no_weights_read):
    with pytest.raises(UserError, match="nonsense"):
        build(compose_config(tmp_path, "+trainer.nonsense=1"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("ratio.compression=1.0", "ratio.compression"),
        ("ratio.compression=-0.1", "ratio.compression"),
        ("calibration.layers_at_once=0", "calibration.layers_at_once"),
        ("calibration.num_samples=0", "calibration.num_samples"),
        ("calibration.upstream=sideways", "calibration.upstream"),
        ("method.compensation.iterations=0", "method.compensation.iterations"),
        ("method.allocation.min_retention_gap=lots", "method.allocation.min_retention_gap"),
        ("options.threads=0", "options.threads"),
        ("options.export=pickle", "options.export"),
        ("seed=-1", "seed=-1"),
        ("model.dtype=int8", "model.dtype"),
        ("benchmark.window=0", "benchmark"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key_before_anything_is_loaded(
    tmp_path, no_weights_read, override, key
):
    with pytest.raises(UserError) as caught:
        build(compose_config(tmp_path, "method=adasvd", override))
    message = str(caught.value)
    assert key in message
    assert "\n" not in message
    assert override.split("=")[1] in message


@pytest.mark.parametrize("calibration", ["tiny", "token_ids"])
def test_a_wrong_slot_object_is_refused(tmp_path, no_weights_read, calibration):
    """A training where a compensation belongs is noticed before a model is loaded."""
    wrong = "method.compensation._target_=specomp.methods.svd.NoTraining"
    needed = REQUIRED.get(("calibration", calibration), [])
    with pytest.raises(
        UserError, match="method.compensation is a NoTraining, which is no Compensation: it lacks"
    ) as caught:
        build(compose_config(tmp_path, "method=svd", wrong, f"calibration={calibration}", *needed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((CONF / "hydra" / "launcher").glob("*.yaml")), ids=name)
def test_a_launcher_composes_without_its_plugin(path, monkeypatch):
    """Under a name that no plugin uses: Hydra would merge the two, and warn in every job."""
    assert path.stem not in {
        "basic",
        "joblib",
        "submitit_local",
        "submitit_slurm",
        "ray",
        "ray_aws",
    }
    monkeypatch.delenv("SPECOMP_OUTPUTS", raising=False)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose(
            "config", overrides=[f"hydra/launcher={path.stem}"], return_hydra_config=True
        ).hydra.launcher
    assert launcher._target_.startswith("hydra_plugins.")


def test_a_ray_cluster_is_joined_with_absolute_paths(monkeypatch):
    """The plugin adds object_store_memory where it is not named, and Ray then refuses; a worker's
    folder is not this one.
    """
    monkeypatch.delenv("SPECOMP_OUTPUTS", raising=False)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["hydra/launcher=ray_cluster"], return_hydra_config=True)
        cfg.hydra.runtime.cwd = "/somewhere"
        init = OmegaConf.to_container(cfg.hydra.launcher.ray.init, resolve=True)
    assert init["object_store_memory"] is None
    assert init["runtime_env"]["env_vars"]["SPECOMP_OUTPUTS"] == "/somewhere/outputs"


def test_config_yaml_explains_every_option():
    text = (CONF / "config.yaml").read_text()
    known, _ = parameters(resolve("specomp.experiment.options.Options"))
    content = yaml.safe_load(text)["options"]
    assert set(content) - {"_target_"} == known
    for key in known - {"seed"}:
        assert any(
            line.strip().startswith(f"{key}:") and " # " in line for line in text.splitlines()
        ), key


def test_the_defaults_are_the_readme_ones():
    """The bare command is offline: the embedded model, the text Python brings along, no
    tracking.
    """
    cfg = composed()
    assert cfg.model._target_ == "specomp.models.gguf.PackagedGGUF"
    assert (
        cfg.calibration.corpus._target_
        == cfg.benchmark.parts.pydocs.corpus._target_
        == "specomp.data.pydocs.PyDocs"
    )
    assert cfg.tracking._target_ == "specomp.experiment.tracking.NoTracking"


def test_budgets_replace_the_main_configs_values():
    """A sweep at the size of a laptop keeps no model folders; what is typed wins all the same."""
    assert composed("budget=cpu").save is False
    assert composed("budget=cpu_bf16").options.save is False
    assert composed("budget=cpu", "save=true").save is True
    assert composed().save is True


def test_a_model_of_the_hub_needs_its_name_and_commit_only():
    cfg = composed("model=hub", "model.repo=someone/A-Model", "model.revision=abc")
    assert made(cfg, "model").name == "A-Model"


def test_a_text_of_ones_own_takes_the_place_of_calibration_and_benchmark(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"Line {i} of a text of my own.\n" for i in range(1000)))
    cfg = composed("debug=tiny", "corpus=text", f"corpus.path={text}")
    calibration, (part,) = made(cfg, "calibration"), made(cfg, "benchmark").benchmarks
    assert calibration.corpus.split == "train"
    assert part.corpus.split == "test"
    assert part.id.startswith("text@1:32x2:"), "called by its text"
    read = [calibration.corpus.text(), part.corpus.text()]
    assert read[0] + read[1] != text.read_text(), "a tenth is for validation"
    assert text.read_text().startswith(read[0])
    assert text.read_text().endswith(read[1])
    assert all(x.startswith("Line") and x.endswith("own.\n") for x in read)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["corpus=text"], "corpus=text needs corpus.path=VALUE"),
        (["corpus=c4", "calibration=mix"], "does not read one text"),
    ],
)
def test_a_text_that_has_no_place_is_refused(typed, says):
    with pytest.raises(UserError, match=says):
        composed("debug=tiny", *typed)


def test_the_library_keeps_its_cache_where_runs_do(monkeypatch):
    """conf/config.yaml says it for runs, settings.py for `specomp.save`."""
    for place in (None, "/somewhere/else"):
        monkeypatch.delenv("SPECOMP_CACHE", raising=False)
        if place is not None:
            monkeypatch.setenv("SPECOMP_CACHE", place)
        assert Path(str(composed().paths.cache)).expanduser() == default_cache()
