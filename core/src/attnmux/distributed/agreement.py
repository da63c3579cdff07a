"""Ranks compare what they are about to exchange, over the store, before any data moves."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch.distributed import distributed_c10d as c10d

from attnmux.errors import SequenceParallelError

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["agree"]

# (checks made, descriptions agreed on) of each process group, as long as it lives: an operator knows a group by its name alone, and
# torch gives a name again after all groups were destroyed
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
    made, seen = _agreements.setdefault(group, ([0], set()))
    if description in seen and not every_call:
        return
    number, made[0] = made[0], made[0] + 1
    store = c10d._world.pg_map[group][1]
    rank, prefix = group.rank(), f"attnmux/{number}"
    store.set(f"{prefix}/{rank}", description)
    own = _fields(description)
    for other in range(group.size()):
        key = f"{prefix}/{other}"
        try:
            store.wait([key], datetime.timedelta(seconds=timeout))
            theirs = _fields(store.get(key).decode())
        except (RuntimeError, ValueError) as error:
            raise SequenceParallelError(
                f"group {group.group_name!r}, agreement before {own.get('operation')}: rank {rank} waited {timeout:g} s for "
                f"rank {other}, which did not come; it died, raised an error, or runs another operation"
            ) from error
        for field in sorted(set(own) | set(theirs)):
            if own.get(field) != theirs.get(field):
                raise SequenceParallelError(
                    f"group {group.group_name!r}, agreement before {own.get('operation')}: ranks differ in {field}: rank "
                    f"{rank} has {own.get(field)}, rank {other} has {theirs.get(field)}"
                )
    seen.add(description)
    if number:
        # whoever described itself this time had read everything of the time before
        store.delete_key(f"attnmux/{number - 1}/{rank}")


def _fields(description: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in description.split("\n"))
