"""The pytest plugin, in runs of pytest of its own."""

import subprocess
import sys
import textwrap

import pytest
import torch

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def run_pytest(tmp_path, source, *arguments):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rsxf", "--strict-markers", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)


MARKED = """
    import pytest

    @pytest.mark.gpu
    def test_gpu(): pass

    @pytest.mark.multigpu(n=2)
    def test_two(): pass

    @pytest.mark.sm(min=90)
    def test_hopper(): pass

    @pytest.mark.interpret
    def test_interpreter(): pass

    @pytest.mark.slow
    @pytest.mark.distributed
    def test_plain(): pass
"""


@without_gpu
def test_missing_gpu_is_a_skip_with_the_reason(tmp_path):
    done = run_pytest(tmp_path, MARKED)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 4 skipped" in done.stdout
    assert "it needs a CUDA GPU: torch" in done.stdout
    assert "set TRITON_INTERPRET=1" in done.stdout


@without_gpu
def test_require_gpu_makes_it_a_failure(tmp_path):
    done = run_pytest(tmp_path, MARKED, "--require-gpu")
    assert done.returncode == 1
    assert "1 passed, 1 skipped, 3 errors" in done.stdout
    assert "--require-gpu is given, and it needs a CUDA GPU" in done.stdout


def test_plugin_loads_no_torch():
    code = "import sys, attnmux.testing.plugin, attnmux.testing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_plugin_is_loaded_by_pytest_itself(pytestconfig):
    assert pytestconfig.pluginmanager.hasplugin("attnmux")


def test_suite_runs_in_a_file_of_the_author(tmp_path):
    source = """
        from attnmux.testing import BackendConformance

        class TestConformance(BackendConformance):
            backend = "TORCH_SDPA"
            deviations = {"test_names_agree": "no reason at all"}
    """
    done = run_pytest(tmp_path, source, "-k", "test_causal or names_agree", "--attnmux-device", "cpu")
    assert "[XPASS(strict)] no reason at all" in done.stdout
    assert "If this fails: a copied backend kept the name of the original." in done.stdout
    assert "1 failed, 3 passed" in done.stdout


def test_every_exported_name_of_the_package_exists():
    from attnmux import testing

    assert all(getattr(testing, name) is not None for name in testing.__all__)
