"""Checks that what is not declared is refused, by the capabilities and by the impl, with words that name it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attnmux.errors import AttnmuxError
from attnmux.spec import DTYPES
from attnmux.testing.conformance.cases import Case, differ
from attnmux.testing.conformance.harness import ConformanceHarness
from attnmux.testing.conformance.masks import mask_for

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RefusalChecks"]


_ANY_VALUE: Any = 1


class RefusalChecks(ConformanceHarness):
    """Nothing that was asked for is ignored."""

    def assert_refused(self, call: Callable[[], object], what: str, *names: str, keyword: str = "") -> None:
        """Assert that a call raises an AttnmuxError whose text has one of the names.

        Args:
            call: What must not work.
            what: What is asked for, for the message.
            *names: Words of which one must be in the error's text, in any case.
            keyword: An argument that Python itself may refuse as unknown, by a TypeError that names it.
        """
        try:
            call()
        except AttnmuxError as error:
            text = str(error)
        except TypeError as error:
            if keyword and keyword in str(error):
                return
            raise AssertionError(f"{self.backend} meets {what} with a bare TypeError: {error}") from error
        except (ValueError, RuntimeError, LookupError, AssertionError, NotImplementedError) as error:
            raise AssertionError(
                f"{self.backend} meets {what} with a bare {type(error).__name__}, not an UnsupportedRequestError: {error}"
            ) from error
        else:
            raise AssertionError(f"{self.backend} accepts {what}, which it does not declare")
        assert any(name.lower() in text.lower() for name in names), (
            f"{self.backend} refuses {what}, but its message names none of {names}: {text}"
        )

    def assert_declared_missing(self, code: str, **fields: Any) -> None:
        """Assert that the capabilities give a reason of this code for a request."""
        codes = [reason.code for reason in self.capabilities.missing(self.request(**fields))]
        assert code in codes, f"Capabilities.missing gives {codes} for {fields}, expected {code!r} among them"

    def _any_case(self, **options: Any) -> Case:
        """Return a case on the CPU for what the constructor must refuse; device and dtype do not matter there."""
        return self.make_case("cpu", self.declared_dtypes("cpu", every=True)[0], **options)

    def test_undeclared_softmax_scale_is_refused(self) -> None:
        """Without the capability `softmax_scale` the constructor refuses a factor other than D ** -0.5.

        If this fails: the constructor takes `softmax_scale` and forgets it. Raise UnsupportedRequestError, or honour it and
        declare it.
        """
        self.forbid("softmax_scale")
        self.assert_declared_missing("softmax_scale", softmax_scale=0.37)
        for scale in (0.37, 0.0):
            case = self._any_case(softmax_scale=scale)
            self.assert_refused(lambda case=case: self.make_impl(case), f"softmax_scale={scale}", "scale")  # type: ignore[misc]

    def test_undeclared_causal_is_refused(self) -> None:
        """Without the capability `causal` the constructor refuses causal=True.

        If this fails: the constructor takes `causal` and forgets it: every token would see the future.
        """
        self.forbid("causal")
        self.assert_declared_missing("causal", causal=True)
        case = self._any_case(causal=True)
        self.assert_refused(lambda: self.make_impl(case), "causal=True", "causal")

    def test_undeclared_gqa_is_refused(self) -> None:
        """Without the capability `gqa` the constructor refuses fewer key heads than query heads.

        If this fails: `num_kv_heads` is taken and forgotten; the first call then fails far from its cause, or broadcasts.
        """
        self.forbid("gqa")
        self.assert_declared_missing("gqa", num_kv_heads=self.num_heads // 2)
        case = self._any_case(num_kv_heads=self.num_heads // 2)
        self.assert_refused(lambda: self.make_impl(case), "num_kv_heads < num_heads", "num_kv_heads", "gqa", "key head")

    def test_undeclared_head_size_is_refused(self) -> None:
        """The constructor refuses a head size that is not declared, and names the number.

        If this fails: the kernel is reached with a head size it was not written for. Check it in the constructor.
        """
        size = next((size for size in range(1, 1025) if size not in self.capabilities.head_sizes), None)
        if size is None:
            pytest.skip(f"{self.backend} declares every head size up to 1024")
        # the largest gap is the one that people meet: 80 between 64 and 128
        size = 80 if 80 not in self.capabilities.head_sizes else size
        self.assert_declared_missing("head_size", head_size=size)
        case = self._any_case()
        self.assert_refused(lambda: self.make_impl(case, head_size=size), f"head_size={size}", str(size))

    def test_unknown_constructor_argument_is_refused(self) -> None:
        """The constructor refuses, by name, an argument that it does not know.

        If this fails: **extra_impl_args swallows it, so that a misspelt option does nothing. Pass what is left over to
        `super().__init__`, which refuses it.
        """
        name = "no_such_option_of_any_backend"
        case = self._any_case()
        self.assert_refused(
            lambda: self.make_impl(case, **{name: _ANY_VALUE}), f"the argument {name}", name, keyword=name
        )

    def test_undeclared_dtype_is_refused(self, device: str) -> None:
        """`forward` refuses a dtype that is not declared, and names it.

        If this fails: inputs are cast or computed without a word. Check the dtype where the tensors come in.
        """
        undeclared = [name for name in DTYPES if name not in self.capabilities.dtypes]
        if not undeclared:
            pytest.skip(f"{self.backend} declares every dtype")
        for dtype in undeclared:
            self.assert_declared_missing("dtype", dtype=dtype)
            case = self.make_case(device, dtype)
            impl = self.make_impl(case)
            self.assert_refused(lambda i=impl, c=case: self.run(i, c), f"inputs of {dtype}", dtype)  # type: ignore[misc]

    def test_undeclared_device_is_refused(self) -> None:
        """`forward` refuses tensors on the CPU where only other devices are declared.

        If this fails: the call reaches a kernel that cannot run there. Check the device where the tensors come in.
        """
        if "cpu" in self.capabilities.devices:
            pytest.skip(f"{self.backend} declares cpu, and no test needs hardware of another kind")
        self.assert_declared_missing("device", device="cpu")
        case = self._any_case()

        def call() -> None:
            self.run(self.make_impl(case), case)

        self.assert_refused(call, "tensors on the CPU", "cpu", "cuda", "device")

    def test_undeclared_cross_lengths_are_refused(self, device: str, dtype: str) -> None:
        """Without the capability `cross_attention`, keys of another length than queries are refused.

        If this fails: `forward` assumes S_k = S_q. Compare the lengths, and name both in the error.
        """
        self.forbid("cross_attention")
        self.assert_declared_missing("cross_attention", cross_attention=True)
        length_q, length_k = self.pick_length(33), self.pick_length(self.typical_length)
        same = self.make_case(device, dtype, length_q=length_q)
        other = self.make_case(device, dtype, length_q=length_k)
        case = dataclasses.replace(same, k=other.k, v=other.v)
        impl = self.make_impl(case)
        self.assert_refused(
            lambda: self.run(impl, case), f"S_q={length_q}, S_k={length_k}", str(length_q), str(length_k), "length"
        )

    @pytest.mark.parametrize("kind", ["bool", "additive", "key_padding"])
    def test_undeclared_mask_is_refused(self, device: str, dtype: str, kind: str) -> None:
        """A mask of a form that is not declared is refused.

        If this fails: `attn_mask` is swallowed, or a mask of another form is taken for the declared one.
        """
        declared = self.capabilities.masks
        if kind in declared:
            pytest.skip(f"{self.backend} declares masks of form {kind!r}")
        if kind == "key_padding" and "bool" in declared:
            pytest.skip("a key padding mask is a bool mask that broadcasts, and bool masks are declared")
        self.assert_declared_missing("mask", mask=kind)
        case = self.make_case(device, dtype)
        case = dataclasses.replace(case, attn_mask=mask_for(case, kind, "full"))
        impl = self.make_impl(case)
        self.assert_refused(lambda: self.run(impl, case), f"attn_mask of form {kind!r}", "mask", keyword="attn_mask")

    def test_undeclared_lse_is_refused(self, device: str, dtype: str) -> None:
        """Without the capability `returns_lse`, return_lse=True is refused.

        If this fails: the keyword is swallowed, and the caller unpacks the output as if it were a pair.
        """
        self.forbid("returns_lse")
        self.assert_declared_missing("lse", needs_lse=True)
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        self.assert_refused(
            lambda: self.run(impl, case, return_lse=True), "return_lse=True", "lse", keyword="return_lse"
        )

    def test_unknown_extra_input_is_refused(self, device: str, dtype: str) -> None:
        """`forward` refuses, by name, an extra input that it does not know.

        If this fails: `forward` has **kwargs and drops what it does not read. Name the extra inputs as keyword-only
        parameters.
        """
        name = "no_such_input_of_any_backend"
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        self.assert_refused(
            lambda: self.run(impl, case, **{name: torch.ones_like(case.q)}), f"the input {name}", name, keyword=name
        )

    def test_missing_metadata_is_refused(self, device: str, dtype: str) -> None:
        """A backend that declares `needs_metadata` says so where it gets none.

        If this fails: forward trips over None; raise ForwardContextError that says how the metadata are built.
        """
        self.require("needs_metadata")
        case = dataclasses.replace(self.make_case(device, dtype), metadata=None)
        impl = self.make_impl(case)
        self.assert_refused(lambda: self.run(impl, case), "a call without metadata", "metadata")

    def test_metadata_of_another_length_are_refused(self, device: str, dtype: str) -> None:
        """Metadata made for another length are refused, with the numbers.

        If this fails: the index tables are applied to a sequence they do not describe: tokens are lost, or read twice.
        """
        self.require("needs_metadata")
        case = self.make_case(device, dtype)
        length = case.q.shape[1]
        other = self.make_case(device, dtype, length_q=self.pick_length(length + 1)).metadata
        if not differ(case.metadata, other):
            pytest.skip(f"the metadata of {self.backend} do not depend on the length")
        case = dataclasses.replace(case, metadata=other)
        impl = self.make_impl(case)
        self.assert_refused(lambda: self.run(impl, case), "metadata of another length", str(length))
