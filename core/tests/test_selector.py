"""Precedence, strictness, explanations and the cache."""

import pytest
import torch

from attnmux import (
    AttentionBackendEnum,
    AttentionRequest,
    BackendNotInstalledError,
    BackendUnavailableError,
    Capabilities,
    PluginConflictError,
    PluginLoadError,
    Reason,
    UnknownBackendError,
    UnsupportedRequestError,
    explain,
    get_attn_backend,
    global_force_attn_backend,
    select_backend,
    selector,
    use_backend,
)
from attnmux.registry import get_registry

REQUEST = AttentionRequest(head_size=64, dtype="float32", device="cpu")
CPU = {"dtypes": {"float32"}, "head_sizes": {64}, "devices": {"cpu"}}
EXACT = Capabilities(**CPU, exactness="exact")


def choose(**options):
    return select_backend(REQUEST, **options)


@pytest.fixture
def three(install):
    """Exact backends that name where a choice came from."""
    for name in ("ARG_ATTN", "SCOPE_ATTN", "FORCED_ATTN", "ENV_ATTN", "DEFAULT_ATTN"):
        install(name, distribution=name.lower(), capabilities=EXACT, priority=-5)


def test_precedence_is_argument_scope_force_variable_default_automatic(three, monkeypatch):
    default = {"default_backend": "DEFAULT_ATTN"}
    assert (choose().spec.name, choose().source) == ("TORCH_SDPA", "automatic")
    assert (choose(**default).spec.name, choose(**default).source) == ("DEFAULT_ATTN", "default")
    monkeypatch.setenv("ATTNMUX_BACKEND", "env_attn")
    assert (choose(**default).spec.name, choose(**default).source) == ("ENV_ATTN", "environment")
    global_force_attn_backend("FORCED_ATTN")
    assert (choose(**default).spec.name, choose(**default).source) == ("FORCED_ATTN", "forced")
    with use_backend("SCOPE_ATTN"):
        assert (choose(**default).spec.name, choose(**default).source) == ("SCOPE_ATTN", "scope")
        chosen = choose(backend="arg_attn", **default)
        assert (chosen.spec.name, chosen.source) == ("ARG_ATTN", "argument")


def test_automatic_choice_is_highest_priority_then_name(install):
    install("ZETA_ATTN", distribution="z", capabilities=EXACT, priority=50)
    install("BETA_ATTN", distribution="b", capabilities=EXACT, priority=50)
    assert choose().spec.name == "BETA_ATTN"


@pytest.mark.parametrize("exactness", ["sparse", "linear", "quantized", None])
def test_automatic_choice_is_never_inexact(install, exactness):
    install("ZETA_ATTN", capabilities=Capabilities(**CPU, exactness=exactness), priority=1000)
    assert choose().spec.name == "TORCH_SDPA"
    row = choose().report["ZETA_ATTN"]
    assert row.status == "rejected"
    assert "only exact backends are chosen automatically (name it to use it)" in str(row.reasons[0])
    assert choose(backend="ZETA_ATTN").spec.name == "ZETA_ATTN"


def test_explicit_choice_is_refused_with_every_reason_and_what_can_serve(install, monkeypatch):
    install("ZETA_ATTN", capabilities=EXACT, distribution="zeta")
    # else it depends on what is installed
    monkeypatch.setenv("ATTNMUX_PLUGINS", "attnmux,zeta")
    asked = AttentionRequest(head_size=80, dtype="bfloat16", device="cpu", causal=True)
    with pytest.raises(UnsupportedRequestError) as caught:
        select_backend(asked, backend="ZETA_ATTN")
    assert str(caught.value) == (
        "attention backend 'ZETA_ATTN' cannot serve this request: dtype=bfloat16 (supported: float32); head_size=80 "
        "(supported: 64); causal attention (not supported). Able to serve it: TORCH_SDPA."
    )
    assert [reason.code for reason in caught.value.reasons] == ["dtype", "head_size", "causal"]
    assert caught.value.report["ZETA_ATTN"].status == "rejected"


