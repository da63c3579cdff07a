"""Ranks tell each other, over the store, what they are about to exchange, before any data moves."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch.distributed import distributed_c10d as c10d

from attnmux.errors import SequenceParallelError

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["agree", "collect"]

# (times collected, descriptions agreed on) of each process group, as long as it lives: an operator knows a group by its name alone,
# and torch gives a name again after all groups were destroyed
_agreements: WeakKeyDictionary[dist.ProcessGroup, tuple[list[int], set[str]]] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup, description: str, timeout: float, every_call: bool) -> None:
    """Return once every rank of the group has given the same description.

    Args:
        group: The ranks.
        description: Lines of the form field=value.
        timeout: Seconds to wait for another rank.
        every_call: Whether to compare also what was compared before.

    Raises:
        SequenceParallelError: A rank gave another description, or none in time; names the rank, and the field.
    """
    _, seen = _agreements.setdefault(group, ([0], set()))
    if description in seen and not every_call:
        return
    rank, own = group.rank(), _fields(description)
    for other, given in enumerate(collect(group, description, timeout, f"agreement before {own.get('operation')}")):
        theirs = _fields(given)
        for field in sorted(set(own) | set(theirs)):
            if own.get(field) != theirs.get(field):
                raise SequenceParallelError(
                    f"group {group.group_name!r}, agreement before {own.get('operation')}: ranks differ in {field}: rank "
                    f"{rank} has {own.get(field)}, rank {other} has {theirs.get(field)}"
                )
    seen.add(description)


def collect(group: dist.ProcessGroup, text: str, timeout: float, purpose: str) -> list[str]:
    """Return what every rank of the group gave, in rank order.

    Args:
        group: The ranks.
        text: What this rank gives.
        timeout: Seconds to wait for another rank.
        purpose: For the error.

    Raises:
        SequenceParallelError: A rank gave nothing in time.
    """
    made, _ = _agreements.setdefault(group, ([0], set()))
    number, made[0] = made[0], made[0] + 1
    store = c10d._world.pg_map[group][1]
    rank, prefix = group.rank(), f"attnmux/{number}"
    store.set(f"{prefix}/{rank}", text)
    given = []
    for other in range(group.size()):
        key = f"{prefix}/{other}"
        try:
            store.wait([key], datetime.timedelta(seconds=timeout))
            given.append(store.get(key).decode())
        except (RuntimeError, ValueError) as error:
            raise SequenceParallelError(
                f"group {group.group_name!r}, {purpose}: rank {rank} waited {timeout:g} s for rank {other}, which did not come; "
                "it died, raised an error, or runs another operation"
            ) from error
    if number:
        # whoever gave something this time had read everything of the time before
        store.delete_key(f"attnmux/{number - 1}/{rank}")
    return given


def _fields(description: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in description.split("\n"))
