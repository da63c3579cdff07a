"""The ranks that share a sequence, and which of them a layer uses."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from attnmux.errors import SequenceParallelError, UnsupportedRequestError
from attnmux.settings import read_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["SPGroup", "as_sp_group", "current_sp", "init_sequence_parallel", "use_sp"]

DEFAULT_TIMEOUT = 120.0
"""Seconds after which a collective or a check gives up."""


@dataclass(frozen=True)
class SPGroup:
    """The ranks that share a sequence.

    Attributes:
        name: Name of the process group in torch; empty for a single rank without one, and where there are two.
        rank: This process's place in it, from 0.
        size: Number of ranks.
        timeout: Seconds that the agreement check waits for another rank.
        checks_every_call: Whether ranks compare what they exchange on every call, not only at the first of each kind.
        ulysses: For the strategy "usp": the ranks around this one that exchange tokens for heads. None = all of them.
        ring: For "usp": the ranks among which keys go around, each in another `ulysses` group. None = none.
        direct: Whether ranks that see each other's memory, as GPUs of one host do, exchange heads by copying from it.
    """

    name: str = ""
    rank: int = 0
    size: int = 1
    timeout: float = DEFAULT_TIMEOUT
    checks_every_call: bool = False
    ulysses: SPGroup | None = None
    ring: SPGroup | None = None
    direct: bool = True

    @classmethod
    def local(cls) -> SPGroup:
        """Return the group of this process alone: nothing is communicated."""
        return cls()

    @classmethod
    def from_group(cls, group: dist.ProcessGroup, *, timeout: float = DEFAULT_TIMEOUT, direct: bool = True) -> SPGroup:
        """Return the group over all ranks of a process group; ATTNMUX_DIST_CHECK is read here.

        Args:
            group: The ranks. The timeout of its collectives is its own.
            timeout: Seconds that the agreement check waits for another rank, > 0.
            direct: See the attribute; False = the group's backend does it all.

        Raises:
            UnsupportedRequestError: The timeout is not positive, or ATTNMUX_DIST_CHECK is neither true nor false.
        """
        if not timeout > 0:
            raise UnsupportedRequestError(f"timeout must be > 0 seconds, got {timeout!r}")
        checks = read_environment().checks_every_exchange
        return cls(group.group_name, group.rank(), group.size(), timeout, checks, direct=direct)

    @classmethod
    def from_groups(
        cls,
        ulysses: dist.ProcessGroup,
        ring: dist.ProcessGroup,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        direct: bool = True,
    ) -> SPGroup:
        """Return the group of the strategy "usp" over two process groups that meet in this rank alone.

        Args:
            ulysses: Ranks that exchange tokens for heads, and hold neighbouring shards.
            ring: Ranks among which keys go around: those in this one's place of the other `ulysses` groups.
            timeout: Seconds that the agreement check waits for another rank, > 0.
            direct: See the attribute; False = the group's backend does it all.

        Raises:
            UnsupportedRequestError: See `from_group`.
        """
        inner, outer = (cls.from_group(group, timeout=timeout, direct=direct) for group in (ulysses, ring))
        rank, size = outer.rank * inner.size + inner.rank, outer.size * inner.size
        return cls("", rank, size, timeout, inner.checks_every_call, inner, outer, direct)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, timeout: float = DEFAULT_TIMEOUT, direct: bool = True) -> SPGroup:
        """Return the group over a mesh, such as a slice `mesh["sp"]` of one that FSDP2 uses too.

        Args:
            mesh: Of one dimension; or of two for the strategy "usp", the ring first and then ulysses, whose ranks are next to
                each other.
            timeout: Seconds that the agreement check waits for another rank, > 0.
            direct: See the attribute; False = the group's backend does it all.

        Raises:
            UnsupportedRequestError: The mesh has another number of dimensions.
        """
        if mesh.ndim == 2:
            return cls.from_groups(mesh.get_group(1), mesh.get_group(0), timeout=timeout, direct=direct)
        if mesh.ndim != 1:
            raise UnsupportedRequestError(
                f"sp_group must be a mesh of one dimension, or of two (ring, ulysses), got {mesh.ndim}; slice it by name"
            )
        return cls.from_group(mesh.get_group(), timeout=timeout, direct=direct)


_default: ContextVar[SPGroup | None] = ContextVar("attnmux_sp_group", default=None)


def current_sp() -> SPGroup:
    """Return the group that layers built here use without `sp_group=`."""
    return _default.get() or SPGroup.local()


def as_sp_group(group: SPGroup | dist.ProcessGroup | DeviceMesh | None) -> SPGroup:
    """Return what a layer's `sp_group=` stands for.

    Raises:
        UnsupportedRequestError: It is none of the types that are taken.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if group is None:
        return current_sp()
    if isinstance(group, SPGroup):
        return group
    if isinstance(group, dist.ProcessGroup):
        return SPGroup.from_group(group)
    if isinstance(group, DeviceMesh):
        return SPGroup.from_mesh(group)
    raise UnsupportedRequestError(
        f"sp_group must be an SPGroup, ProcessGroup or DeviceMesh, got {type(group).__name__}"
    )