@pytest.mark.parametrize(
    ("setting", "cited"),
    [("scope", "use_backend"), ("forced", "global_force_attn_backend"), ("env", "ATTNMUX_BACKEND")],
)
def test_refusal_cites_who_named_the_backend(install, monkeypatch, setting, cited):
    install("ZETA_ATTN", capabilities=Capabilities(exactness="exact"))
    if setting == "env":
        monkeypatch.setenv("ATTNMUX_BACKEND", "zeta_attn")
    elif setting == "forced":
        global_force_attn_backend("zeta_attn")
    with (
        use_backend("zeta_attn" if setting == "scope" else None),
        pytest.raises(UnsupportedRequestError, match=rf"'ZETA_ATTN' \(named by {cited}\) cannot serve"),
    ):
        choose(default_backend="TORCH_SDPA")


def test_typo_in_the_variable_names_variable_value_and_closest(monkeypatch):
    monkeypatch.setenv("ATTNMUX_BACKEND", "sla_atn")
    with pytest.raises(UnknownBackendError, match="ATTNMUX_BACKEND='sla_atn'.*Did you mean SLA_ATTN"):
        choose()


def test_known_but_missing_names_the_pip_command():
    if "SLA_ATTN" in get_registry().records():
        pytest.skip("attnmux-sla is installed")
    with pytest.raises(BackendNotInstalledError, match="pip install attnmux-sla") as caught:
        choose(backend=AttentionBackendEnum.SLA_ATTN)
    assert caught.value.report["SLA_ATTN"].status == "not_installed"


def test_allow_list_refuses_an_explicit_choice_naming_both(install):
    install("ZETA_ATTN", capabilities=EXACT)
    with pytest.raises(
        UnsupportedRequestError, match="'ZETA_ATTN' cannot serve.*the layer allows TORCH_SDPA, SLA_ATTN only"
    ):
        choose(backend="ZETA_ATTN", supported=["torch_sdpa", AttentionBackendEnum.SLA_ATTN])


def test_allow_list_restricts_automatic_choice_and_takes_aliases(install):
    install("ZETA_ATTN", capabilities=EXACT, priority=-7, aliases=("ZETA",))
    assert choose(supported=["zeta"]).spec.name == "ZETA_ATTN"


def test_empty_allow_list_is_refused():
    with pytest.raises(UnsupportedRequestError, match="supported_attention_backends is empty"):
        choose(supported=[])


def test_allow_list_that_is_a_string_is_refused():
    with pytest.raises(UnsupportedRequestError, match=r"got the string 'TORCH_SDPA'; write \['TORCH_SDPA'\]"):
        choose(supported="TORCH_SDPA")


@pytest.mark.parametrize("default", ["SAGE_ATTN", "NOBODY_ATTN", "ZETA_ATTN"])
def test_default_that_cannot_serve_gives_way_with_the_reason_in_the_report(install, default):
    if default in get_registry().records():
        pytest.skip(f"{default} is installed")
    install("ZETA_ATTN", capabilities=Capabilities(exactness="exact"))
    chosen = choose(default_backend=default)
    assert (chosen.spec.name, chosen.source) == ("TORCH_SDPA", "automatic")
    assert "it is the layer's default and cannot serve" in str(chosen.report[default].reasons[0])


def test_default_outside_the_allow_list_gives_way(install):
    install("ZETA_ATTN", capabilities=EXACT)
    assert choose(default_backend="ZETA_ATTN", supported=["TORCH_SDPA"]).spec.name == "TORCH_SDPA"


def test_sparse_default_is_honoured(install):
    install("ZETA_ATTN", capabilities=Capabilities(**CPU, exactness="sparse"))
    assert choose(default_backend="ZETA_ATTN").source == "default"


