"""What all distributions have in common."""

import re
from pathlib import Path

import pytest
from importlib_metadata import metadata, version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECTS = [ROOT / "core" / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]


def field(text, name):
    return re.search(rf'^{name} = "(.*)"$', text, re.MULTILINE)[1]


def test_every_distribution_has_the_workspaces_version():
    want = field((ROOT / "pyproject.toml").read_text(), "version")
    assert {path.parent.name: field(path.read_text(), "version") for path in PYPROJECTS} == {
        path.parent.name: want for path in PYPROJECTS
    }


@pytest.mark.parametrize("path", PYPROJECTS[1:], ids=lambda path: path.parent.name)
def test_plugins_ask_for_the_cores_minor_version(path):
    major, minor = version("attnmux").split(".")[:2]
    assert f'"attnmux>={major}.{minor},<{major}.{int(minor) + 1}"' in path.read_text()


@pytest.mark.parametrize("path", PYPROJECTS[1:], ids=lambda path: path.parent.name)
def test_workspace_installs_every_plugin(path):
    name = field(path.read_text(), "name")
    assert f'"{name} @ {{root:uri}}/plugins/{path.parent.name}"' in (ROOT / "pyproject.toml").read_text()


def test_hard_dependencies_of_the_core_are_the_few_that_were_agreed():
    hard = {
        re.match(r"[\w-]+", item)[0] for item in metadata("attnmux").get_all("Requires-Dist") if "extra ==" not in item
    }
    assert hard == {"torch", "pluggy", "importlib-metadata", "packaging", "rich", "typer"}


def test_licence_travels_with_every_package():
    licence = (ROOT / "LICENSE").read_text()
    for path in [*PYPROJECTS, *ROOT.glob("examples/*/pyproject.toml")]:
        assert (path.parent / "LICENSE").read_text() == licence
