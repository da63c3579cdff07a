"""Other libraries that are missing or too old are named."""

import re
from pathlib import Path

import pytest
import torch
from importlib_metadata import PackageNotFoundError

from attnmux import AttnmuxError
from attnmux.errors import MissingPackageError
from attnmux.integrations import versions
from attnmux.integrations.diffusers import apply, register_backend
from attnmux.integrations.transformers import register

METADATA = Path(__file__).resolve().parents[2] / "core" / "pyproject.toml"
CALLS = {
    "diffusers": [lambda: apply(torch.nn.Linear(2, 2)), lambda: register_backend("TORCH_SDPA")],
    "transformers": [lambda: register("TORCH_SDPA", "never_registered")],
}
EVERY_CALL = [(library, call) for library, calls in CALLS.items() for call in calls]


def test_lowest_versions_are_those_of_the_extra():
    line = re.search(r"^integrations = (.*)$", METADATA.read_text(), re.MULTILINE)[1]
    assert {name: re.search(rf'"{name}>=([\d.]+)"', line)[1] for name in versions.LOWEST} == versions.LOWEST


@pytest.mark.parametrize(("library", "call"), EVERY_CALL)
def test_older_library_is_refused_by_name(monkeypatch, library, call):
    monkeypatch.setattr(versions, "version", lambda name: "0.34.0" if name == library else "99")
    text = rf"needs {library} >= {versions.LOWEST[library]}, and 0.34.0 is installed. Run: pip install"
    with pytest.raises(MissingPackageError, match=text):
        call()


@pytest.mark.parametrize(("library", "call"), EVERY_CALL)
def test_missing_library_is_refused_by_name(monkeypatch, library, call):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(MissingPackageError, match=f"needs {library} .* and it is not installed"):
        call()


@pytest.mark.parametrize("found", ["0.35", "0.35.0", "0.43.0.dev0", "1.0"])
def test_lowest_and_newer_versions_are_taken(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(AttnmuxError, match="has no attention module"):
        apply(torch.nn.Linear(2, 2))
