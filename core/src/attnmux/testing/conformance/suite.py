"""`BackendConformance`: all the checks as one class, and the guard that keeps them whole."""

from __future__ import annotations

from inspect import getattr_static
from types import FunctionType
from typing import Any, ClassVar

from attnmux.testing.conformance.behaviour import BehaviourChecks
from attnmux.testing.conformance.declaration import DeclarationChecks
from attnmux.testing.conformance.gradients import GradientChecks
from attnmux.testing.conformance.harness import ConformanceHarness
from attnmux.testing.conformance.integration import IntegrationChecks
from attnmux.testing.conformance.masks import MaskChecks
from attnmux.testing.conformance.parts import PartChecks
from attnmux.testing.conformance.refusals import RefusalChecks
from attnmux.testing.conformance.values import ValueChecks

__all__ = ["BackendConformance"]


class BackendConformance(
    DeclarationChecks,
    RefusalChecks,
    ValueChecks,
    MaskChecks,
    GradientChecks,
    PartChecks,
    BehaviourChecks,
    IntegrationChecks,
    ConformanceHarness,
):
    """Holds one backend to the contract; a plugin subclasses it.

        class TestConformance(BackendConformance):
            backend = "MY_SPARSE_ATTN"
            impl_args = {"block_size": 16}
            deviations = {"test_head_permutation_is_equivariant": "every head has a bandwidth of its own"}

            def oracle(self, q, k, v, metadata, *, softmax_scale, causal, attn_mask, impl, **extra):
                return my_sparse_reference(q, k, v, block_size=16, softmax_scale=softmax_scale)

            def dense_limit(self, q, k):
                return DenseLimit(impl_args={"block_size": k.shape[1]})

    Which checks run follows from the declared `Capabilities`: what is claimed must hold, what is not claimed must be
    refused with a reason. Tests run on every declared device type that this machine has. A test cannot be overridden;
    own tests can be added.

    Attributes:
        backend: Name of the backend, as registered.
        impl_args: Constructor arguments of the backend's own.
        deviations: Test name to reason, for tests that cannot hold. Such a test must fail (a strict xfail); the reason is
            printed. "test_x[cpu-float32]" stands for those of its parameter sets that contain these parts.
        typical_length: Tokens in most tests; a block-sparse backend wants several blocks.
        num_heads: Query heads in the tests, a multiple of 4.

    Hooks, each described where it is defined: `make_metadata`, `extra_inputs`, `supported_lengths`, `oracle` and
    `dense_limit` (both required unless the backend is exact), `oracle_lse`, `rounding_step`, `custom_ops`.

    Raises:
        TypeError: At class creation: a test of the suite is overridden, or `deviations` names no test or gives no reason.
    """

    __test__: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name, function in SUITE_TESTS.items():
            if getattr_static(cls, name) is not function:
                raise TypeError(
                    f"{cls.__qualname__} overrides the conformance test {name}, which must run as it is. If the backend "
                    f"cannot pass it, declare why: deviations = {{{name!r}: 'reason'}}"
                )
        for key, reason in cls.deviations.items():
            if key.partition("[")[0] not in SUITE_TESTS:
                raise TypeError(
                    f"{cls.__qualname__}.deviations names {key!r}, which is no conformance test. Tests: "
                    f"{', '.join(sorted(SUITE_TESTS))}"
                )
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(
                    f"{cls.__qualname__}.deviations[{key!r}] must give the reason as a string, got {reason!r}"
                )
        # collected once it names a backend
        cls.__test__ = bool(cls.backend)


SUITE_TESTS: dict[str, FunctionType] = {
    name: function
    for base in reversed(BackendConformance.__mro__)
    for name, function in vars(base).items()
    if name.startswith("test_") and isinstance(function, FunctionType)
}
"""The suite's tests by name."""
