"""What a backend's author tests with: the conformance suite, the error rule, seeded inputs, poisoned memory,
fakes, and the tokens of a real clip.

    from attnmux.testing import BackendConformance

    class TestConformance(BackendConformance):
        backend = "MY_ATTN"

Names are loaded on first use, so that pytest can load `attnmux.testing.plugin` without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnmux.testing.check import CheckResult, ConformanceReport, conformance_class, run_conformance
    from attnmux.testing.clip import ClipTokens, clip_tokens
    from attnmux.testing.conformance import BackendConformance, Case, DenseLimit
    from attnmux.testing.fakes import (
        FAKE_CAPABILITIES,
        FakeBackend,
        FakeDistribution,
        FakeEntryPoint,
        FakeImpl,
        installed,
        make_backend,
    )
    from attnmux.testing.inputs import INPUT_SCALES, LAYOUTS, ODD_LENGTHS, AttentionInputs, make_inputs, with_layout
    from attnmux.testing.poison import poisoned_memory
    from attnmux.testing.tolerance import (
        assert_close_to_oracle,
        dense_attention_baseline,
        dense_attention_oracle,
        measure_error,
    )

_HOMES = {
    "attnmux.testing.check": ("CheckResult", "ConformanceReport", "conformance_class", "run_conformance"),
    "attnmux.testing.clip": ("ClipTokens", "clip_tokens"),
    "attnmux.testing.conformance": ("BackendConformance", "Case", "DenseLimit"),
    "attnmux.testing.fakes": (
        "FAKE_CAPABILITIES",
        "FakeBackend",
        "FakeDistribution",
        "FakeEntryPoint",
        "FakeImpl",
        "installed",
        "make_backend",
    ),
    "attnmux.testing.inputs": (
        "INPUT_SCALES",
        "LAYOUTS",
        "ODD_LENGTHS",
        "AttentionInputs",
        "make_inputs",
        "with_layout",
    ),
    "attnmux.testing.poison": ("poisoned_memory",),
    "attnmux.testing.tolerance": (
        "assert_close_to_oracle",
        "dense_attention_baseline",
        "dense_attention_oracle",
        "measure_error",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FAKE_CAPABILITIES",
    "INPUT_SCALES",
    "LAYOUTS",
    "ODD_LENGTHS",
    "AttentionInputs",
    "BackendConformance",
    "Case",
    "CheckResult",
    "ClipTokens",
    "ConformanceReport",
    "DenseLimit",
    "FakeBackend",
    "FakeDistribution",
    "FakeEntryPoint",
    "FakeImpl",
    "assert_close_to_oracle",
    "clip_tokens",
    "conformance_class",
    "dense_attention_baseline",
    "dense_attention_oracle",
    "installed",
    "make_backend",
    "make_inputs",
    "measure_error",
    "poisoned_memory",
    "run_conformance",
    "with_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
