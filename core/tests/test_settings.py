"""Variables, force and scope."""

import asyncio
import threading

import pytest

from attnmux import AttentionBackendEnum, UnsupportedRequestError, settings
from attnmux.settings import (
    get_env_variable_attn_backend,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
    read_environment,
    scoped_backend,
    use_backend,
)


def test_variable_gives_the_member_in_any_case(monkeypatch):
    assert get_env_variable_attn_backend() is None
    monkeypatch.setenv("ATTNMUX_BACKEND", "sla_attn")
    assert get_env_variable_attn_backend() is AttentionBackendEnum.SLA_ATTN


def test_variable_of_an_out_of_tree_name_gives_none(monkeypatch):
    monkeypatch.setenv("ATTNMUX_BACKEND", "MY_ATTN")
    assert get_env_variable_attn_backend() is None


def test_blank_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("ATTNMUX_BACKEND", "  ")
    assert read_environment().backend is None


def test_cheap_key_follows_the_environment(monkeypatch):
    before = settings.raw_environment()
    for variable in settings.VARIABLES:
        monkeypatch.setenv(variable, "1")
        after = settings.raw_environment()
        assert after != before
        before = after


@pytest.mark.parametrize(("word", "strict"), [("1", True), ("TRUE", True), ("0", False), ("off", False)])
def test_strict_reads_true_and_false_words(monkeypatch, word, strict):
    monkeypatch.setenv("ATTNMUX_STRICT", word)
    assert read_environment().is_strict is strict


@pytest.mark.parametrize(("word", "checks"), [("1", True), ("On", True), ("0", False), ("", False)])
def test_dist_check_reads_true_and_false_words(monkeypatch, word, checks):
    monkeypatch.setenv("ATTNMUX_DIST_CHECK", word)
    assert read_environment().checks_every_exchange is checks


def test_dist_check_refuses_other_words(monkeypatch):
    monkeypatch.setenv("ATTNMUX_DIST_CHECK", "maybe")
    with pytest.raises(UnsupportedRequestError, match="ATTNMUX_DIST_CHECK='maybe' is neither true nor false"):
        _ = read_environment().checks_every_exchange


def test_strict_refuses_other_words(monkeypatch):
    monkeypatch.setenv("ATTNMUX_STRICT", "maybe")
    with pytest.raises(UnsupportedRequestError, match="ATTNMUX_STRICT='maybe' is neither true nor false"):
        _ = read_environment().is_strict


def test_force_keeps_members_and_out_of_tree_names():
    global_force_attn_backend("torch_sdpa")
    assert get_global_forced_attn_backend() is AttentionBackendEnum.TORCH_SDPA
    global_force_attn_backend("my_attn")
    assert get_global_forced_attn_backend() == "MY_ATTN"
    with pytest.raises(UnsupportedRequestError, match="got 3"):
        global_force_attn_backend(3)
    assert get_global_forced_attn_backend() == "MY_ATTN"


def test_force_manager_nests_and_restores_after_an_exception():
    with global_force_attn_backend_context_manager("SLA_ATTN"):
        with pytest.raises(KeyError), global_force_attn_backend_context_manager("VMOBA_ATTN"):
            assert get_global_forced_attn_backend() is AttentionBackendEnum.VMOBA_ATTN
            raise KeyError
        assert get_global_forced_attn_backend() is AttentionBackendEnum.SLA_ATTN
    assert get_global_forced_attn_backend() is None


def test_scope_nests_and_restores_after_an_exception():
    with use_backend("sla_attn"):
        with pytest.raises(KeyError), use_backend(AttentionBackendEnum.VMOBA_ATTN):
            assert scoped_backend() == "VMOBA_ATTN"
            raise KeyError
        with use_backend(None):
            assert scoped_backend() is None
        assert scoped_backend() == "SLA_ATTN"
    assert scoped_backend() is None


def test_scope_stays_in_its_thread():
    seen = []
    with use_backend("SLA_ATTN"):
        thread = threading.Thread(target=lambda: seen.append(scoped_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_scope_stays_in_its_task():
    async def choose(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return scoped_backend()

    async def both():
        return await asyncio.gather(choose("SLA_ATTN"), choose("VMOBA_ATTN"))

    assert asyncio.run(both()) == ["SLA_ATTN", "VMOBA_ATTN"]