def test_nothing_able_lists_every_candidate_with_its_reasons():
    asked = AttentionRequest(head_size=64, dtype="float32", device="xpu")
    with pytest.raises(UnsupportedRequestError, match=r"no exact attention backend(.|\n)*device=xpu") as caught:
        select_backend(asked)
    assert caught.value.report.selected is None
    report = explain(asked)
    assert report.to_dict()["candidates"] == caught.value.report.to_dict()["candidates"]


def test_explain_without_a_report_raises():
    with pytest.raises(UnknownBackendError):
        explain(REQUEST, backend="NOBODY_ATTN")


def test_status_of_every_kind_of_candidate(install, monkeypatch):
    install("BROKEN_ATTN", distribution="broken", result=ImportError("boom"))
    install("TWICE_ATTN", distribution="one")
    install("TWICE_ATTN", distribution="two")
    install("OFF_ATTN", distribution="off")
    install("NEEDY_ATTN", distribution="needy", requires=("no-such-distribution",))
    install("UNFIT_ATTN", distribution="unfit", capabilities=Capabilities(exactness="exact"))
    install("SPARE_ATTN", distribution="spare", capabilities=EXACT, priority=-9)
    monkeypatch.setenv("ATTNMUX_DISABLE_PLUGINS", "off")
    report = choose(supported=None).report
    found = {row.backend: row.status for row in report.candidates}
    assert found["TORCH_SDPA"] == "selected"
    assert {name: found[name] for name in found if name.split("_")[0] in {"BROKEN", "TWICE", "OFF", "NEEDY", "UNFIT", "SPARE"}} == {
        "BROKEN_ATTN": "failed",
        "TWICE_ATTN": "conflict",
        "OFF_ATTN": "disabled",
        "NEEDY_ATTN": "unavailable",
        "UNFIT_ATTN": "rejected",
        "SPARE_ATTN": "eligible",
    }  # fmt: skip
    assert report["TWICE_ATTN"].distribution == "one and two"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"result": ImportError("boom")}, PluginLoadError, "boom"),
        ({"target": "no_such_package_at_all:B"}, PluginLoadError, "no_such_package_at_all"),
        ({"requires": ("no-such-distribution",)}, BackendUnavailableError, "cannot run here.*Run: pip install"),
    ],
)
def test_backend_that_cannot_be_used_raises_when_it_is_asked_for(install, options, error, text):
    install("ZETA_ATTN", **options)
    assert choose().spec.name == "TORCH_SDPA"
    with pytest.raises(error, match=text) as caught:
        choose(backend="ZETA_ATTN")
    assert caught.value.report["ZETA_ATTN"].status in {"failed", "unavailable"}


def test_backend_that_fails_to_import_never_wins_automatically(install):
    install("ZETA_ATTN", priority=1000, target="no_such_package_at_all:B")
    assert choose().spec.name == "TORCH_SDPA"
    assert choose().report["ZETA_ATTN"].status == "failed"


def test_conflict_raises_when_it_is_asked_for(install):
    install("ZETA_ATTN", distribution="one")
    install("ZETA_ATTN", distribution="two")
    with pytest.raises(PluginConflictError, match="one 1.0 and two 1.0"):
        choose(backend="ZETA_ATTN")


def test_disabled_backend_raises_with_the_variable(install, monkeypatch):
    install("ZETA_ATTN", distribution="acme")
    monkeypatch.setenv("ATTNMUX_DISABLE_PLUGINS", "acme")
    with pytest.raises(BackendUnavailableError, match="ATTNMUX_DISABLE_PLUGINS=acme"):
        choose(backend="ZETA_ATTN")


def test_strict_stops_every_selection(install, monkeypatch):
    install("BROKEN_ATTN", result=ImportError("boom"))
    monkeypatch.setenv("ATTNMUX_STRICT", "1")
    with pytest.raises(PluginLoadError, match="boom"):
        choose()


