"""Every deliberately broken backend is caught by the right tests, and right ones pass."""

import sys
from pathlib import Path

import pytest
import torch

from attnmux import BackendSpec
from attnmux.testing import (
    FAKE_CAPABILITIES,
    BackendConformance,
    FakeBackend,
    installed,
    make_backend,
    run_conformance,
)
from attnmux.testing.conformance.suite import SUITE_TESTS

sys.path.insert(0, str(Path(__file__).parent))
import broken_cases as fakes

NAME = "FAKE_ATTN"
# each of many runs would collect garbage several times, attach log handlers to every test and parse sources of failures
LEAN = ("-p", "no:unraisableexception", "-p", "no:logging", "--tb=native")


@pytest.fixture(autouse=True)
def one_thread():
    # tensors are tiny, and several threads wait for each other on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(broken, select="not 1000"):
    """Run the suite on a fake and return its report."""
    suite = {"backend": NAME, "typical_length": 24, "num_heads": 2, **broken.suite}
    conformance = type("FakeConformance", (BackendConformance,), suite)
    backend = make_backend(NAME, broken.impl, metadata_cls=broken.metadata)
    with installed(BackendSpec(NAME, target="fake:Fake", capabilities=broken.capabilities), backend):
        return run_conformance(NAME, conformance_cls=conformance, select=select, quiet=True, extra_args=LEAN)


def assert_caught(broken, report):
    assert broken.fails <= report.failed_tests, f"not caught by {sorted(broken.fails - report.failed_tests)}"
    if not broken.others_fail:
        also = [result for result in report.with_outcome("failed") if result.test not in broken.fails]
        assert not also, "\n".join(f"{result.name}: {result.reason}" for result in also)
    assert report.exit_code == 1
    assert all("If this fails" in result.hint for result in report.with_outcome("failed"))


@pytest.mark.parametrize("broken", fakes.BROKEN, ids=lambda broken: broken.impl.__name__)
def test_broken_backend_is_caught_by_the_right_tests(broken):
    assert_caught(broken, check(broken))


@pytest.mark.parametrize("broken", fakes.BROKEN_UNDER_COMPILE, ids=lambda broken: broken.impl.__name__)
def test_backend_that_does_not_compile_is_caught(broken):
    assert_caught(broken, check(broken, select="compile"))


@pytest.mark.parametrize("right", fakes.RIGHT, ids=lambda right: right.impl.__name__)
def test_right_backend_passes(right):
    report = check(right, select=None)
    assert report.exit_code == 0, report.output[-3000:]
    assert not report.with_outcome("failed")


def test_fake_backend_passes_everything_it_declares():
    with installed(BackendSpec("FAKE_ATTN", target="fake:Fake", capabilities=FAKE_CAPABILITIES), FakeBackend):
        report = run_conformance("FAKE_ATTN", "cpu", quiet=True)
    assert report.exit_code == 0, report.output[-3000:]
    passed = {result.test for result in report.with_outcome("passed")}
    # what it does not declare: metadata, parameters, operators; it is exact and refuses nothing that it could be asked
    assert {test for test in SUITE_TESTS if "undeclared" not in test} - passed == {
        "test_backend_module_touches_no_gpu",
        "test_custom_ops_pass_opcheck",
        "test_dense_limit_equals_dense",
        "test_inexact_backend_has_an_oracle",
        "test_metadata_of_another_length_are_refused",
        "test_missing_metadata_is_refused",
        "test_spec_module_imports_no_torch",
        "test_state_dict_round_trip",
    }


def test_every_conformance_test_catches_a_broken_backend():
    caught = set().union(*(broken.fails for broken in fakes.BROKEN + fakes.BROKEN_UNDER_COMPILE))
    # in test_conformance_class.py; a wrong name the registry refuses before the suite sees it
    elsewhere = {
        "test_backend_module_touches_no_gpu",
        "test_builder_is_constructed_bare",
        "test_custom_ops_pass_opcheck",
        "test_declared_request_is_served",
        "test_head_sizes_agree",
        "test_names_agree",
        "test_required_methods_are_static",
        "test_spec_module_imports_no_torch",
        "test_undeclared_device_is_refused",
        "test_head_sizes",
    }
    assert set(SUITE_TESTS) - caught == elsewhere
