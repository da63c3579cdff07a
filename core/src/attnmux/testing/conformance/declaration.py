"""Checks of what a backend says about itself, without running it."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from attnmux.backend import REQUIRED_METHODS, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attnmux.registry import get_registry
from attnmux.testing.conformance.harness import ConformanceHarness

__all__ = ["DeclarationChecks"]

_PROBE = """
import importlib, json, sys
spec_module, target_module = sys.argv[1:]
seen = {}
importlib.import_module(spec_module)
seen["torch_after_spec"] = "torch" in sys.modules
seen["triton_after_spec"] = "triton" in sys.modules
import torch
before = "triton" in sys.modules
importlib.import_module(target_module)
seen["cuda_after_backend"] = torch.cuda.is_initialized()
seen["triton_after_backend"] = "triton" in sys.modules and not before
print(json.dumps(seen))
"""


@functools.cache
def _import_in_fresh_process(spec_module: str, target_module: str) -> dict[str, bool]:
    """Return what importing the two modules, one after the other, loads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, spec_module, target_module],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"a fresh Python cannot import {spec_module} and {target_module}:\n{done.stderr}")
    seen: dict[str, bool] = json.loads(done.stdout.strip().splitlines()[-1])
    return seen


class DeclarationChecks(ConformanceHarness):
    """The spec, the class and the signatures agree."""

    def _imports(self) -> dict[str, bool]:
        entry_point = get_registry().records()[self.spec.name].claim.entry_point
        modules = [value.partition(":")[0] for value in (entry_point.value, self.spec.target)]
        if modules[1] in sys.modules and getattr(sys.modules[modules[1]], "__spec__", None) is None:
            pytest.skip(f"{self.backend} is registered in this process only")
        return _import_in_fresh_process(*modules)

    def test_spec_module_imports_no_torch(self) -> None:
        """Importing the module that holds the spec loads neither torch nor triton.

        If this fails: `plugin.py` imports the backend module, or its package's `__init__` does. Name the class as a string
        in `BackendSpec.target`, and load in `__init__` lazily.
        """
        seen = self._imports()
        loaded = [name for name in ("torch", "triton") if seen[f"{name}_after_spec"]]
        assert not loaded, f"importing the spec's module loads {', '.join(loaded)}; `attnmux list` would be slow"

    def test_backend_module_touches_no_gpu(self) -> None:
        """Importing the backend's module neither initialises CUDA nor loads triton.

        If this fails: a device property is asked for, a tensor is made on the GPU or triton is imported at module level. A
        process that forks after the import, and a machine without a GPU, would break. Do it in the first call.
        """
        seen = self._imports()
        assert not seen["cuda_after_backend"], "importing the backend's module initialises CUDA"
        assert not seen["triton_after_backend"], "importing the backend's module imports triton"

    def test_capabilities_are_declared(self) -> None:
        """The capabilities name at least one dtype, head size and device, an exactness, and are plain data.

        If this fails: what is not declared counts as unsupported, so such a backend would never be chosen.
        """
        capabilities = self.capabilities
        missing = [name for name in ("dtypes", "head_sizes", "devices", "exactness") if not getattr(capabilities, name)]
        assert not missing, f"{self.backend} declares no {', '.join(missing)}"
        if "cuda" in capabilities.devices:
            assert capabilities.cuda_archs, f"{self.backend} declares cuda and no cuda_archs; {{'any'}} means every one"
        json.dumps(capabilities.to_dict())

    def test_declared_request_is_served(self) -> None:
        """A request made of declared values meets no reason against it.

        If this fails: the declared capabilities exclude one another, or `check_request` refuses what they promise.
        """
        request = self.request(device=sorted(self.capabilities.devices)[0])
        archs = [arch for arch in self.capabilities.cuda_archs if isinstance(arch, int)]
        reasons = self.capabilities.missing(request, cuda_arch=archs[0] if archs else None)
        reasons += self.backend_cls.check_request(request)
        assert not reasons, f"{self.backend} refuses {request}: {'; '.join(map(str, reasons))}"

    def test_names_agree(self) -> None:
        """`get_name()` gives the name of the spec and of the entry point.

        If this fails: a copied backend kept the name of the original.
        """
        assert self.backend_cls.get_name() == self.spec.name == self.backend

    def test_required_methods_are_static(self) -> None:
        """The class has every method of the contract as a static method, and each returns a class of the right kind.

        If this fails: a `@staticmethod` is missing, or a method returns an instance or the wrong class.
        """
        for name in REQUIRED_METHODS:
            method = inspect.getattr_static(self.backend_cls, name)
            assert isinstance(method, (staticmethod, classmethod)), f"{name} is not a static method"
        for name, base in (
            ("get_impl_cls", AttentionImpl),
            ("get_metadata_cls", AttentionMetadata),
            ("get_builder_cls", AttentionMetadataBuilder),
        ):
            found = getattr(self.backend_cls, name)()
            assert isinstance(found, type), f"{name}() returns {found!r}, not a class"
            assert issubclass(found, base), f"{name}() returns {found!r}, not a subclass of {base.__name__}"
            assert not inspect.isabstract(found), (
                f"{found.__name__} lacks {', '.join(sorted(vars(found)['__abstractmethods__']))}"
            )

    def test_head_sizes_agree(self) -> None:
        """`get_supported_head_sizes()` names none that the capabilities do not declare; an empty list means all of them.

        If this fails: the spec and the class were changed apart.
        """
        sizes = self.backend_cls.get_supported_head_sizes()
        assert isinstance(sizes, list), f"get_supported_head_sizes() returns a {type(sizes).__name__}, not a list"
        undeclared = [size for size in sizes if size not in self.capabilities.head_sizes]
        assert not undeclared, f"get_supported_head_sizes() has {undeclared}, which the capabilities do not declare"

    def test_extra_inputs_are_keyword_only(self) -> None:
        """Every declared extra input is a keyword-only parameter of `forward` with a default.

        If this fails: the layers pass extra inputs by keyword and may leave them out; write `*, name=None` in `forward`. A
        backend with masks declares "attn_mask" among its extra inputs.
        """
        declared = set(self.capabilities.extra_inputs)
        if self.capabilities.masks:
            assert "attn_mask" in declared, (
                "masks are declared, and 'attn_mask' is not among extra_inputs: no layer passes it"
            )
        if self.capabilities.returns_lse:
            declared.add("return_lse")
        parameters = inspect.signature(self.backend_cls.get_impl_cls().forward).parameters
        for name in sorted(declared):
            assert name in parameters, f"forward has no parameter {name!r}, which is declared"
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, f"{name!r} is not keyword-only in forward"
            assert parameters[name].default is not inspect.Parameter.empty, f"{name!r} has no default in forward"

    def test_inexact_backend_has_an_oracle(self) -> None:
        """A backend that is not exact brings the float64 oracle that it is held to.

        If this fails: override `oracle()` in the conformance class with the method's reference: dense attention is not what
        this backend computes.
        """
        if self.capabilities.exactness == "exact":
            pytest.skip(f"{self.backend} is exact: dense attention is its oracle")
        assert type(self).oracle is not ConformanceHarness.oracle, (
            f"{self.backend} is {self.capabilities.exactness}, and its conformance class does not override oracle()"
        )

    def test_parameters_are_declared(self) -> None:
        """`trainable_parameters` is declared if and only if the impl is an nn.Module with parameters.

        If this fails: a layer with undeclared parameters misses its weights in checkpoints that it is chosen for; a
        declared one without an nn.Module never gets them into `state_dict`.
        """
        case = self.make_case("cpu", self.declared_dtypes("cpu", every=True)[0], batch=1)
        impl: Any = self.make_impl(case)
        has = isinstance(impl, torch.nn.Module) and any(True for _ in impl.parameters())
        declared = self.capabilities.trainable_parameters
        assert has == declared, f"trainable_parameters={declared} is declared; the impl has {'some' if has else 'none'}"
