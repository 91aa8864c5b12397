"""What names a slot in records and caches."""

import sys
from pathlib import Path

import pytest

from specomp.methods.svd_llm import GramWhitening
from specomp.slots import OURS, describe

PACKAGE = Path(sys.modules["specomp"].__path__[0])
OWN = """
from specomp.settings import configurable

@configurable
class GramWhitening:
    solve: str
    limit: float = {limit}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Imports somebody's file with a class of a name that specomp has too."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(name, limit):
        (tmp_path / f"{name}.py").write_text(OWN.format(limit=limit))
        return __import__(name).GramWhitening(solve="auto", limit=1.0)

    return load


def test_our_files_are_listed():
    for folder, names in OURS.items():
        present = {path.stem for path in (PACKAGE / folder).glob("*.py")}
        assert present >= set(names.split())


def test_of_ours_the_name_and_the_settings_say_all():
    assert describe(GramWhitening(solve="auto")) == {"class": "GramWhitening", "solve": "auto"}


def test_somebodys_class_of_the_same_name_is_another_and_so_is_an_edited_one(own):
    one, edited = describe(own("mine_one", 1.0)), describe(own("mine_two", 2.0))
    assert one["class"] == edited["class"] == "GramWhitening"
    assert one["module"] == "mine_one" and one["source"] != edited["source"]
