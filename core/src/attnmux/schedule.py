"""Which backend serves which layer, role and step: a declarative schedule, resolved when layers are built.

    schedule = Schedule(
        default="VIDEO_SPARSE_ATTN",
        rules=(
            Rule("TORCH_SDPA", role="cross"),
            Rule("TORCH_SDPA", layers=(0, 2)),  # the first two layers
            Rule("TORCH_SDPA", steps=(0, 10)),  # the first ten denoising steps
        ),
    )

The first rule that matches decides; a layer that none matches takes the default. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import canonical_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from attnmux.spec import AttentionBackendEnum

__all__ = ["LayerPlan", "Rule", "Schedule"]


@dataclass(frozen=True)
class Rule:
    """One line of a schedule; what is left out matches everything.

    Attributes:
        backend: Backend to use, by member or name, kept as the name in its one spelling.
        role: "self", "cross" or another label of a layer.
        layers: (first, end), end excluded, or None for no end. Layers count from 0; negative numbers count from the end.
        steps: (first, end), end excluded, or None for no end. Denoising steps count from 0.

    Raises:
        UnsupportedRequestError: An interval is malformed or empty; names the field and the value.
    """

    backend: AttentionBackendEnum | str
    role: str | None = None
    layers: tuple[int, int | None] | None = None
    steps: tuple[int, int | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", canonical_name(self.backend))
        for field in ("layers", "steps"):
            interval = getattr(self, field)
            if interval is not None:
                object.__setattr__(self, field, _checked_interval(field, interval))
        if self.steps is not None and (self.steps[0] < 0 or (self.steps[1] or 0) < 0):
            raise UnsupportedRequestError(
                f"steps={self.steps!r}: steps count from 0, and their number is not known in advance; write them without signs"
            )

    def covers_layer(self, layer: int, num_layers: int, role: str) -> bool:
        """Whether the rule is about this layer, at some step."""
        if self.role is not None and self.role != role:
            return False
        if self.layers is None:
            return True
        first, end = (None if edge is None else edge + num_layers * (edge < 0) for edge in self.layers)
        return (first or 0) <= layer < (num_layers if end is None else end)

    def covers_step(self, step: int) -> bool:
        """Whether the rule is about this step."""
        return self.steps is None or (self.steps[0] <= step and (self.steps[1] is None or step < self.steps[1]))

    def __str__(self) -> str:
        conditions = [] if self.role is None else [f"role {self.role}"]
        conditions += [
            f"{field} {first} to {'the end' if end is None else end - 1}"
            for field, interval in (("layers", self.layers), ("steps", self.steps))
            if interval is not None
            for first, end in [interval]
        ]
        return f"{self.backend}: {', '.join(conditions) or 'everything'}"


@dataclass(frozen=True)
class LayerPlan:
    """What a schedule says of one layer.

    Attributes:
        edges: First step of every phase, ascending; the first is 0. The same for all layers of a schedule.
        backends: The layer's backend in every phase; None = whatever selection gives.
    """

    edges: tuple[int, ...]
    backends: tuple[str | None, ...]

    def __str__(self) -> str:
        runs: list[tuple[int, str]] = []
        for edge, backend in zip(self.edges, self.backends, strict=True):
            if not runs or runs[-1][1] != (backend or "automatic"):
                runs.append((edge, backend or "automatic"))
        return ", ".join(backend if edge == 0 else f"{backend} from step {edge}" for edge, backend in runs)


@dataclass(frozen=True)
class Schedule:
    """An ordered set of rules and a default.

    Attributes:
        rules: The first that matches a layer and step decides.
        default: Backend where none matches; None leaves the choice to scope, force, variable and automatic selection.

    Raises:
        UnsupportedRequestError: `rules` holds something else than rules.
    """

    rules: Sequence[Rule] = ()
    default: AttentionBackendEnum | str | None = None

    def __post_init__(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise UnsupportedRequestError(f"rules is a sequence of attnmux.schedule.Rule, got {rule!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.default is not None:
            object.__setattr__(self, "default", canonical_name(self.default))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schedule:
        """Return the schedule of JSON data, `{"default": ..., "rules": [{"backend": ..., "steps": [0, 10]}, ...]}`.

        Raises:
            UnsupportedRequestError: A key is unknown or missing; names it.
        """
        if unknown := sorted(set(plain) - {"default", "rules"}):
            raise UnsupportedRequestError(f"a schedule has the keys 'default' and 'rules', got {', '.join(unknown)}")
        rules = []
        for row in plain.get("rules", ()):
            if unknown := sorted(set(row) - {"backend", "role", "layers", "steps"}):
                raise UnsupportedRequestError(
                    f"a rule has the keys 'backend', 'role', 'layers' and 'steps', got {', '.join(unknown)}"
                )
            if "backend" not in row:
                raise UnsupportedRequestError(f"the rule {dict(row)!r} names no backend")
            rules.append(Rule(**row))
        return cls(tuple(rules), plain.get("default"))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data that `from_dict` reads."""
        rows = [
            {
                "backend": rule.backend,
                "role": rule.role,
                "layers": None if rule.layers is None else list(rule.layers),
                "steps": None if rule.steps is None else list(rule.steps),
            }
            for rule in self.rules
        ]
        return {"default": self.default, "rules": [{k: v for k, v in row.items() if v is not None} for row in rows]}

    @property
    def edges(self) -> tuple[int, ...]:
        """First steps of the phases, intervals in which no layer changes its backend; the first is 0."""
        edges = {0}
        for rule in self.rules:
            edges.update(edge for edge in rule.steps or () if edge is not None)
        return tuple(sorted(edges))

    def resolve(self, layer: int, num_layers: int, role: str) -> LayerPlan:
        """Return the plan of one layer.

        Args:
            layer: Its index, from 0.
            num_layers: How many layers there are.
            role: Its role.
        """
        edges = self.edges
        rules = [rule for rule in self.rules if rule.covers_layer(layer, num_layers, role)]
        backends = (next((rule.backend for rule in rules if rule.covers_step(edge)), self.default) for edge in edges)
        return LayerPlan(edges, tuple(None if name is None else canonical_name(name) for name in backends))

    def explain(self) -> str:
        """Return the rules for a person, in the order in which they are tried."""
        lines = [f"{number}. {rule}" for number, rule in enumerate(self.rules, 1)]
        return "\n".join([*lines, f"otherwise: {self.default or 'as selection gives'}"])


def _checked_interval(field: str, interval: object) -> tuple[int, int | None]:
    pair = tuple(interval) if isinstance(interval, (tuple, list)) else ()
    is_pair = len(pair) == 2 and all(type(edge) is int or (edge is None and at == 1) for at, edge in enumerate(pair))
    if not is_pair:
        raise UnsupportedRequestError(f"{field}={interval!r} must be (first, end), integers, end excluded or None")
    first, end = pair
    if end is not None and (first < 0) == (end < 0) and end <= first:
        raise UnsupportedRequestError(f"{field}={interval!r} holds nothing: the end is excluded")
    return first, end
