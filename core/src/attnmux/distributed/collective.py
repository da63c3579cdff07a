"""What is underneath: ranks agree first, what is sent is counted, and an error says who, what and where."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import importlib_metadata
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_work
from torch.distributed import distributed_c10d as c10d

from attnmux.distributed.agreement import agree
from attnmux.distributed.direct import Elements, direct_of
from attnmux.errors import SequenceParallelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnmux.distributed.group import SPGroup

__all__ = [
    "Pending",
    "Traffic",
    "add_fields",
    "all_gather",
    "all_to_all",
    "arrived",
    "begin_all_to_all",
    "count_traffic",
    "describe",
    "exchange",
    "start_all_to_all",
    "taken",
]


@dataclass
class Traffic:
    """What this rank sent while it was counted.

    Attributes:
        collectives: Number of collectives.
        elements_sent: Elements sent to other ranks.
        bytes_sent: Their bytes.
    """

    collectives: int = 0
    elements_sent: int = 0
    bytes_sent: int = 0


_VERSION = importlib_metadata.version("attnmux")

# on one line: inductor copies what operators are given into comments of the code it makes
_SEPARATOR = "; "

_counters: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process exchanges inside the block, backward passes included."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        # by identity: equal counts of a nested block are another object
        _counters[:] = [other for other in _counters if other is not traffic]


def describe(group: SPGroup, fields: dict[str, object]) -> str:
    """Return the settings of an exchange as one string, which a compiled graph holds as a constant: the group, its timeout,
    whether to check every call and to copy directly, and what the ranks have to agree on but for sizes, which may change from
    call to call.
    """
    of_group = group.name, group.timeout, group.checks_every_call, group.direct
    return add_fields(_SEPARATOR.join(map(str, of_group)), fields)


def add_fields(settings: str, fields: dict[str, object]) -> str:
    """Return settings with more that the ranks have to agree on."""
    return _SEPARATOR.join([settings, *(f"{name}={value}" for name, value in fields.items())])


class _Settings:
    """What `describe` wrote."""

    def __init__(self, text: str) -> None:
        name, timeout, checks_every_call, direct, *self.fields = text.split(_SEPARATOR)
        self.group: dist.ProcessGroup = c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
        self.timeout = float(timeout)
        self.checks_every_call = checks_every_call == "True"
        self.direct = direct == "True"


@dataclass(frozen=True)
class Pending:
    """A collective under way.

    Attributes:
        received: What it fills.
        work: Torch's handle.
        failed: Start of the message if it fails.
    """

    received: torch.Tensor
    work: Any
    failed: str

    def wait(self) -> torch.Tensor:
        """Return what came; on a GPU the current stream waits, not the host.

        Raises:
            SequenceParallelError: Another rank died, or did not come within the timeout of the group.
        """
        try:
            self.work.wait()
        except RuntimeError as error:
            raise SequenceParallelError(f"{self.failed}: {error}") from error
        return self.received


def _agreed(sent: torch.Tensor, operation: str, settings: str, sizes: dict[str, object]) -> _Settings:
    found = _Settings(settings)
    description = (
        f"operation={operation}",
        f"dtype={sent.dtype}",
        f"device={sent.device.type}",
        f"torch={torch.__version__}",
        f"attnmux={_VERSION}",
        f"direct={found.direct}",
        *(f"{field}={value}" for field, value in sizes.items()),
        *found.fields,
    )
    agree(found.group, "\n".join(description), found.timeout, found.checks_every_call)
    return found


def _count(elements: int, element_size: int) -> None:
    for traffic in _counters:
        traffic.collectives += 1
        traffic.elements_sent += elements
        traffic.bytes_sent += elements * element_size


def _failure(group: dist.ProcessGroup, operation: str, what: str, dtype: torch.dtype) -> str:
    return f"group {group.group_name!r}: {operation} failed on rank {group.rank()} of {group.size()}, {what} elements of {dtype}"


def start_all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    elements_in: list[int],
    elements_out: list[int],
    operation: str,
    settings: str,
    sizes: dict[str, object],
    *,
    waits: bool = False,
) -> Pending:
    """Start an exchange of flat buffers.

    Args:
        received: Flat, filled in rank order.
        sent: Flat, cut in rank order.
        elements_in: Elements from each rank.
        elements_out: Elements for each rank.
        operation: Its name in messages.
        settings: From `describe`.
        sizes: What else the ranks have to agree on.
        waits: Whether it is over on return, as it is with the blocking call.

    Raises:
        SequenceParallelError: Ranks disagree, one did not come, or the exchange failed.
    """
    group = _agreed(sent, operation, settings, sizes).group
    _count(sum(elements_out) - elements_out[group.rank()], sent.element_size())
    failed = _failure(group, operation, f"sending {elements_out} and receiving {elements_in}", sent.dtype)
    try:
        work = dist.all_to_all_single(received, sent, elements_in, elements_out, group=group, async_op=not waits)
    except RuntimeError as error:
        raise SequenceParallelError(f"{failed}: {error}") from error
    return Pending(received, work, failed)


def begin_all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    elements_in: list[int],
    elements_out: list[int],
    operation: str,
    settings: str,
    sizes: dict[str, object],
    *,
    waits: bool,
) -> None:
    """Exchange flat buffers; without `waits` it is over when `arrived` returns. For the rest see `start_all_to_all`."""
    pending = start_all_to_all(received, sent, elements_in, elements_out, operation, settings, sizes, waits=waits)
    if not waits:
        # by the tensor's memory: so a tensor can be under way from one operator to another, in a compiled graph too
        _register_work(received, pending.work)


def exchange(
    received: torch.Tensor,
    elements: Elements,
    write: Callable[[range, torch.Tensor], None],
    operation: str,
    settings: str,
    sizes: dict[str, object],
    *,
    waits: bool,
    takes_own: bool = True,
    as_it_is: torch.Tensor | None = None,
) -> None:
    """Exchange what is written where it leaves from: memory that the other ranks see, or a buffer for an all-to-all.

    Args:
        received: Flat, filled in rank order.
        elements: How many come from and go to which rank.
        write: Writes what is for some ranks, one after the other, to a flat buffer.
        operation: Its name in messages.
        settings: From `describe`.
        sizes: What else the ranks have to agree on.
        waits: Whether it is over on return, else when `arrived` returns.
        takes_own: Whether `received` is to have the rank's own part; without, anything may be there.
        as_it_is: What `write` would write for all ranks, if it lies in memory like that.

    Raises:
        SequenceParallelError: Ranks disagree, one did not come, or the exchange failed.
    """
    rank, outgoing = elements.rank, elements.outgoing
    agreed = _agreed(received, operation, settings, sizes)
    group, direct = agreed.group, None
    if agreed.direct:
        direct = direct_of(group, received.device, agreed.timeout)
    if direct is None:
        sent = as_it_is
        if sent is None:
            sent = received.new_empty(sum(outgoing))
            write(range(len(outgoing)), sent)
        fields = received, sent, elements.incoming, outgoing, operation, settings, sizes
        begin_all_to_all(*fields, waits=waits)
        return
    _count(sum(outgoing) - outgoing[rank], received.element_size())
    try:
        parcel = direct.open(group, elements, received)
        for ranks, part in parcel.parts:
            write(ranks, part)
        own = parcel.send(received)
        if takes_own:
            # while the others' comes
            write(range(rank, rank + 1), own)
        if waits:
            parcel.wait()
        else:
            _register_work(received, parcel)
    except torch.AcceleratorError as error:
        # of this exchange or of an earlier one, in which another rank did not come
        what = f"sending {outgoing} and receiving {elements.incoming}"
        raise SequenceParallelError(f"{_failure(group, operation, what, received.dtype)}: {error}") from error


def arrived(under_way: torch.Tensor, operation: str, settings: str) -> torch.Tensor:
    """Return a tensor, in which something may be under way, once it is there; on a GPU the current stream waits, not the host.

    Raises:
        SequenceParallelError: Another rank died, or did not come within the timeout of the group. In code compiled around it
            the error is torch's.
    """
    found: torch.Tensor
    if torch.compiler.is_compiling():
        found = torch.ops._c10d_functional.wait_tensor(under_way)
        return found
    try:
        found = torch.ops._c10d_functional.wait_tensor(under_way)
    except RuntimeError as error:
        group = _Settings(settings).group
        what = f"receiving {under_way.numel()}"
        raise SequenceParallelError(f"{_failure(group, operation, what, under_way.dtype)}: {error}") from error
    return found


@torch.library.custom_op("attnmux::sp_taken", mutates_args=())
def taken(under_way: torch.Tensor, sent: list[torch.Tensor], operation: str, settings: str) -> torch.Tensor:
    """Return a copy of what was under way, for compiled forward passes that gradients follow; `sent` stays alive until then.

    Torch's operator that waits is one without which it does not think backward complete: where no gradient needs what came,
    it would be sent once more there.
    """
    return arrived(under_way, operation, settings).clone()


@taken.register_fake
def _(under_way: torch.Tensor, sent: list[torch.Tensor], operation: str, settings: str) -> torch.Tensor:
    return torch.empty_like(under_way)


def all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    elements_in: list[int],
    elements_out: list[int],
    operation: str,
    settings: str,
    sizes: dict[str, object],
) -> None:
    """Exchange flat buffers; arguments and errors are those of `start_all_to_all`."""
    start_all_to_all(received, sent, elements_in, elements_out, operation, settings, sizes, waits=True)


def all_gather(
    received: torch.Tensor, sent: torch.Tensor, operation: str, settings: str, sizes: dict[str, object]
) -> None:
    """Fill the flat `received` with the flat `sent` of every rank, in rank order.

    Raises:
        SequenceParallelError: As for `start_all_to_all`.
    """
    group = _agreed(sent, operation, settings, sizes).group
    _count(sent.numel() * (group.size() - 1), sent.element_size())
    # torch 2.13 has a new name for it, and warns about the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    try:
        gather(received, sent, group=group)
    except RuntimeError as error:
        what = f"sending {sent.numel()} and receiving {received.numel()}"
        raise SequenceParallelError(f"{_failure(group, operation, what, sent.dtype)}: {error}") from error
