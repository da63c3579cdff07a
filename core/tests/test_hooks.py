"""Behaviour hooks: rank, veto, observe; each isolated."""

import types

import pytest

from attnmux import AttentionRequest, Capabilities, UnsupportedRequestError, hookimpl, select_backend
from attnmux.hooks import get_hook_runner
from attnmux.registry import PLUGINS_GROUP, get_registry
from attnmux.settings import read_environment

REQUEST = AttentionRequest(head_size=64, dtype="float32", device="cpu")
EXACT = Capabilities(dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, exactness="exact")


def module_of(**hooks):
    module = types.SimpleNamespace()
    for name, function in hooks.items():
        function.__name__ = name
        setattr(module, name, hookimpl(function))
    return module


@pytest.fixture
def hook(install):
    def install_hook(name="acme", distribution="acme-hooks", **hooks):
        return install(name, distribution=distribution, result=module_of(**hooks), group=PLUGINS_GROUP)

    return install_hook


def test_rank_reorders_the_automatic_choice(install, hook):
    install("ZETA_ATTN", capabilities=EXACT, priority=-50)
    seen = []

    def rank(request, candidates):
        seen.append(candidates)
        return ["not_a_candidate", "zeta_attn"]

    hook(attnmux_rank=rank)
    assert select_backend(REQUEST).spec.name == "ZETA_ATTN"
    assert seen == [("TORCH_SDPA", "ZETA_ATTN")]


def test_rank_cannot_bring_in_an_inexact_backend(install, hook):
    install(
        "ZETA_ATTN", capabilities=Capabilities(dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, exactness="sparse")
    )
    hook(attnmux_rank=lambda candidates: ["ZETA_ATTN"])
    assert select_backend(REQUEST).spec.name == "TORCH_SDPA"


def test_veto_rejects_with_its_reason(install, hook):
    install("ZETA_ATTN", capabilities=EXACT, priority=50)
    hook(attnmux_veto=lambda request, backend: "not today" if backend == "ZETA_ATTN" else None)
    assert select_backend(REQUEST).spec.name == "TORCH_SDPA"
    with pytest.raises(UnsupportedRequestError, match="a hook forbids it: not today"):
        select_backend(REQUEST, backend="ZETA_ATTN")


def test_observer_sees_each_new_selection_once(hook):
    seen = []
    hook(attnmux_selected=lambda report: seen.append(report.selected.backend))
    select_backend(REQUEST)
    select_backend(REQUEST)
    assert seen == ["TORCH_SDPA"]


def failing(report):
    raise SystemExit(9)


def test_hook_that_raises_is_recorded_and_the_others_go_on(hook):
    seen = []
    hook("good", attnmux_selected=lambda report: seen.append(1))
    hook("bad", distribution="acme-bad", attnmux_selected=failing)
    assert select_backend(REQUEST).spec.name == "TORCH_SDPA"
    assert seen == [1]
    (failure,) = get_registry().failures
    assert (failure.distribution, failure.phase, failure.cause) == (
        "acme-bad",
        "hook attnmux_selected",
        "SystemExit: 9",
    )


def test_module_that_cannot_be_imported_is_recorded(install):
    install("acme", distribution="acme-hooks", result=ImportError("boom"), group=PLUGINS_GROUP)
    assert select_backend(REQUEST).spec.name == "TORCH_SDPA"
    assert [failure.phase for failure in get_registry().failures] == ["import"]


def test_hook_with_a_wrong_signature_is_recorded(hook):
    hook(attnmux_veto=lambda request, colour: None)
    assert select_backend(REQUEST).spec.name == "TORCH_SDPA"
    (failure,) = get_registry().failures
    assert failure.phase == "contract"
    assert "colour" in failure.cause


def test_disabled_distribution_runs_no_hooks(hook, monkeypatch):
    point = hook(attnmux_veto=lambda backend: "never")
    monkeypatch.setenv("ATTNMUX_DISABLE_PLUGINS", "acme-hooks")
    assert select_backend(REQUEST).spec.name == "TORCH_SDPA"
    assert point.loads == []


def test_cli_hook_receives_the_app(hook):
    seen = []
    hook(attnmux_cli=lambda app: seen.append(app))
    get_hook_runner(get_registry(), read_environment()).call("attnmux_cli", app="the app")
    assert seen == ["the app"]
