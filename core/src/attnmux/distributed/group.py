"""The ranks that share a sequence, and which of them a layer uses."""

from __future__ import annotations

import datetime
import os
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
        name: Name of the process group in torch; empty for a single rank without one.
        rank: This process's place in it, from 0.
        size: Number of ranks.
        timeout: Seconds that the agreement check waits for another rank.
        checks_every_call: Whether ranks compare what they exchange on every call, not only at the first of each kind.
    """

    name: str = ""
    rank: int = 0
    size: int = 1
    timeout: float = DEFAULT_TIMEOUT
    checks_every_call: bool = False

    @classmethod
    def local(cls) -> SPGroup:
        """Return the group of this process alone: nothing is communicated."""
        return cls()

    @classmethod
    def from_group(cls, group: dist.ProcessGroup, *, timeout: float = DEFAULT_TIMEOUT) -> SPGroup:
        """Return the group over all ranks of a process group; ATTNMUX_DIST_CHECK is read here.

        Args:
            group: The ranks. The timeout of its collectives is its own.
            timeout: Seconds that the agreement check waits for another rank, > 0.

        Raises:
            UnsupportedRequestError: The timeout is not positive, or ATTNMUX_DIST_CHECK is neither true nor false.
        """
        if not timeout > 0:
            raise UnsupportedRequestError(f"timeout must be > 0 seconds, got {timeout!r}")
        return cls(group.group_name, group.rank(), group.size(), timeout, read_environment().checks_every_exchange)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, timeout: float = DEFAULT_TIMEOUT) -> SPGroup:
        """Return the group over a mesh of one dimension, such as a slice `mesh["sp"]` of one that FSDP2 uses too.

        Raises:
            UnsupportedRequestError: The mesh has several dimensions.
        """
        if mesh.ndim != 1:
            raise UnsupportedRequestError(
                f"sp_group must be a mesh of one dimension, got {mesh.ndim} (the strategy 'usp', which would use two, is not "
                "implemented); slice it by name"
            )
        return cls.from_group(mesh.get_group(), timeout=timeout)


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
    size: int | None = None, *, backend: str | None = None, timeout: float = DEFAULT_TIMEOUT
) -> SPGroup:
    """Join torch.distributed as `torchrun` says, if that has not happened yet, and set the default group.

    Args:
        size: Ranks that share one sequence, a divisor of the world size; None = all. Consecutive ranks form a group.
        backend: "nccl" or "gloo"; None = NCCL where there is a GPU. Only read when torch.distributed is not initialised.
        timeout: Seconds after which a collective fails.

    Returns:
        The group of this rank.

    Raises:
        UnsupportedRequestError: `size` does not divide the world size, or the timeout is not positive.
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
    world = dist.get_world_size()
    size = world if size is None else size
    if size < 1 or world % size:
        raise UnsupportedRequestError(f"size={size} must divide the world size {world}")
    own: dist.ProcessGroup | None = None
    # every rank has to create every group
    for first in range(0, world, size):
        group = dist.new_group(list(range(first, first + size)), timeout=limit)
        if first <= dist.get_rank() < first + size:
            own = group
    assert isinstance(own, dist.ProcessGroup)
    found = SPGroup.from_group(own, timeout=timeout)
    _default.set(found)
    return found