def test_backends_own_check_rejects_with_its_reason(install, make_backend):
    backend = make_backend("ZETA_ATTN", check_request=lambda request: [Reason("moon", "wrong phase of the moon")])
    install("ZETA_ATTN", backend=backend, capabilities=EXACT, priority=9)
    assert choose().spec.name == "TORCH_SDPA"
    with pytest.raises(UnsupportedRequestError, match="wrong phase of the moon"):
        choose(backend="ZETA_ATTN")


def test_engine_is_shown_for_the_selected(install, make_backend):
    install(
        "ZETA_ATTN",
        backend=make_backend("ZETA_ATTN", describe_engine=lambda request: "engine 4 of 5"),
        capabilities=EXACT,
    )
    assert "engine 4 of 5" in choose(backend="ZETA_ATTN").explain()
    assert choose(backend="ZETA_ATTN").engine == "engine 4 of 5"


def test_error_repeats_the_reports_reasons_about_a_backend(install):
    install("ZETA_ATTN", capabilities=Capabilities(**CPU, exactness="exact"))
    with pytest.raises(UnsupportedRequestError) as caught:
        select_backend(AttentionRequest(head_size=80, dtype="float32", device="cpu", causal=True), backend="ZETA_ATTN")
    assert caught.value.reasons_about("ZETA_ATTN") == "head_size=80 (supported: 64); causal attention (not supported)"
    assert UnsupportedRequestError("plain").reasons_about("ZETA_ATTN") == "plain"


def test_no_attention_is_chosen_by_name_only():
    assert choose(backend="no_attention").spec.name == "NO_ATTENTION"
    assert "NO_ATTENTION" not in [row.backend for row in choose().report.candidates]


def test_cached_selection_is_the_same_object_until_an_input_changes(install, monkeypatch):
    first = choose()
    assert choose() is first
    assert select_backend(AttentionRequest(head_size=64, dtype="float32", device="cpu", causal=True)) is not first
    monkeypatch.setenv("ATTNMUX_DISABLE_PLUGINS", "x")
    assert choose() is not first
    monkeypatch.delenv("ATTNMUX_DISABLE_PLUGINS")
    assert choose() is first
    install("ZETA_ATTN", capabilities=EXACT, priority=1000)
    assert choose().spec.name == "ZETA_ATTN"


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(selector, "_CACHE_LIMIT", 4)
    for size in range(1, 20):
        select_backend(AttentionRequest(head_size=size, dtype="float32", device="cpu"))
    assert len(selector._cache) <= 4


def test_get_attn_backend_returns_the_class():
    assert get_attn_backend(64, torch.float32).get_name() == "TORCH_SDPA"
    assert get_attn_backend(64, "float32", ["TORCH_SDPA"]).get_name() == "TORCH_SDPA"
    assert get_attn_backend(64, torch.float32, request=REQUEST).get_name() == "TORCH_SDPA"


def test_request_that_disagrees_with_the_arguments_is_refused():
    with pytest.raises(
        UnsupportedRequestError, match="request= says head_size=64, dtype=float32; the arguments say head_size=128"
    ):
        get_attn_backend(128, torch.float32, request=REQUEST)


def test_report_as_text_and_data():
    report = choose().report
    text = report.explain()
    assert text.startswith("request: head_size=64, dtype=float32, device=cpu\nselected: TORCH_SDPA (automatic choice)")
    data = report.to_dict()
    assert data["source"] == "automatic"
    assert data["request"]["head_size"] == 64
    assert set(data["candidates"][0]) == {"backend", "distribution", "version", "status", "reasons", "hint"}
    with pytest.raises(KeyError):
        report["NOBODY_ATTN"]


def test_backend_that_declares_too_little_is_rejected_without_importing_it(install):
    install("ZETA_ATTN", capabilities=Capabilities(exactness="exact"), target="no_such_package_at_all:B")
    assert choose().report["ZETA_ATTN"].status == "rejected"
    with pytest.raises(UnsupportedRequestError, match="device=cpu"):
        choose(backend="ZETA_ATTN")
