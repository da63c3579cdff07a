"""Loads the hook modules of the `attnmux.plugins` group and calls their hooks one by one, each in isolation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from attnmux.registry import PLUGINS_GROUP, Claim, LoadFailure, Registry, disabling_variable

if TYPE_CHECKING:
    import pluggy

    from attnmux.settings import EnvironmentSnapshot

__all__ = ["HookRunner", "get_hook_runner"]


class HookRunner:
    """Hook implementations of the enabled distributions.

    pluggy checks the signatures. Its own multi-call stops at the first exception, so implementations are called singly:
    one that raises is recorded with the registry and the others go on.
    """

    def __init__(self, registry: Registry, environment: EnvironmentSnapshot) -> None:
        self._registry = registry
        self._claims: dict[str, Claim] = {}
        self._manager: pluggy.PluginManager | None = None
        for key, claim in registry.claims(PLUGINS_GROUP):
            if disabling_variable(claim.distribution, environment) is None:
                self._register(key, claim)

    def _register(self, key: str, claim: Claim) -> None:
        module = self._registry.guard(claim, key, "import", claim.entry_point.load)
        if isinstance(module, LoadFailure):
            return
        if self._manager is None:
            # pluggy takes 15 ms to import; most installations have no hooks
            import pluggy

            from attnmux.hookspecs import PROJECT, AttnmuxHooks

            self._manager = pluggy.PluginManager(PROJECT)
            self._manager.add_hookspecs(AttnmuxHooks)
        manager, name = self._manager, f"{claim.distribution}:{key}"
        if not isinstance(
            self._registry.guard(claim, key, "contract", lambda: manager.register(module, name)), LoadFailure
        ):
            self._claims[name] = claim

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Return the answers to a hook that are not None, the last registered implementation first."""
        if self._manager is None:
            return []
        answers = []
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            claim = self._claims[implementation.plugin_name]
            chosen = {name: arguments[name] for name in implementation.argnames}
            answer = self._registry.guard(
                claim,
                claim.entry_point.name,
                f"hook {hook}",
                partial(implementation.function, **chosen),
            )
            if answer is not None and not isinstance(answer, LoadFailure):
                answers.append(answer)
        return answers


_runners: dict[tuple[int, int, EnvironmentSnapshot], HookRunner] = {}


def get_hook_runner(registry: Registry, environment: EnvironmentSnapshot) -> HookRunner:
    """Return the runner for a registry as it is now, made once."""
    key = (id(registry), registry.generation, environment)
    if key not in _runners:
        _runners.clear()
        _runners[key] = HookRunner(registry, environment)
    return _runners[key]
