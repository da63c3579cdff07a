"""Checks of how a call behaves: what it touches, what it keeps, whether it repeats."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

from attnmux.testing.conformance.cases import Case, gradients, with_gradients
from attnmux.testing.conformance.harness import ConformanceHarness
from attnmux.testing.conformance.masks import mask_for
from attnmux.testing.poison import poisoned_memory

__all__ = ["BehaviourChecks"]


class BehaviourChecks(ConformanceHarness):
    """A call touches nothing but its output, and depends on nothing but its inputs."""

    def _run_with_gradients(self, impl: Any, case: Case) -> dict[str, torch.Tensor]:
        """Return the output and, where backward is declared, the gradients of q, k, v and extra inputs."""
        if not self.capabilities.backward:
            with torch.no_grad():
                return {"output": self.run(impl, case)}
        case, leaves = with_gradients(case)
        output = self.run(impl, case)
        return {"output": output.detach(), **gradients(output, leaves, torch.ones_like(output).cumsum(1))}

    def test_output_form(self, device: str, any_dtype: str) -> None:
        """The output is [B, S_q, H, D] in the dtype and on the device of q, D contiguous, in memory of its own.

        If this fails: the result is left in the compute dtype (cast it back), in [B, H, S, D] (transpose it back), or it is
        a view of an input, so that writing to it would change that input.
        """
        shortest, typical = self.pick_length(1), self.pick_length(self.typical_length)
        lengths = [(shortest, shortest), (typical, typical)]
        if self.capabilities.cross_attention:
            lengths += [(typical, shortest), (shortest, typical)]
        for length_q, length_k in lengths:
            case = self.make_case(device, any_dtype, length_q=length_q, length_k=length_k)
            with torch.no_grad():
                output = self.run(self.make_impl(case), case)
            assert isinstance(output, torch.Tensor), f"forward returns a {type(output).__name__}, not a tensor"
            assert output.shape == case.q.shape, (
                f"output is {list(output.shape)}, expected that of q {list(case.q.shape)}"
            )
            assert output.dtype == case.q.dtype, f"output is {output.dtype}, expected that of q {case.q.dtype}"
            assert output.device == case.q.device, f"output is on {output.device}, q on {case.q.device}"
            assert output.stride(-1) == 1, f"output has strides {output.stride()}: D is not contiguous"
            assert all(step for step, size in zip(output.stride(), output.shape, strict=True) if size > 1), (
                f"output has strides {output.stride()}: elements share memory"
            )
            memory = output.untyped_storage().data_ptr()
            for name, x in {"q": case.q, "k": case.k, "v": case.v, **case.extra_inputs}.items():
                assert x.untyped_storage().data_ptr() != memory, f"the output is a view of {name}"

    def test_inputs_are_not_modified(self, device: str, dtype: str) -> None:
        """q, k, v, extra inputs and the mask hold the same bits after forward and backward.

        If this fails: an in-place operation (`mul_`, `+=`, `out=`) works on an input. Inputs are shared with other layers.
        """
        case = self.make_case(device, dtype)
        kinds = sorted(self.capabilities.masks)
        if kinds:
            case = dataclasses.replace(case, attn_mask=mask_for(case, kinds[0], "full"))
        tensors = {"q": case.q, "k": case.k, "v": case.v, "attn_mask": case.attn_mask, **case.extra_inputs}
        before = {name: (x.clone(), x._version) for name, x in tensors.items() if x is not None}
        self._run_with_gradients(self.make_impl(case), case)
        for name, (values, version) in before.items():
            now = tensors[name]
            assert now is not None
            assert torch.equal(now, values), f"{name} is changed by the call"
            assert now._version == version, (
                f"{name} is written to in place, though its values are the same after the call"
            )

    def test_samples_are_independent(self, device: str, dtype: str) -> None:
        """What sample 0 gets does not depend on the other samples of the batch, nor on their number.

        If this fails: a statistic (mean, maximum, threshold, top-k) is taken over the batch, or an offset misses the batch
        stride.
        """
        case = self.make_case(device, dtype, batch=3)
        other = self.make_case(device, dtype, batch=3, seed=9, input_scale=1000.0)
        impl = self.make_impl(case)
        mixed: dict[str, Any] = {
            name: torch.cat([getattr(case, name)[:1], getattr(other, name)[1:]]) for name in ("q", "k", "v")
        }
        extra = {
            name: torch.cat([x[:1], other.extra_inputs[name][1:]]) if x.dim() == 4 else x
            for name, x in case.extra_inputs.items()
        }
        with torch.no_grad():
            output = self.run(impl, case)
            among_others = self.run(impl, dataclasses.replace(case, **mixed, extra_inputs=extra))
        alone = self.make_case(device, dtype, batch=1)
        alone = dataclasses.replace(case.mapped(lambda x: x[:1]), metadata=alone.metadata)
        self.check_output(alone, impl=impl, result=output[:1], what="sample 0 of 3")
        self.check_output(alone, impl=impl, result=among_others[:1], what="sample 0 with other samples beside it")
        self.check_output(alone, impl=impl, what="sample 0 alone")

    def test_head_permutation_is_equivariant(self, device: str, dtype: str) -> None:
        """Permuting the heads of q, k, v and extra inputs permutes the heads of the output.

        If this fails: heads mix, or a statistic is taken over them. Sequence parallelism splits heads over ranks, so such a
        backend would give other results there. A backend with parameters per head declares it in `deviations`.
        """
        case = self.make_case(device, dtype)
        order = torch.arange(self.num_heads, device=case.q.device).roll(1)
        impl = self.make_impl(case)
        with torch.no_grad():
            permuted = self.run(impl, case.mapped(lambda x: x[:, :, order]))
        self.check_output(case, impl=impl, result=permuted[:, :, order.argsort()], what="output with permuted heads")

    def test_heads_are_independent(self, device: str, dtype: str) -> None:
        """The output of head 0 does not depend on what other heads hold.

        If this fails: a statistic is taken over the heads, or an offset misses the head stride.
        """
        case, other = self.make_case(device, dtype), self.make_case(device, dtype, seed=9, input_scale=1000.0)
        impl = self.make_impl(case)
        mixed: dict[str, Any] = {
            name: torch.cat([getattr(case, name)[:, :, :1], getattr(other, name)[:, :, 1:]], dim=2)
            for name in ("q", "k", "v")
        }
        with torch.no_grad():
            expected = self.run(impl, case)
            found = self.run(impl, dataclasses.replace(case, **mixed))
        composed = torch.cat([found[:, :, :1], expected[:, :, 1:]], dim=2)
        self.check_output(case, impl=impl, result=composed, what="output of head 0 with other heads changed")

    def test_some_heads_are_those_of_all(self, device: str, dtype: str) -> None:
        """`of_heads` gives an impl for some of the heads, which computes what the whole does for these.

        If this fails: the impl keeps something per head, which a copy of it applies to the wrong heads. Override `of_heads`.
        """
        if "ulysses" not in self.capabilities.sequence_parallel:
            pytest.skip(f"{self.backend} does not declare 'ulysses'")
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        half = self.num_heads // 2

        def run_some(first: int) -> Any:
            last = first + half
            return self.run(impl.of_heads(first, last), case.mapped(lambda x: x[:, :, first:last]))

        with torch.no_grad():
            parts = [run_some(0), run_some(half)]
        self.check_output(case, impl=impl, result=torch.cat(parts, dim=2), what="output of the heads half by half")

    def test_fresh_memory_is_written(self, device: str, any_dtype: str) -> None:
        """Every element of the output and of the gradients is written: memory from torch.empty holds NaN here.

        If this fails: a kernel leaves rows of a partial tile, padding or empty blocks as `torch.empty` gave them. It
        may pass without poison, since fresh memory is often zero.
        """
        for length in {self.pick_length(1), self.pick_length(self.typical_length)}:
            case = self.make_case(device, any_dtype, length_q=length)
            impl = self.make_impl(case)
            with poisoned_memory():
                found = self._run_with_gradients(impl, case)
            for name, x in found.items():
                kind = name if name == "output" else f"gradient of {name}"
                bad = int((~x.isfinite()).sum())
                assert not bad, f"{kind} has {bad} of {x.numel()} values that are NaN or infinite, at {length} tokens"
            self.check_output(case, impl=impl, result=found["output"])

    def test_same_input_gives_same_bits(self, device: str, any_dtype: str) -> None:
        """The same call gives the same bits, forward and backward, also after calls of other shapes.

        If this fails: atomic additions or unordered reductions, random numbers, or state kept from one call to the next.
        """
        self.require("deterministic")
        case = self.make_case(device, any_dtype)
        between = self.make_case(device, any_dtype, length_q=self.pick_length(self.typical_length + 7), seed=5)
        impl = self.make_impl(case)
        first = self._run_with_gradients(impl, case)
        for _ in range(2):
            self._run_with_gradients(impl, between)
            for name, x in self._run_with_gradients(impl, case).items():
                kind = name if name == "output" else f"gradient of {name}"
                assert torch.equal(x, first[name]), (
                    f"{kind} differs between equal calls in {int((x != first[name]).sum())} of {x.numel()} values"
                )

    def test_threads_share_an_impl(self, device: str, dtype: str) -> None:
        """Several threads may call one impl at once with inputs of their own.

        If this fails: `forward` or `preprocess_qkv` keeps something on `self` (a buffer, a length, the last mask) that
        another thread overwrites. Keep it in local variables or in the metadata.
        """
        lengths = [self.pick_length(length) for length in (16, 33, self.typical_length, self.typical_length)]
        cases = [self.make_case(device, dtype, length_q=length, seed=seed) for seed, length in enumerate(lengths)]
        impl = self.make_impl(cases[0])
        barrier = threading.Barrier(len(cases))
        results: list[list[torch.Tensor]] = [[] for _ in cases]
        errors: list[BaseException] = []

        def work(index: int) -> None:
            try:
                for _ in range(3):
                    barrier.wait(timeout=60)
                    with torch.no_grad():
                        results[index].append(self.run(impl, cases[index]))
            except BaseException as error:  # noqa: BLE001 - carried to the thread of the test, which raises it
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if causes:
            raise AssertionError(f"a call raises where several threads share the impl: {causes[0]!r}") from causes[0]
        for case, outputs in zip(cases, results, strict=True):
            for output in outputs:
                self.check_output(case, impl=impl, result=output, what="output while other threads call the impl")

    def test_calls_leave_no_trace(self, device: str, dtype: str) -> None:
        """A call with a mask, an LSE or another length does not change the next call.

        If this fails: something of a call stays on the impl and is used by the next one.
        """
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        first = self.make_case(device, dtype, length_q=self.pick_length(self.typical_length + 7), seed=5)
        kinds = sorted(self.capabilities.masks)
        with torch.no_grad():
            self.run(impl, first)
            if kinds:
                self.run(impl, dataclasses.replace(case, attn_mask=mask_for(case, kinds[0], "full")))
            if self.capabilities.returns_lse:
                self.run(impl, case, return_lse=True)
        self.check_output(case, impl=impl)