@contextmanager
def use_sp(group: SPGroup | dist.ProcessGroup | DeviceMesh) -> Iterator[SPGroup]:
    """Make a group the default of layers that are built inside the block, in this thread or task."""
    token = _default.set(as_sp_group(group))
    try:
        yield current_sp()
    finally:
        _default.reset(token)


def init_sequence_parallel(
    size: int | None = None,
    *,
    ulysses: int | None = None,
    backend: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    direct: bool = True,
) -> SPGroup:
    """Join torch.distributed as `torchrun` says, if that has not happened yet, and set the default group.

    What it initialises it also destroys when the program ends, unless that is by an error.

    Args:
        size: Ranks that share one sequence, a divisor of the world size; None = all. Consecutive ranks form a group.
        ulysses: For the strategy "usp": how many consecutive ranks of these exchange tokens for heads, a divisor of `size`; keys go
            around among the others. None = a group for the other strategies.
        backend: "nccl" or "gloo"; None = NCCL where there is a GPU. Only read when torch.distributed is not initialised.
        timeout: Seconds after which a collective fails.
        direct: Whether ranks that see each other's memory, as GPUs of one host do, exchange heads by copying from it; False = the
            backend does it all.

    Returns:
        The group of this rank.

    Raises:
        UnsupportedRequestError: `size` does not divide the world size, `ulysses` not `size`, or the timeout is not positive.
        SequenceParallelError: The ranks did not meet within the timeout.
    """
    if not timeout > 0:
        raise UnsupportedRequestError(f"timeout must be > 0 seconds, got {timeout!r}")
    limit = datetime.timedelta(seconds=timeout)
    if not dist.is_initialized():
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        device = None
        if backend == "nccl":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(backend, timeout=limit, device_id=device)
        except (RuntimeError, ValueError) as error:
            raise SequenceParallelError(
                f"init_process_group({backend!r}) failed on rank {os.environ.get('RANK', 'unknown')}: {error}; start the "
                "program with torchrun"
            ) from error
        atexit.register(_destroy)
    world = dist.get_world_size()
    size = world if size is None else size
    if size < 1 or world % size:
        raise UnsupportedRequestError(f"size={size} must divide the world size {world}")
    if ulysses is not None and (ulysses < 1 or size % ulysses):
        raise UnsupportedRequestError(f"ulysses={ulysses} must divide the {size} ranks that share a sequence")
    firsts = range(0, world, size)
    if ulysses is None:
        group = _own_group([range(first, first + size) for first in firsts], limit)
        found = SPGroup.from_group(group, timeout=timeout, direct=direct)
    else:
        inner = _own_group([range(first, first + ulysses) for first in range(0, world, ulysses)], limit)
        columns = [range(first + place, first + size, ulysses) for first in firsts for place in range(ulysses)]
        found = SPGroup.from_groups(inner, _own_group(columns, limit), timeout=timeout, direct=direct)
    _default.set(found)
    return found


def _own_group(groups: list[range], limit: datetime.timedelta) -> dist.ProcessGroup:
    """Create the process groups, on every rank all of them, and return the one this rank is in."""
    own: dist.ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=limit)
        if dist.get_rank() in ranks:
            own = group
    assert isinstance(own, dist.ProcessGroup)
    return own


def _destroy() -> None:
    # after an error other ranks may not come, and there is nobody to wait for
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
