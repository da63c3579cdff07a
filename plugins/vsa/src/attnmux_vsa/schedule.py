"""How sparse each step and each layer is, as data."""

from __future__ import annotations

from dataclasses import dataclass

from attnmux.errors import UnsupportedRequestError

__all__ = ["SparsitySchedule"]


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """Sparsity by denoising or training step, and the layers that stay dense.

    Attributes:
        sparsity: Fraction of key tiles left out once the ramp is over, in [0, 1].
        dense_steps: Steps from 0 on that keep every tile, >= 0.
        ramp_steps: Steps after these over which the sparsity rises, >= 0: step i of n has (i + 1) / (n + 1) of it.
        dense_layers: Indices of layers that keep every tile at every step, each >= 0.

    Raises:
        UnsupportedRequestError: A field is out of its range; the message names it.
    """

    sparsity: float
    dense_steps: int = 0
    ramp_steps: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise UnsupportedRequestError(f"sparsity={self.sparsity!r} must lie in [0, 1]")
        for name in ("dense_steps", "ramp_steps"):
            if not _is_count(getattr(self, name)):
                raise UnsupportedRequestError(f"{name}={getattr(self, name)!r} must be an integer >= 0")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        if not all(map(_is_count, self.dense_layers)):
            raise UnsupportedRequestError(f"dense_layers={self.dense_layers!r} must be integers >= 0")

    def at(self, step: int) -> float:
        """Return the sparsity of a step, counted from 0."""
        ramped = step - self.dense_steps
        if ramped < 0:
            return 0.0
        if ramped < self.ramp_steps:
            return self.sparsity * (ramped + 1) / (self.ramp_steps + 1)
        return self.sparsity


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
