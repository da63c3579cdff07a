"""What the checks stand on: the hooks a subclass fills in, and how one call is made, run and judged."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from attnmux.errors import AttnmuxError, BackendUnavailableError
from attnmux.registry import get_registry
from attnmux.spec import DTYPES, AttentionRequest
from attnmux.testing.conformance.cases import (
    Case,
    DenseLimit,
    baseline_gradient_errors,
    gradient_term_sizes,
    gradients,
    in_double,
    named_parameters,
    with_gradients,
)
from attnmux.testing.inputs import make_inputs
from attnmux.testing.tolerance import (
    ERROR_FACTOR,
    ErrorMeasure,
    assert_close_to_oracle,
    dense_attention_baseline,
    dense_attention_oracle,
    measure_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata
    from attnmux.spec import BackendSpec, Capabilities

__all__ = ["ConformanceHarness"]

_MOST_PRECISE_FIRST = ("float64", "float32", "bfloat16", "float16")


class ConformanceHarness:
    """Hooks and helpers of the suite; `BackendConformance` documents them for plugin authors."""

    backend: ClassVar[str] = ""
    impl_args: ClassVar[Mapping[str, Any]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}
    typical_length: ClassVar[int] = 72
    num_heads: ClassVar[int] = 4

    # ---- hooks

    def make_metadata(
        self, seq_len_q: int, seq_len_k: int, *, batch: int, device: torch.device
    ) -> AttentionMetadata | None:
        """Return the metadata for these lengths (tokens); None where the backend needs none."""
        return None

    def extra_inputs(self, q: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the backend's own inputs for q `[B, S, H, D]`, its dtype and device; `attn_mask` is the suite's."""
        return {}

    def supported_lengths(self, seq_lens: Sequence[int]) -> Sequence[int]:
        """Return those of the lengths (tokens) that the backend can take; the suite sees to it that it refuses the rest."""
        return seq_lens

    def oracle(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: AttentionMetadata | None,
        *,
        softmax_scale: float,
        causal: bool,
        attn_mask: torch.Tensor | None,
        impl: AttentionImpl[Any],
        **extra: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the backend should compute, in float64 and differentiable.

        Args:
            q: `[B, S_q, H, D]` float64.
            k: `[B, S_k, H_kv, D]` float64.
            v: `[B, S_k, H_kv, D]` float64.
            metadata: As the backend gets it.
            softmax_scale: Factor on the scores.
            causal: Whether attention is causal, last query aligned with last key.
            attn_mask: Bool, or additive float64, or None.
            impl: The impl under test, with its parameters in float64, for backends that have some.
            **extra: The extra inputs, in float64.
        """
        return dense_attention_oracle(q, k, v, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask)

    def oracle_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        metadata: AttentionMetadata | None,
        *,
        softmax_scale: float,
        causal: bool,
        attn_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the log-sum-exp `[B, H, S_q]` float64 that belongs to `oracle`."""
        return dense_attention_oracle(
            q, k, k, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask, return_lse=True
        )[1]

    def dense_limit(self, q: torch.Tensor, k: torch.Tensor) -> DenseLimit | None:
        """Return where a backend that is not exact equals dense attention on q `[B, S, H, D]` and k; None if nowhere."""
        return None

    def rounding_step(self, case: Case) -> float:
        """Return how far an output value moves where one number inside rounds the other way; 0 unless a backend has few bits.

        An oracle that rounds to few bits too agrees with a kernel but for numbers next to a tie, which the last bit of float32
        decides. The step is what such a number is worth; it is allowed on top of the error rule.
        """
        return 0.0

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return (operator, example arguments on `device`) of the backend's `torch.library` operators."""
        return ()

    # ---- the backend under test

    @cached_property
    def spec(self) -> BackendSpec:
        """The backend's spec, from the registry."""
        return get_registry().spec(self.backend)

    @property
    def capabilities(self) -> Capabilities:
        """What the backend declares."""
        return self.spec.capabilities

    @cached_property
    def backend_cls(self) -> type[AttentionBackend]:
        """The backend's class; skips the test where the backend cannot run on this machine."""
        try:
            return get_registry().backend_class(self.backend)
        except BackendUnavailableError as error:
            pytest.skip(str(error))

    def require(self, claim: str) -> None:
        """Skip the test unless a capability is declared."""
        if not getattr(self.capabilities, claim):
            pytest.skip(f"{self.backend} does not declare {claim}")

    def forbid(self, claim: str) -> None:
        """Skip the test of a refusal where the capability is declared."""
        if getattr(self.capabilities, claim):
            pytest.skip(f"{self.backend} declares {claim}")

    def declared_dtypes(self, device: str, *, every: bool) -> list[str]:
        """Return the dtypes to test on a device type: all, or the most precise one and, on a GPU, the half types too."""
        declared = [name for name in _MOST_PRECISE_FIRST if name in self.capabilities.dtypes]
        if every:
            return declared
        # on a GPU float64 usually takes another path than the half types, for which the kernels are written
        halves = [name for name in declared[1:] if device != "cpu" and name in ("bfloat16", "float16")]
        return declared[:1] + halves

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise `device`, `dtype` (the few that matter) and `any_dtype` (all) by what the backend declares."""
        if "device" not in metafunc.fixturenames:
            return
        name = next((name for name in ("any_dtype", "dtype") if name in metafunc.fixturenames), None)
        try:
            devices = sorted(self.capabilities.devices)
        except AttnmuxError:
            # the tests themselves raise it, with its message
            metafunc.parametrize(["device", name] if name else ["device"], [("cpu", DTYPES[0])[: 2 if name else 1]])
            return
        only = metafunc.config.getoption("--attnmux-device", None)
        values = []
        for device in devices:
            if only is not None and device != only:
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if name is None:
                values.append(pytest.param(device, marks=marks, id=device))
                continue
            dtypes = self.declared_dtypes(device, every=name == "any_dtype")
            values += [pytest.param(device, dtype, marks=marks, id=f"{device}-{dtype}") for dtype in dtypes]
        metafunc.parametrize(["device", name] if name else ["device"], values)

    @pytest.fixture(autouse=True)
    def _declared_deviation(self, request: pytest.FixtureRequest, record_property: Any) -> None:
        """Expect the test to fail, strictly, where the subclass declares a deviation."""
        node = request.node
        callspec = getattr(node, "callspec", None)
        for key, reason in self.deviations.items():
            name, _, inside = key.rstrip("]").partition("[")
            parts = set(callspec.id.split("-")) if callspec else set()
            if name == node.originalname and (not inside or set(inside.split("-")) <= parts):
                record_property("attnmux_deviation", reason)
                node.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(autouse=True)
    def _architecture(self, request: pytest.FixtureRequest) -> None:
        """Skip a GPU test where this GPU's architecture is not declared."""
        device = getattr(getattr(request.node, "callspec", None), "params", {}).get("device")
        archs = self.capabilities.cuda_archs if device == "cuda" else frozenset()
        if device != "cuda" or "any" in archs:
            return
        major, minor = torch.cuda.get_device_capability()
        if major * 10 + minor not in archs:
            pytest.skip(f"{self.backend} does not declare sm_{major}{minor}")

    # ---- one call

    def pick_length(self, near: int) -> int:
        """Return the first supported length from `near` tokens on."""
        found = list(self.supported_lengths(range(near, near + 4096)))
        if not found:
            pytest.fail(f"supported_lengths() gives none of {near} to {near + 4095}")
        return found[0]

    def pick_head_size(self) -> int:
        """Return a declared head size, small where there is a choice."""
        sizes = self.capabilities.head_sizes
        found = next((size for size in (32, 64, 16, 128) if size in sizes), None)
        return found if found is not None else min(sizes)

    def make_case(
        self,
        device: str,
        dtype: str,
        *,
        batch: int = 2,
        length_q: int | None = None,
        length_k: int | None = None,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        input_scale: float = 1.0,
        layout: str = "contiguous",
        seed: int = 0,
        **options: Any,
    ) -> Case:
        """Return a call on seeded random inputs; `options` are the other fields of `Case`."""
        length_q = self.pick_length(self.typical_length) if length_q is None else length_q
        length_k = length_q if length_k is None else length_k
        inputs = make_inputs(
            batch=batch,
            length_q=length_q,
            length_k=length_k,
            num_heads=self.num_heads,
            num_kv_heads=num_kv_heads,
            head_size=self.pick_head_size() if head_size is None else head_size,
            dtype=getattr(torch, dtype),
            device=device,
            input_scale=input_scale,
            layout=layout,
            seed=seed,
        )
        metadata = self.make_metadata(length_q, length_k, batch=batch, device=torch.device(device))
        if metadata is None and self.capabilities.needs_metadata:
            pytest.fail(f"{self.backend} declares needs_metadata: override make_metadata() in the conformance class")
        return Case(*inputs, metadata=metadata, extra_inputs=self.extra_inputs(inputs.q), **options)

    def make_impl(self, case: Case, *, impl_args: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
        """Return an impl for this case on its device, its parameters drawn at random from a fixed seed.

        Zero-initialised parameters would hide whatever they multiply, so the suite fills them. An `impl_args` of the
        caller's leaves them as they are constructed.
        """
        arguments = {
            "num_heads": case.q.shape[2],
            "head_size": case.q.shape[3],
            "num_kv_heads": case.k.shape[2] if case.k.shape[2] != case.q.shape[2] else None,
            "softmax_scale": case.softmax_scale,
            "causal": case.causal,
            **(self.impl_args if impl_args is None else impl_args),
            **arguments,
        }
        impl: Any = self.backend_cls.get_impl_cls()(**arguments)
        if isinstance(impl, torch.nn.Module):
            impl.to(case.q.device)
            generator = torch.Generator().manual_seed(1)
            for parameter in impl.parameters() if impl_args is None else ():
                drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.data.copy_(drawn)
        return impl

    def run(self, impl: Any, case: Case, **keywords: Any) -> Any:
        """Run an impl as the layers do: preprocess q, k and v, forward, postprocess the output."""
        q, k, v = (impl.preprocess_qkv(x, case.metadata) for x in (case.q, case.k, case.v))
        if case.attn_mask is not None:
            keywords["attn_mask"] = case.attn_mask
        result = impl.forward(q, k, v, case.metadata, **case.extra_inputs, **keywords)
        if keywords.get("return_lse"):
            return impl.postprocess_output(result[0], case.metadata), result[1]
        return impl.postprocess_output(result, case.metadata)

    def run_oracle(self, impl: Any, case: Case) -> torch.Tensor:
        """Return the oracle's output; gradients flow to the case's tensors and to the parameters of `impl`."""
        options = case.options
        if case.attn_mask is not None and case.attn_mask.dtype != torch.bool:
            options["attn_mask"] = case.attn_mask.double()
        extra: dict[str, Any] = {
            name: x.double() if x.is_floating_point() else x for name, x in case.extra_inputs.items()
        }
        q, k, v = (x.double() for x in (case.q, case.k, case.v))
        return self.oracle(q, k, v, case.metadata, impl=impl, **options, **extra)

    # ---- judging

    def check_output(
        self, case: Case, *, impl: Any = None, result: torch.Tensor | None = None, what: str = "output"
    ) -> None:
        """Hold the output of a call to the error rule; runs it unless `result` is given."""
        impl = self.make_impl(case) if impl is None else impl
        with torch.no_grad():
            result = self.run(impl, case) if result is None else result
            oracle = self.run_oracle(in_double(impl), case)
            dense = dense_attention_oracle(case.q, case.k, case.v, **case.options)
            baseline = measure_error(dense_attention_baseline(case.q, case.k, case.v, **case.options), dense)
            if step := self.rounding_step(case):
                size = max(oracle.abs().max().item(), torch.finfo(torch.float32).tiny)
                # the rule allows a multiple of the baseline
                baseline = baseline.worst(ErrorMeasure(largest_relative=step / size / ERROR_FACTOR["output"]))
        term_size = case.v.detach().double().square().mean().sqrt().item()
        assert_close_to_oracle(result, oracle, baseline, what=what, term_size=term_size)

    def check_gradients(self, case: Case, *, impl: Any = None, runner: Callable[..., Any] | None = None) -> None:
        """Hold output and gradients of a call to the error rule: of q, k, v, floating extra inputs and parameters.

        Args:
            case: The call.
            impl: What runs it; None = a new one.
            runner: Called as `runner(impl, case)`; None = `run`.
        """
        impl = self.make_impl(case) if impl is None else impl
        found_case, found = with_gradients(case)
        output = (runner or self.run)(impl, found_case)
        self.check_output(case, impl=impl, result=output.detach())
        generator = torch.Generator().manual_seed(2)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        parameters = named_parameters(impl)
        found_gradients = gradients(output, {**found, **parameters}, cotangent)

        oracle_impl = in_double(impl)
        oracle_case, wanted = with_gradients(case, torch.float64)
        oracle = self.run_oracle(oracle_impl, oracle_case)
        wanted_gradients = gradients(oracle, {**wanted, **named_parameters(oracle_impl)}, cotangent.double())

        errors = baseline_gradient_errors(case, cotangent)
        worst = errors["q"].worst(errors["k"]).worst(errors["v"])
        sizes = gradient_term_sizes(case, cotangent)
        for name, gradient in found_gradients.items():
            assert_close_to_oracle(
                gradient,
                wanted_gradients[name],
                errors.get(name, worst),
                kind="gradient",
                what=f"gradient of {name}",
                term_size=sizes.get(name, 0.0),
                # a parameter may have another dtype than the layer's inputs; the coarser one bounds its gradient
                dtype=max(case.q.dtype, gradient.dtype, key=lambda dtype: torch.finfo(dtype).eps),
            )

    def request(self, **fields: Any) -> AttentionRequest:
        """Return a request that the backend declares to serve, with some fields replaced."""
        defaults: dict[str, Any] = {
            "head_size": self.pick_head_size(),
            "dtype": min(self.capabilities.dtypes),
            "device": min(self.capabilities.devices),
            "num_heads": self.num_heads,
        }
        return AttentionRequest(**{**defaults, **fields})
