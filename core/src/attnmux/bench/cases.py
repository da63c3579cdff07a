"""What is measured, as data."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from attnmux.errors import UnsupportedRequestError

__all__ = ["DENSE_CASES", "DIRECTIONS", "Case", "parse_shape"]

DIRECTIONS = ("forward", "backward")

_SMALL_LENGTH, _SMALL_HEADS, _SMALL_HEAD_SIZE = 384, 4, 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call to measure.

    Attributes:
        name: Short words with underscores, such as "dense_causal"; several cases may share one.
        B: Samples, >= 1.
        S_q: Tokens of q, >= 1.
        S_k: Tokens of k and v; 0 = `S_q`.
        H: Heads of q.
        H_kv: Heads of k and v, a divisor of `H`; 0 = `H`.
        D: Channels of one head.
        dtype: Of q, k and v, such as "bfloat16".
        causal: Whether a query sees only keys up to its own position.
        directions: What is measured: some of "forward", "backward".
        keep: Fraction of the keys that a query attends to, in (0, 1].
        block_q: Tokens of one query block; 0 where there are no blocks.
        block_k: Tokens of one key block, likewise.
        lists: How blocks are chosen, a word of the plugin's own, such as "random"; empty where there are none.

    Raises:
        UnsupportedRequestError: A field is out of its range; the message names the field and the value.
    """

    name: str
    B: int = 1
    S_q: int
    S_k: int = 0
    H: int = 12
    H_kv: int = 0
    D: int = 128
    dtype: str = "bfloat16"
    causal: bool = False
    directions: tuple[str, ...] = DIRECTIONS
    keep: float = 1.0
    block_q: int = 0
    block_k: int = 0
    lists: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "S_k", self.S_k or self.S_q)
        object.__setattr__(self, "H_kv", self.H_kv or self.H)
        for field in ("B", "S_q", "S_k", "H", "H_kv", "D"):
            if getattr(self, field) < 1:
                raise UnsupportedRequestError(
                    f"case {self.name!r}: {field} must be at least 1, got {getattr(self, field)!r}"
                )
        if self.H % self.H_kv:
            raise UnsupportedRequestError(f"case {self.name!r}: H={self.H} is not a multiple of H_kv={self.H_kv}")
        if not 0 < self.keep <= 1:
            raise UnsupportedRequestError(f"case {self.name!r}: keep must be in (0, 1], got {self.keep!r}")
        if unknown := set(self.directions) - set(DIRECTIONS):
            raise UnsupportedRequestError(
                f"case {self.name!r}: unknown directions {sorted(unknown)}; expected some of {DIRECTIONS}"
            )

    @property
    def blocks(self) -> str:
        """Query block x key block, such as "128x64"; empty where there are no blocks."""
        return f"{self.block_q}x{self.block_k}" if self.block_q else ""

    def with_shape(self, shape: tuple[int, int, int, int]) -> Case:
        """Return the case with another (B, S, H, D); queries per key head are kept where they divide the heads."""
        batch, length, heads, head_size = shape
        group = self.H // self.H_kv
        return dataclasses.replace(
            self,
            B=batch,
            S_q=length,
            S_k=length,
            H=heads,
            H_kv=heads // group if heads % group == 0 else heads,
            D=head_size,
        )

    def shrunk(self) -> Case:
        """Return the case small enough for a CPU: the same ragged end, the same group of heads, a few blocks."""
        group = min(self.H // self.H_kv, _SMALL_HEADS)
        heads = min(self.H, group * max(1, _SMALL_HEADS // group))

        def length(tokens: int) -> int:
            return min(tokens, _SMALL_LENGTH + tokens % 128)

        return dataclasses.replace(
            self,
            S_q=length(self.S_q),
            S_k=length(self.S_k) if self.S_k == self.S_q else min(self.S_k, 128 + self.S_k % 128),
            H=heads,
            H_kv=max(1, heads // group),
            D=min(self.D, _SMALL_HEAD_SIZE),
        )


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Return (B, S, H, D) from "1,32768,12,128".

    Raises:
        UnsupportedRequestError: The text is not four positive numbers.
    """
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*){3}", text):
        raise UnsupportedRequestError(
            f"shape {text!r} is not B,S,H,D: four whole numbers of at least 1, such as 1,32768,12,128"
        )
    batch, length, heads, head_size = (int(number) for number in text.split(","))
    return batch, length, heads, head_size


DENSE_CASES = (
    Case(name="dense", S_q=4096),
    Case(name="dense", S_q=16384),
    Case(name="dense", S_q=32768),
    Case(name="dense", S_q=16384, D=64),
    Case(name="dense_causal", S_q=16384, causal=True),
    Case(name="dense_gqa", S_q=16384, H_kv=3),
    Case(name="dense_ragged", S_q=16300),
    Case(name="dense_cross", S_q=32768, S_k=512),
)
"""What is measured of a backend that computes exact attention and has no cases of its own."""
