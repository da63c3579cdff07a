"""Discovery, isolated loading, conflicts, and the variables that allow or disable."""

import pytest

from attnmux import (
    BackendNotInstalledError,
    BackendSpec,
    BackendUnavailableError,
    PluginApiError,
    PluginConflictError,
    PluginLoadError,
    Reason,
    UnknownBackendError,
    UnsupportedRequestError,
)
from attnmux.registry import Registry, get_registry
from attnmux.settings import read_environment


def test_the_cores_own_backends_are_discovered_like_everyones():
    records = get_registry().records()
    assert str(records["TORCH_SDPA"].claim).startswith("attnmux ")
    assert records["FLASH_ATTN"].claim.entry_point.value == "attnmux.backends.plugin:FLASH_ATTN"


def test_discovery_loads_nothing(install):
    point = install()
    assert "ALPHA_ATTN" in get_registry().records()
    assert point.loads == []


def test_spec_is_loaded_once(install):
    point = install()
    assert get_registry().spec("alpha_attn") is get_registry().spec("ALPHA_ATTN")
    assert point.loads == ["ALPHA_ATTN"]


def wrong_attribute():
    raise AttributeError("module has no SPEC")


BROKEN = {
    "import error": (ImportError("no module named kernels"), "import", PluginLoadError),
    "syntax error": (SyntaxError("invalid syntax"), "import", PluginLoadError),
    "system exit": (SystemExit(3), "import", PluginLoadError),
    "any exception": (wrong_attribute, "import", PluginLoadError),
    "wrong object": ({"name": "ALPHA_ATTN"}, "contract", PluginApiError),
    "wrong api": (BackendSpec("ALPHA_ATTN", target="a:B", api=2), "contract", PluginApiError),
    "wrong name": (BackendSpec("BETA_ATTN", target="a:B"), "contract", PluginApiError),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_spec_is_recorded_and_raises_only_for_its_own_backend(install, case):
    result, phase, kind = BROKEN[case]
    install(result=result, distribution="acme-broken", version="2.1")
    registry = get_registry()
    assert "ALPHA_ATTN" in registry.records()
    assert registry.backend_class("TORCH_SDPA").get_name() == "TORCH_SDPA"
    with pytest.raises(kind, match=r"'ALPHA_ATTN' of acme-broken 2\.1 cannot be loaded") as caught:
        registry.spec("ALPHA_ATTN")
    (failure,) = registry.failures
    assert (failure.distribution, failure.version, failure.phase) == ("acme-broken", "2.1", phase)
    assert caught.value.__cause__ is failure.error
    assert type(failure.error).__name__ in failure.traceback
    assert failure.to_dict()["error"] == failure.cause


def test_api_error_says_what_to_do(install):
    install(result=BackendSpec("ALPHA_ATTN", target="a:B", api=7))
    with pytest.raises(
        PluginApiError, match=r"acme-alpha 1\.0 declares plugin API 7; this attnmux supports 1\. Upgrade"
    ):
        get_registry().spec("ALPHA_ATTN")


def test_name_error_shows_both_names(install):
    install(result=BackendSpec("BETA_ATTN", target="a:B"))
    with pytest.raises(PluginApiError, match="'BETA_ATTN' differs from its entry point's key 'ALPHA_ATTN'"):
        get_registry().spec("ALPHA_ATTN")


def test_keyboard_interrupt_is_not_swallowed(install):
    install(result=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        get_registry().spec("ALPHA_ATTN")


def lacking(method):
    def make(make_backend):
        backend = make_backend("ALPHA_ATTN")
        delattr(backend, method)
        return backend

    return make


CLASSES = {
    "not a class": (lambda make: object(), "not a subclass of attnmux.AttentionBackend"),
    "no get_name": (lacking("get_name"), r"lacks the static method get_name\(\)"),
    "no get_impl_cls": (lacking("get_impl_cls"), r"lacks the static method get_impl_cls\(\)"),
    "no get_metadata_cls": (lacking("get_metadata_cls"), r"lacks the static method get_metadata_cls\(\)"),
    "no get_builder_cls": (lacking("get_builder_cls"), r"lacks the static method get_builder_cls\(\)"),
    "no head sizes": (lacking("get_supported_head_sizes"), r"lacks the static method get_supported_head_sizes\(\)"),
    "other name": (lambda make: make("BETA_ATTN"), r"get_name\(\) is 'BETA_ATTN', the spec's name is 'ALPHA_ATTN'"),
    "wrong impl": (lambda make: make("ALPHA_ATTN", get_impl_cls=lambda: int), r"get_impl_cls\(\) is .*int"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_backend_class_that_breaks_the_contract_is_refused_when_it_is_loaded(install, make_backend, case):
    make, text = CLASSES[case]
    install(backend=make(make_backend))
    assert get_registry().spec("ALPHA_ATTN").name == "ALPHA_ATTN"
    with pytest.raises(PluginApiError, match=text):
        get_registry().backend_class("ALPHA_ATTN")
    assert [failure.phase for failure in get_registry().failures] == ["contract"]


def test_instance_methods_are_refused(install, make_backend):
    backend = make_backend("ALPHA_ATTN")
    backend.get_name = lambda self: "ALPHA_ATTN"
    install(backend=backend)
    with pytest.raises(PluginApiError, match="get_name must be a static method"):
        get_registry().backend_class("ALPHA_ATTN")


def test_target_that_cannot_be_imported_is_a_load_error(install):
    install(target="no_such_package_at_all.backend:Backend")
    with pytest.raises(PluginLoadError, match=r"\(backend\): ModuleNotFoundError"):
        get_registry().backend_class("ALPHA_ATTN")


def test_two_distributions_with_one_name_conflict_and_neither_wins(install):
    install(distribution="acme-alpha")
    install(distribution="other-alpha", version="3.0")
    with pytest.raises(
        PluginConflictError, match=r"registered by acme-alpha 1\.0 and other-alpha 3\.0; neither is used"
    ):
        get_registry().spec("ALPHA_ATTN")


def test_allow_list_resolves_a_conflict(install, monkeypatch):
    install(distribution="acme-alpha", summary="first")
    install(distribution="Other.Alpha", summary="second")
    monkeypatch.setenv("ATTNMUX_PLUGINS", "other-alpha")
    assert get_registry().spec("ALPHA_ATTN").summary == "second"


def test_conflict_hides_no_other_backend(install):
    install(distribution="acme-alpha")
    install(distribution="other-alpha")
    assert get_registry().spec("TORCH_SDPA").name == "TORCH_SDPA"


@pytest.mark.parametrize(
    ("variable", "value"), [("ATTNMUX_DISABLE_PLUGINS", "x, ACME_alpha"), ("ATTNMUX_PLUGINS", "something-else")]
)
def test_disabled_distribution_raises_with_the_variable(install, monkeypatch, variable, value):
    install()
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendUnavailableError, match=f"disabled by {variable}={value}"):
        get_registry().spec("ALPHA_ATTN")
    assert get_registry().records()["ALPHA_ATTN"].enabled == ()


def test_the_core_is_always_allowed(monkeypatch):
    monkeypatch.setenv("ATTNMUX_PLUGINS", "something-else")
    monkeypatch.setenv("ATTNMUX_DISABLE_PLUGINS", "attnmux")
    assert get_registry().spec("TORCH_SDPA").name == "TORCH_SDPA"


def test_known_backend_that_is_not_installed_names_the_pip_command():
    registry = Registry(lambda group: [])
    with pytest.raises(
        BackendNotInstalledError, match=r"'SLA_ATTN' is in the distribution 'attnmux-sla'.*pip install attnmux-sla"
    ):
        registry.spec("SLA_ATTN")


def test_unknown_name_gives_the_closest_ones(install):
    install(aliases=("ALPHABETIC",))
    with pytest.raises(UnknownBackendError, match="unknown attention backend 'alpha_atn'.*Did you mean ALPHA_ATTN"):
        get_registry().resolve("alpha_atn")
    with pytest.raises(UnknownBackendError, match="Did you mean .*ALPHABETIC"):
        get_registry().resolve("alphabetc")


def test_alias_resolves_in_any_case(install):
    install(aliases=("ALPHA",))
    assert get_registry().spec("alpha").name == "ALPHA_ATTN"


def test_alias_of_two_backends_is_a_conflict(install):
    install("ALPHA_ATTN", aliases=("SHORT",))
    install("BETA_ATTN", distribution="acme-beta", aliases=("SHORT",))
    with pytest.raises(PluginConflictError, match="alias 'SHORT' belongs to ALPHA_ATTN and BETA_ATTN"):
        get_registry().resolve("short")


@pytest.mark.parametrize(
    ("requirement", "text"),
    [
        ("no-such-distribution>=2", "requires no-such-distribution>=2, which is not installed"),
        ("pytest>=1000", "requires pytest>=1000, and .* is installed"),
        ("not a requirement!", "cannot be read"),
    ],
)
def test_unmet_requirement_makes_the_backend_unavailable(install, requirement, text):
    install(requires=(requirement,))
    with pytest.raises(BackendUnavailableError, match=text):
        get_registry().backend_class("ALPHA_ATTN")


def test_met_requirement_is_no_obstacle(install):
    install(requires=("pytest>=1", "no-such-thing; python_version < '3'"))
    assert get_registry().backend_class("ALPHA_ATTN").get_name() == "ALPHA_ATTN"


def answers_no():
    return "no such card here"


def answers_reason():
    return Reason("driver", "the driver is too old", "update it")


def answers_yes():
    return None


def raises():
    raise OSError("libcuda.so not found")


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (answers_no, "no such card here"),
        (answers_reason, r"too old \(update it\)"),
        (raises, "raised OSError: libcuda.so"),
    ],
)
def test_probe_that_says_no_makes_the_backend_unavailable(install, monkeypatch, probe, text):
    monkeypatch.setattr("attnmux.errors.probe_for_test", probe, raising=False)
    install(probe="attnmux.errors:probe_for_test")
    with pytest.raises(BackendUnavailableError, match=text):
        get_registry().backend_class("ALPHA_ATTN")


def test_probe_that_says_yes_is_asked_once(install, monkeypatch):
    calls = []
    monkeypatch.setattr("attnmux.errors.probe_for_test", lambda: calls.append(1), raising=False)
    install(probe="attnmux.errors:probe_for_test")
    for _ in range(3):
        get_registry().backend_class("ALPHA_ATTN")
    assert calls == [1]


def test_listing_runs_no_probe_of_a_module_that_is_not_imported(install):
    install(probe="antigravity:fly")
    spec = get_registry().spec("ALPHA_ATTN")
    assert get_registry().obstacle(spec, run_probe=False) is None


def test_strict_raises_for_any_broken_plugin(install, monkeypatch):
    install(result=ImportError("boom"))
    get_registry().check_strict(read_environment())
    monkeypatch.setenv("ATTNMUX_STRICT", "1")
    with pytest.raises(PluginLoadError, match="boom.*ATTNMUX_STRICT is set"):
        get_registry().check_strict(read_environment())


def test_temporary_entry_points_leave_with_the_block(install):
    registry = get_registry()
    generation = registry.generation
    point = install()
    with registry.temporary_entry_points([point]):
        assert registry.records()["ALPHA_ATTN"].is_conflict
    assert not registry.records()["ALPHA_ATTN"].is_conflict
    assert registry.generation > generation


def test_no_attention_needs_no_distribution():
    backend = get_registry().backend_class("NO_ATTENTION")
    impl = backend.get_impl_cls()(num_heads=2, head_size=8)
    with pytest.raises(UnsupportedRequestError, match="built with NO_ATTENTION and has no kernel"):
        impl.forward(None, None, None, None)


def test_distribution_without_metadata_is_still_a_claim(install):
    point = install()
    point.dist = None
    registry = get_registry()
    registry.refresh()
    assert registry.records()["ALPHA_ATTN"].claim.distribution == "unknown"
