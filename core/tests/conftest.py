"""Fixtures of the core's tests: an untouched environment, and backends that are installed for one test."""

import sys
import types
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from attnmux import BackendSpec, Capabilities, settings
from attnmux.registry import BACKENDS_GROUP, get_registry

DENSE = Capabilities(
    dtypes={"float32", "bfloat16"},
    head_sizes=range(1, 257),
    devices={"cpu", "cuda"},
    cuda_archs={"any"},
    softmax_scale=True,
    exactness="exact",
)


@dataclass
class Distribution:
    name: str
    version: str


@dataclass(eq=False)
class EntryPoint:
    name: str
    dist: Distribution
    result: Any
    value: str = "somewhere.plugin:SPEC"
    group: str = BACKENDS_GROUP
    loads: list = field(default_factory=list)

    def load(self):
        self.loads.append(self.name)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result() if callable(self.result) else self.result


def make_backend(name, **methods):
    """A backend class of that name whose impl returns the values."""
    from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata
    from attnmux.backends.dense import DenseMetadataBuilder

    class Impl(AttentionImpl):
        def forward(self, query, key, value, attn_metadata, **extra_inputs):
            return value

    class Backend(AttentionBackend):
        get_name = staticmethod(lambda: name)
        get_impl_cls = staticmethod(lambda: Impl)
        get_metadata_cls = staticmethod(lambda: AttentionMetadata)
        get_builder_cls = staticmethod(lambda: DenseMetadataBuilder)
        get_supported_head_sizes = staticmethod(list)

    for method, function in methods.items():
        setattr(Backend, method, staticmethod(function))
    return Backend


@pytest.fixture(name="make_backend")
def make_backend_fixture():
    return make_backend


@pytest.fixture(autouse=True)
def untouched_environment(monkeypatch):
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    settings.global_force_attn_backend(None)
    yield
    settings.global_force_attn_backend(None)


@pytest.fixture
def install(monkeypatch):
    """Return a function that registers a backend until the test ends and returns its entry point."""
    with ExitStack() as stack:

        def install_backend(
            name="ALPHA_ATTN",
            *,
            distribution="acme-alpha",
            version="1.0",
            result=None,
            backend=None,
            capabilities=DENSE,
            group=BACKENDS_GROUP,
            **spec,
        ):
            if result is None:
                module = types.ModuleType(f"fake_{distribution}_{name}".lower().replace("-", "_"))
                module.Backend = backend or make_backend(name)
                monkeypatch.setitem(sys.modules, module.__name__, module)
                spec.setdefault("target", f"{module.__name__}:Backend")
                result = BackendSpec(name, capabilities=capabilities, **spec)
            point = EntryPoint(name, Distribution(distribution, version), result, group=group)
            stack.enter_context(get_registry().temporary_entry_points([point]))
            return point

        yield install_backend
