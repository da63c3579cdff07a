"""The class that a plugin's author subclasses: its guard, its deviations, and the checks that need real modules."""

import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from attnmux import AttentionMetadata, BackendSpec, DenseMetadataBuilder, Reason, UnsupportedRequestError
from attnmux.registry import get_registry
from attnmux.testing import (
    FAKE_CAPABILITIES,
    BackendConformance,
    FakeBackend,
    FakeDistribution,
    FakeEntryPoint,
    FakeImpl,
    conformance_class,
    installed,
    make_backend,
    run_conformance,
)
from attnmux.testing.conformance.suite import SUITE_TESTS

NAME = "FAKE_ATTN"
CPU = replace(FAKE_CAPABILITIES, devices=frozenset({"cpu"}))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(capabilities=CPU, name=NAME):
    return BackendSpec(name, target="fake:Fake", capabilities=capabilities)


def check(select, *, backend=FakeBackend, capabilities=CPU, **suite):
    conformance = type("FakeConformance", (BackendConformance,), {"backend": NAME, "typical_length": 24, **suite})
    with installed(spec(capabilities), backend):
        return run_conformance(NAME, conformance_cls=conformance, select=select, quiet=True)


class TestGuard:
    def test_overriding_a_test_is_refused(self):
        with pytest.raises(TypeError, match=r"Mine overrides the conformance test test_causal.*deviations"):

            class Mine(BackendConformance):
                backend = NAME

                def test_causal(self):
                    pass

    def test_deleting_a_test_is_refused(self):
        with pytest.raises(TypeError, match="overrides the conformance test test_lse"):

            class Mine(BackendConformance):
                test_lse = None

    def test_a_mixin_cannot_override_either(self):
        class Mixin:
            def test_causal(self):
                pass

        with pytest.raises(TypeError, match="overrides the conformance test test_causal"):

            class Mine(Mixin, BackendConformance):
                pass

    def test_unknown_test_in_deviations_is_refused(self):
        with pytest.raises(TypeError, match=r"deviations names 'test_casual', which is no conformance test"):

            class Mine(BackendConformance):
                deviations = {"test_casual": "a slip"}

    def test_deviation_without_reason_is_refused(self):
        with pytest.raises(TypeError, match="must give the reason"):

            class Mine(BackendConformance):
                deviations = {"test_causal": " "}

    def test_own_tests_may_be_added(self):
        class Mine(BackendConformance):
            backend = NAME

            def test_something_of_my_own(self):
                pass

        assert Mine.__test__

    def test_class_without_backend_is_not_collected(self):
        assert not BackendConformance.__test__

        class Shared(BackendConformance):
            pass

        assert not Shared.__test__

    def test_every_test_says_what_a_failure_means(self):
        lacking = [name for name, test in SUITE_TESTS.items() if "If this fails" not in (test.__doc__ or "")]
        assert lacking == []


class TestDeviations:
    class DropsCausal(FakeImpl):
        def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, *arguments, **options):
            super().__init__(num_heads, head_size, softmax_scale, False, *arguments, **options)

    backend = make_backend(NAME, DropsCausal)

    def test_declared_deviation_is_expected_and_its_reason_printed(self):
        # a single token sees itself alone, causal or not
        report = check(
            "test_causal and not cross",
            backend=self.backend,
            deviations={"test_causal[65]": "the layer above masks"},
        )
        assert report.exit_code == 0
        assert {result.reason for result in report.with_outcome("deviation")} == {"the layer above masks"}
        assert "declared deviations" in report.output
        assert "the layer above masks" in report.output

    def test_deviation_that_does_not_fail_is_an_error(self):
        report = check("test_causal and not cross", deviations={"test_causal": "not true"})
        assert report.failed_tests == {"test_causal"}
        assert "XPASS(strict)" in report.output


