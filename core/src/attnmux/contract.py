"""What a plugin must give: checks of its spec, its class and its requirements. No torch until a class is checked."""

from __future__ import annotations

import importlib
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

from attnmux.errors import PluginApiError
from attnmux.spec import SUPPORTED_APIS, BackendSpec

if TYPE_CHECKING:
    from attnmux.backend import AttentionBackend

__all__ = ["checked_class", "checked_spec", "import_target", "unmet_requirement"]


def checked_spec(found: object, key: str, owner: str) -> BackendSpec:
    """Return what an entry point gave, if it is a spec of this API under its own name.

    Args:
        found: What the entry point gave.
        key: Its key, the backend's name.
        owner: Distribution and version, for the message.

    Raises:
        PluginApiError: It is not; says what was found and what to do.
    """
    if not isinstance(found, BackendSpec):
        raise PluginApiError(f"the entry point {key} gives a {type(found).__name__}, not an attnmux.BackendSpec")
    if found.api not in SUPPORTED_APIS:
        supported = ", ".join(map(str, sorted(SUPPORTED_APIS)))
        raise PluginApiError(
            f"{owner} declares plugin API {found.api!r}; this attnmux supports {supported}. Upgrade attnmux, or install "
            "a version of the plugin made for it"
        )
    if found.name != key:
        raise PluginApiError(
            f"the spec's name {found.name!r} differs from its entry point's key {key!r}; make them equal"
        )
    return found


def import_target(target: str) -> Any:
    """Import and return the object at "package.module:name"."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def checked_class(found: object, spec: BackendSpec) -> type[AttentionBackend]:
    """Return a spec's target, if it is a backend class with every static method of the contract.

    The class is never instantiated, so that its abstract methods alone would enforce nothing.

    Raises:
        PluginApiError: It is not; names the method or the class.
    """
    from attnmux.backend import REQUIRED_METHODS, AttentionBackend, AttentionImpl, AttentionMetadata
    from attnmux.backend import AttentionMetadataBuilder as Builder

    if not (isinstance(found, type) and issubclass(found, AttentionBackend)):
        raise PluginApiError(f"{spec.target} is {found!r}, not a subclass of attnmux.AttentionBackend")
    for method in REQUIRED_METHODS:
        static = getattr_static(found, method)
        if not isinstance(static, (staticmethod, classmethod)):
            raise PluginApiError(f"{spec.target}: {method} must be a static method")
        if getattr(static, "__isabstractmethod__", False):
            raise PluginApiError(f"{spec.target} lacks the static method {method}()")
    if found.get_name() != spec.name:
        raise PluginApiError(f"{spec.target}: get_name() is {found.get_name()!r}, the spec's name is {spec.name!r}")
    for method, base in (
        ("get_impl_cls", AttentionImpl),
        ("get_metadata_cls", AttentionMetadata),
        ("get_builder_cls", Builder),
    ):
        cls = getattr(found, method)()
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise PluginApiError(f"{spec.target}: {method}() is {cls!r}, not a subclass of attnmux.{base.__name__}")
    return found


def unmet_requirement(requirement: str) -> str:
    """Return why a PEP 508 requirement is not met, or an empty string."""
    from importlib_metadata import PackageNotFoundError, version
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        parsed = Requirement(requirement)
    except InvalidRequirement as error:
        return f"the requirement {requirement!r} cannot be read: {error}"
    if parsed.marker is not None and not parsed.marker.evaluate():
        return ""
    try:
        found = version(parsed.name)
    except PackageNotFoundError:
        return f"it requires {requirement}, which is not installed"
    if not parsed.specifier.contains(found, prereleases=True):
        return f"it requires {requirement}, and {found} is installed"
    return ""
