"""Checks of how a backend fits in: compilation, custom operators, metadata, checkpoints, the layers."""

from __future__ import annotations

import inspect
import io
import logging
import pickle
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attnmux.testing.conformance.cases import Case, differ
from attnmux.testing.conformance.harness import ConformanceHarness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnmux.backend import AttentionMetadata

__all__ = ["IntegrationChecks"]


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Forget compiled code before and after, and keep the compiler's words about its own internals out of the report."""
    trace = logging.getLogger("torch.__trace")
    trace.addFilter(_nothing)
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compiler.reset()
        trace.removeFilter(_nothing)


class IntegrationChecks(ConformanceHarness):
    """The backend works inside torch.compile, checkpoints, processes and layers."""

    def _compiled_dtype(self) -> str:
        if self.capabilities.compile != "fullgraph":
            pytest.skip(f"{self.backend} declares compile={self.capabilities.compile!r}, not 'fullgraph'")
        return next(name for name in ("float32", "bfloat16", "float16", "float64") if name in self.capabilities.dtypes)

    def test_compiles_with_dynamic_length(self, device: str) -> None:
        """Tracing forward with fullgraph=True works; after the first four lengths, further ones compile nothing new.

        If this fails with a graph break: forward calls something that the compiler cannot trace (`.item()`, a Python side
        effect, a kernel that is not a `torch.library` operator). If it fails with recompilations: the length reaches the
        graph as a constant, through `int()`, a cached table or an attribute of the impl; or `make_metadata` gives grids
        of another form for every length. The lengths are multiples of `typical_length`.
        """
        dtype = self._compiled_dtype()
        lengths: list[int] = []
        for multiple in range(1, 7):
            # a length that equals another size of the call would be taken for the same number
            taken = {*lengths, self.pick_head_size(), self.num_heads}
            near = self.typical_length * multiple
            while (length := self.pick_length(near)) in taken:
                near = length + 1
            lengths.append(length)
        cases = [self.make_case(device, dtype, length_q=length, seed=length) for length in lengths]
        impl = self.make_impl(cases[0])
        graphs: list[Any] = []

        from torch._dynamo import lookup_backend

        trace = lookup_backend("aot_eager")

        def count(graph: Any, example_inputs: Any) -> Any:
            graphs.append(graph)
            return trace(graph, example_inputs)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: Any, extra: Any) -> torch.Tensor:
            return self.run(impl, Case(q, k, v, metadata, extra))  # type: ignore[no-any-return]

        counts = []
        with _fresh_compiler(), torch.no_grad():
            compiled: Callable[..., torch.Tensor] = torch.compile(call, fullgraph=True, backend=count)
            for case in cases:
                output = compiled(case.q, case.k, case.v, case.metadata, dict(case.extra_inputs))
                counts.append(len(graphs))
                self.check_output(case, impl=impl, result=output, what=f"compiled output at {case.q.shape[1]} tokens")
        # every number that the length changes costs one more graph, when it changes first
        assert counts[-1] == counts[3], (
            f"graphs compiled after lengths {lengths}: {counts}; every new length recompiles"
        )

    def test_compiled_gradients(self, device: str) -> None:
        """Gradients flow through the compiled forward and equal those of the uncompiled one.

        If this fails: an operator has no fake implementation or no autograd formula; register both with `torch.library`.
        """
        self.require("backward")
        case = self.make_case(device, self._compiled_dtype())
        with _fresh_compiler():
            runner = torch.compile(self.run, fullgraph=True, backend="aot_eager")
            self.check_gradients(case, runner=runner)

    def test_custom_ops_pass_opcheck(self, device: str) -> None:
        """`torch.library.opcheck` accepts every operator that `custom_ops` lists.

        If this fails: the schema lies about mutation or aliasing, or the fake implementation gives other shapes, strides or
        dtypes than the real one.
        """
        operators = list(self.custom_ops(torch.device(device)))
        if not operators:
            pytest.skip(f"custom_ops() lists no operator of {self.backend}")
        for operator, arguments in operators:
            torch.library.opcheck(operator, arguments)

    def _metadata(self, device: str, dtype: str) -> AttentionMetadata:
        found = self.make_case(device, dtype).metadata
        if found is not None:
            return found
        cls = self.backend_cls.get_metadata_cls()
        try:
            return cls(current_timestep=3)
        except TypeError:
            pytest.skip(f"{cls.__name__} needs more than current_timestep, and make_metadata() gives none")

    def test_metadata_survive_pickling(self, device: str, dtype: str) -> None:
        """Metadata come back from pickle with the same values, and a call with them gives the same result.

        If this fails: the metadata hold something that cannot leave the process (a lambda, a lock, a group, an open file),
        or their class is local to a function.
        """
        metadata = self._metadata(device, dtype)
        try:
            restored = pickle.loads(pickle.dumps(metadata))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise AssertionError(f"{type(metadata).__name__} cannot be pickled: {error}") from error
        assert not differ(metadata, restored), f"{type(metadata).__name__} comes back from pickle with other values"
        case = self.make_case(device, dtype)
        if case.metadata is not None:
            impl = self.make_impl(case)
            restored_case = Case(case.q, case.k, case.v, restored, case.extra_inputs)
            self.check_output(
                case, impl=impl, result=self.run(impl, restored_case).detach(), what="output after pickling"
            )

    def test_metadata_as_dict(self, device: str, dtype: str) -> None:
        """`asdict_zerocopy` gives the fields by name, the same objects, without the skipped ones.

        If this fails: the metadata class is not a dataclass itself (the decorator is missing), or overrides the method.
        """
        metadata = self._metadata(device, dtype)
        fields = metadata.asdict_zerocopy()
        assert "current_timestep" in fields, "the metadata have no field current_timestep"
        for name, value in fields.items():
            assert getattr(metadata, name) is value, f"asdict_zerocopy copies {name}"
        assert "current_timestep" not in metadata.asdict_zerocopy(skip_fields={"current_timestep"})
        cls = type(metadata)
        own = sorted(inspect.get_annotations(cls))
        assert not own or "__dataclass_fields__" in vars(cls), f"{cls.__name__} has {own} and is not a dataclass itself"

    def test_builder_is_constructed_bare(self) -> None:
        """The metadata builder is constructed without arguments, and `prepare` may be called at any time.

        If this fails: the builder asks for arguments that pipelines do not have; take them in `build`.
        """
        builder = self.backend_cls.get_builder_cls()()
        builder.prepare()
        builder.prepare()

    def test_state_dict_round_trip(self, device: str, dtype: str) -> None:
        """Parameters saved from one impl and loaded into another give the same output.

        If this fails: a tensor that matters is neither a parameter nor a buffer, or the constructor's random numbers are
        used where the loaded parameters should be.
        """
        self.require("trainable_parameters")
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        file = io.BytesIO()
        torch.save(impl.state_dict(), file)
        file.seek(0)
        other = self.make_impl(case, impl_args=self.impl_args)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        with torch.no_grad():
            self.check_output(case, impl=impl, result=self.run(other, case), what="output after load_state_dict")

    def test_postprocess_undoes_preprocess(self, device: str, dtype: str) -> None:
        """`postprocess_output(preprocess_qkv(x))` is x, bit for bit.

        If this fails: the two permutations are not inverse, or padding is not removed in the right places.
        """
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        back = impl.postprocess_output(impl.preprocess_qkv(case.q, case.metadata), case.metadata)
        assert back.shape == case.q.shape, f"postprocess_output gives {list(back.shape)} for {list(case.q.shape)}"
        assert torch.equal(back, case.q), "postprocess_output(preprocess_qkv(x)) differs from x"

    def test_preprocess_works_stacked(self, device: str, dtype: str) -> None:
        """q, k and v stacked along the batch are preprocessed as each alone.

        If this fails: `preprocess_qkv` assumes the batch size of the metadata, or treats q, k and v differently. The
        distributed layer stacks them where they have one shape, to send them at once.
        """
        case = self.make_case(device, dtype)
        impl = self.make_impl(case)
        stacked = impl.preprocess_qkv(torch.cat([case.q, case.k, case.v]), case.metadata)
        alone = torch.cat([impl.preprocess_qkv(x, case.metadata) for x in (case.q, case.k, case.v)])
        assert stacked.shape == alone.shape, f"stacked {list(stacked.shape)}, one by one {list(alone.shape)}"
        assert torch.equal(stacked, alone), "preprocess_qkv differs between stacked tensors and each alone"

    def test_layer_gives_the_result_of_the_impl(self, device: str, dtype: str) -> None:
        """LocalAttention finds the backend by name and gives what the oracle says.

        If this fails: the constructor or forward has other parameters than the contract, so that it works in its own tests
        only.
        """
        from attnmux.layers import LocalAttention

        if device != ("cuda" if torch.cuda.is_available() else "cpu"):
            pytest.skip("a layer is selected for this machine's current device, which is another one")
        case = self.make_case(device, dtype)
        layer = LocalAttention(
            self.num_heads,
            case.q.shape[-1],
            backend=self.backend,
            dtype=case.q.dtype,
            **self.impl_args,
        ).to(device)
        impl: Any = self.make_impl(case)
        if isinstance(impl, torch.nn.Module):
            assert isinstance(layer.attn_impl, torch.nn.Module)
            layer.attn_impl.load_state_dict(impl.state_dict())
        with torch.no_grad():
            output = layer(case.q, case.k, case.v, attn_metadata=case.metadata, **case.extra_inputs)
        self.check_output(case, impl=impl, result=output, what="output of LocalAttention")