class TestDeclarations:
    def test_wrong_head_sizes_are_caught(self):
        capabilities = replace(CPU, head_sizes=frozenset({32, 64}))
        backend = make_backend(NAME, head_sizes=(64, 96))
        assert check("head_sizes_agree", backend=backend, capabilities=capabilities).failed_tests == {
            "test_head_sizes_agree"
        }

    def test_builder_with_arguments_is_caught(self):
        class Builder(DenseMetadataBuilder):
            def __init__(self, grid):
                self.grid = grid

        backend = make_backend(NAME, builder_cls=Builder)
        assert check("builder", backend=backend).failed_tests == {"test_builder_is_constructed_bare"}

    def test_backend_that_refuses_what_it_declares_is_caught(self):
        backend = make_backend(NAME)
        backend.check_request = staticmethod(lambda request: [Reason("head_size", "head_size is odd")])
        assert check("declared_request", backend=backend).failed_tests == {"test_declared_request_is_served"}

    def test_abstract_class_is_caught(self):
        class Abstract(DenseMetadataBuilder):
            build = None

        Abstract.__abstractmethods__ = frozenset({"build"})
        backend = make_backend(NAME, builder_cls=Abstract)
        report = check("required_methods", backend=backend)
        assert report.failed_tests == {"test_required_methods_are_static"}
        assert "lacks build" in report.output

    def test_refusal_of_a_tested_head_size_is_caught(self):
        class Only32(FakeImpl):
            def forward(self, query, key, value, attn_metadata=None, *, attn_mask=None, return_lse=False):
                if self.head_size > 64:
                    raise UnsupportedRequestError("head_size is too large")
                return super().forward(query, key, value, attn_metadata, attn_mask=attn_mask, return_lse=return_lse)

        assert check("test_head_sizes", backend=make_backend(NAME, Only32)).failed_tests == {"test_head_sizes"}

    def test_cpu_tensors_accepted_by_a_cuda_backend_are_caught(self):
        capabilities = replace(CPU, devices=frozenset({"cuda"}))
        assert check("undeclared_device", capabilities=capabilities).failed_tests == {
            "test_undeclared_device_is_refused"
        }

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_cuda_backend_is_skipped_with_the_reason_and_still_held_to_its_declarations(self):
        report = check("test_output_equals or names_agree", capabilities=replace(CPU, devices=frozenset({"cuda"})))
        assert [result.test for result in report.with_outcome("passed")] == ["test_names_agree"]
        assert all("CUDA GPU" in result.reason for result in report.with_outcome("skipped"))

    def test_length_that_is_not_supported_must_be_refused(self):
        def multiples_of_eight(self, seq_lens):
            return [length for length in seq_lens if length % 8 == 0]

        report = check("test_odd_lengths and float32", supported_lengths=multiples_of_eight)
        assert report.failed_tests == set()
        report = check("test_odd_lengths and float64", supported_lengths=multiples_of_eight)
        failed = {result.name.partition("[")[2] for result in report.with_outcome("failed")}
        assert failed == {f"cpu-float64-{length}]" for length in (1, 63, 65, 127)}


class TestRounding:
    class MovesOneValue(FakeImpl):
        def forward(self, query, key, value, attn_metadata=None, *, attn_mask=None, return_lse=False):
            out = super().forward(query, key, value, attn_metadata, attn_mask=attn_mask)
            out[0, 0, 0, 0] += 0.01
            return out

    @pytest.mark.parametrize(
        ("step", "failed"), [(0.0, {"test_odd_lengths"}), (0.011, set()), (0.009, {"test_odd_lengths"})]
    )
    def test_a_value_may_be_off_by_the_step_that_the_backend_declares(self, step, failed):
        report = check(
            "test_odd_lengths and 65",
            backend=make_backend(NAME, self.MovesOneValue),
            rounding_step=lambda self, case: step,
        )
        assert report.failed_tests == failed


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Return a function that runs a check on a backend whose modules are files."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(plugin="", backend=""):
        stem = tmp_path.name.replace("-", "_")
        (tmp_path / f"{stem}_plugin.py").write_text(
            textwrap.dedent(plugin) + f"from attnmux import BackendSpec\nfrom attnmux.spec import Capabilities\n"
            f"SPEC = BackendSpec({NAME!r}, target='{stem}_backend:FakeBackend', capabilities=Capabilities(\n"
            "    dtypes={'float32'}, head_sizes={32}, devices={'cpu'}, exactness='exact'))\n"
        )
        (tmp_path / f"{stem}_backend.py").write_text(
            textwrap.dedent(backend) + "from attnmux.testing.fakes import FakeBackend\n"
        )
        module = __import__(f"{stem}_plugin")
        point = FakeEntryPoint(NAME, module.SPEC, f"{stem}_plugin:SPEC", dist=FakeDistribution())
        with get_registry().temporary_entry_points([point]):
            return run_conformance(NAME, select="spec_module or touches_no_gpu", quiet=True)

    yield run
    for name in [name for name in sys.modules if name.startswith(tmp_path.name.replace("-", "_"))]:
        del sys.modules[name]


