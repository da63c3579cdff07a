"""Fixtures of the core's tests: an untouched environment, and backends that are installed for one test."""

import sys
import types
from contextlib import ExitStack

import pytest

from attnmux import BackendSpec, Capabilities, settings
from attnmux.registry import BACKENDS_GROUP, get_registry


@pytest.fixture
def make_backend():
    """Return a function that makes a backend class of a name; its impl returns the values."""
    from attnmux import AttentionImpl, testing

    class Impl(AttentionImpl):
        def forward(self, query, key, value, attn_metadata, **extra_inputs):
            return value

    def make(name, **methods):
        backend = testing.make_backend(name, Impl)
        for method, function in methods.items():
            setattr(backend, method, staticmethod(function))
        return backend

    return make


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def untouched_environment(monkeypatch):
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    settings.global_force_attn_backend(None)
    yield
    settings.global_force_attn_backend(None)


@pytest.fixture
def install(monkeypatch, make_backend):
    """Return a function that registers a backend until the test ends and returns its entry point."""
    from attnmux.testing import FakeDistribution, FakeEntryPoint

    class EntryPoint(FakeEntryPoint):
        """Notes each load; a result that is a function is called."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loads = []

        def load(self):
            self.loads.append(self.name)
            found = super().load()
            return found() if isinstance(found, types.FunctionType) else found

    dense = Capabilities(
        dtypes={"float32", "bfloat16"},
        head_sizes=range(1, 257),
        devices={"cpu", "cuda"},
        cuda_archs={"any"},
        softmax_scale=True,
        exactness="exact",
    )

    with ExitStack() as stack:

        def install_backend(
            name="ALPHA_ATTN",
            *,
            distribution="acme-alpha",
            version="1.0",
            result=None,
            backend=None,
            capabilities=dense,
            group=BACKENDS_GROUP,
            **spec,
        ):
            if result is None:
                module = types.ModuleType(f"fake_{distribution}_{name}".lower().replace("-", "_"))
                module.Backend = backend or make_backend(name)
                monkeypatch.setitem(sys.modules, module.__name__, module)
                spec.setdefault("target", f"{module.__name__}:Backend")
                result = BackendSpec(name, capabilities=capabilities, **spec)
            point = EntryPoint(name, result, group=group, dist=FakeDistribution(distribution, version))
            stack.enter_context(get_registry().temporary_entry_points([point]))
            return point

        yield install_backend
