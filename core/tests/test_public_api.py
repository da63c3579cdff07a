"""What is exported, and what importing costs."""

import subprocess
import sys

import pytest

import attnmux


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_exported_name_exists_and_no_other_is_public():
    for name in attnmux.__all__:
        assert getattr(attnmux, name) is not None
    assert sorted(attnmux.__all__) == dir(attnmux)


def test_version_is_that_of_the_distribution():
    from importlib_metadata import version

    assert attnmux.__version__ == version("attnmux")


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = attnmux.nothing


@pytest.mark.parametrize(
    "module",
    ["attnmux", "attnmux.spec", "attnmux.errors", "attnmux.settings", "attnmux.registry", "attnmux.report",
     "attnmux.hookspecs", "attnmux.hooks", "attnmux.selector", "attnmux.backends.plugin", "attnmux.testing.plugin"],
)  # fmt: skip
def test_import_loads_neither_torch_nor_triton(module):
    found = run(f"import sys, {module}; print([m for m in ('torch', 'triton', 'rich', 'numpy') if m in sys.modules])")
    assert found == "[]"


def test_selection_data_and_listing_need_no_torch():
    code = (
        "import sys; from attnmux.registry import get_registry as r; "
        "[r().spec(n) for n in r().records()]; print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_importing_touches_no_cuda_and_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error'); import attnmux.layers, torch; print(torch.cuda.is_initialized())"
    assert run(code) == "False"


def test_import_takes_less_than_60_milliseconds():
    # the best of five, so that a busy machine does not decide
    code = "import time; t = time.perf_counter(); import attnmux; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.060