class TestImports:
    def test_lean_modules_pass(self, on_disk):
        report = on_disk()
        assert report.exit_code == 0, report.output
        assert len(report.with_outcome("passed")) == 2

    def test_spec_module_that_imports_torch_is_caught(self, on_disk):
        report = on_disk(plugin="import torch\n")
        assert report.failed_tests == {"test_spec_module_imports_no_torch"}

    def test_backend_module_that_touches_the_gpu_is_caught(self, on_disk):
        # stands for a tensor on the GPU, on machines that have none
        report = on_disk(backend="import torch\ntorch.cuda._initialized = True\n")
        assert report.failed_tests == {"test_backend_module_touches_no_gpu"}


class TestOperators:
    def test_wrong_fake_implementation_is_caught(self):
        with torch.library._scoped_library("attnmux_fake_ops", "FRAGMENT") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
            torch.library.register_fake("attnmux_fake_ops::twice", lambda x: x.new_empty(3), lib=library)

            def custom_ops(self, device):
                return [(torch.ops.attnmux_fake_ops.twice.default, (torch.ones(4, device=device),))]

            assert check("opcheck", custom_ops=custom_ops).failed_tests == {"test_custom_ops_pass_opcheck"}

    def test_right_operator_passes(self):
        with torch.library._scoped_library("attnmux_fake_ops", "FRAGMENT") as library:
            library.define("thrice(Tensor x) -> Tensor")
            library.impl("thrice", lambda x: x * 3, "CompositeExplicitAutograd")
            torch.library.register_fake("attnmux_fake_ops::thrice", torch.empty_like, lib=library)

            def custom_ops(self, device):
                return [(torch.ops.attnmux_fake_ops.thrice.default, (torch.ones(4, device=device),))]

            report = check("opcheck", custom_ops=custom_ops)
            assert report.exit_code == 0, report.output


class TestRunConformance:
    def test_undeclared_device_is_refused(self):
        with (
            installed(spec(), FakeBackend),
            pytest.raises(UnsupportedRequestError, match=r"cannot be checked on 'cuda': it declares cpu"),
        ):
            run_conformance(NAME, "cuda")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_missing_gpu_fails_where_it_was_asked_for(self):
        with installed(spec(FAKE_CAPABILITIES), FakeBackend):
            report = run_conformance(NAME, "cuda", select="test_causal", quiet=True)
        assert report.exit_code == 1
        assert "--require-gpu is given" in report.output

    def test_report_is_plain_data(self):
        plain = check("test_causal and float64").to_dict()
        assert plain["ok"]
        assert plain["counts"]["passed"] == 3
        assert {"name", "outcome", "reason", "hint"} == set(plain["results"][0])

    def test_backend_may_bring_its_own_class(self):
        class Mine(BackendConformance):
            backend = NAME

        backend = make_backend(NAME)
        backend.get_conformance_cls = staticmethod(lambda: Mine)
        with installed(spec(), backend):
            assert conformance_class("fake_attn") is Mine

    def test_class_for_another_backend_is_refused(self):
        class Other(BackendConformance):
            backend = "OTHER_ATTN"

        backend = make_backend(NAME)
        backend.get_conformance_cls = staticmethod(lambda: Other)
        with installed(spec(), backend), pytest.raises(TypeError, match=r"get_conformance_cls\(\) gives"):
            conformance_class(NAME)

    def test_backend_that_needs_metadata_is_told_so(self):
        report = check(
            "test_output_equals_oracle and float64",
            backend=make_backend(NAME, metadata_cls=AttentionMetadata),
            capabilities=replace(CPU, needs_metadata=True),
        )
        assert "override make_metadata()" in report.output
