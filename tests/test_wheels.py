"""The wheels in a clean environment: the core alone, then with one plugin, then with a third party's.

The environment is clean of attnmux and sees only what the core's metadata declare (with the extra `test`), linked from the
environment that runs these tests, so that an import which no metadata declare fails here.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from importlib_metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(
        [ROOT / "scripts" / "build", folder],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    return folder


def run(command, *, status=0, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT, **options
    )
    assert done.returncode == status, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def declared(name, extras):
    """Names of the distributions that a distribution's metadata ask for, all the way down."""
    found, todo = set(), [(name, frozenset(extras))]
    while todo:
        current, wanted = todo.pop()
        try:
            requirements = distribution(current).requires or ()
        except PackageNotFoundError:
            continue
        found.add(current)
        for requirement in map(Requirement, requirements):
            needed = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in {*wanted, ""}
            )
            if needed and requirement.name not in found and not requirement.name.startswith("attnmux"):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return found - {name}


def link(names, folder):
    folder.mkdir()
    for name in names:
        tops = {path.parts[0] for path in distribution(name).files or () if path.parts[0] != ".."}
        for top in tops:
            target = distribution(name).locate_file(top)
            if not (folder / top).exists():
                (folder / top).symlink_to(target)


class Environment:
    def __init__(self, folder, wheels):
        self.wheels = wheels
        venv.create(folder, with_pip=True)
        self.bin = folder / "bin"
        # some Pythons put an old setuptools there, which would hide the one that torch asks for
        run([self.bin / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"])
        link(declared("attnmux", ["test"]), folder / "declared")
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "declared.pth").write_text(str(folder / "declared"))

    def install(self, name):
        run([self.bin / "python", "-m", "pip", "install", "--quiet", "--no-index", "--find-links", self.wheels, name])

    def attnmux(self, *arguments, status=0):
        return run([self.bin / "attnmux", *arguments], status=status)

    def pytest(self, *arguments):
        return run([self.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments])

    def backends(self):
        return {row["name"]: row for row in json.loads(self.attnmux("list", "--json"))["backends"]}


@pytest.fixture(scope="module")
def core_alone(wheels, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("clean") / "venv", wheels)
    environment.install("attnmux")
    return environment


def test_core_alone_reports_plugins_as_not_installed(core_alone):
    rows = core_alone.backends()
    assert rows["TORCH_SDPA"]["status"] == "available"
    assert rows["VIDEO_SPARSE_ATTN"]["status"] == "not_installed"
    assert "pip install attnmux-vsa" in rows["VIDEO_SPARSE_ATTN"]["reason"]
    core_alone.attnmux("explain", "--backend", "VIDEO_SPARSE_ATTN", status=1)


def test_core_alone_passes_its_tests(core_alone):
    assert " passed" in core_alone.pytest("core/tests")


@pytest.fixture(scope="module")
def with_vsa(core_alone):
    core_alone.install("attnmux-vsa")
    return core_alone


def test_one_plugin_is_found_and_passes_its_tests(with_vsa):
    assert with_vsa.backends()["VIDEO_SPARSE_ATTN"]["status"] == "available"
    assert " passed" in with_vsa.pytest("plugins/vsa/tests")


@pytest.fixture(scope="module")
def with_blocksparse(with_vsa):
    with_vsa.install("attnmux-blocksparse")
    with_vsa.install("attnmux-sla")
    with_vsa.install("attnmux-sage")
    return with_vsa


@pytest.mark.parametrize("name", ["BLOCK_SPARSE_ATTN", "SAGE_ATTN", "SAGE_SLA_ATTN", "SLA_ATTN", "VIDEO_SPARSE_ATTN"])
def test_installed_plugins_pass_the_conformance_suite(with_blocksparse, name):
    assert with_blocksparse.backends()[name]["status"] == "available"
    with_blocksparse.attnmux("check", name, "--device", "cpu")


@pytest.fixture(scope="module")
def with_third_party(with_blocksparse):
    with_blocksparse.install("attnmux-window")
    return with_blocksparse


def test_third_party_backend_is_found_checked_and_passes_its_tests(with_third_party):
    row = with_third_party.backends()["WINDOW_ATTN"]
    assert (row["status"], row["distribution"]) == ("available", "attnmux-window")
    assert " passed" in with_third_party.pytest("examples/third_party_backend/tests")
    with_third_party.attnmux("check", "WINDOW_ATTN")


@pytest.mark.parametrize("method", ["nabla", "radial"])
def test_example_method_is_found_and_checked_from_its_wheel(with_third_party, method):
    with_third_party.install(f"attnmux-{method}")
    name = f"{method.upper()}_ATTN"
    assert with_third_party.backends()[name]["status"] == "available"
    # the conformance suite is among them
    assert " passed" in with_third_party.pytest(f"examples/{method}/tests")


@pytest.mark.parametrize("method", ["nabla", "radial"])
def test_example_method_is_small(method):
    package = ROOT / "examples" / method / "src" / f"attnmux_{method}"
    lines = {path.name: len(path.read_text().splitlines()) for path in package.glob("*.py")}
    assert lines["plugin.py"] + lines["backend.py"] < 150


def test_third_party_backend_is_small():
    sources = (ROOT / "examples" / "third_party_backend").rglob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in sources) < 150
