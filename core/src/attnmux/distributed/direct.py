"""Exchanges in which every rank copies what is for it out of the others' memory, by the GPUs' copy engines.

A kernel that sends and receives holds multiprocessors, also while it waits for a rank that is not as far; copy engines hold none.
A rank writes what the others want to its stage, memory that they see: torch's symmetric memory, among ranks of one host whose GPUs
reach each other. Once all have written, each copies; before the stage is written again, they meet once more. What meets is a kernel
of a few threads that waits on a multiprocessor, which attention with one block for each would miss: so it does only where the
exchange cannot go on without.
"""

from __future__ import annotations

import logging
import socket
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch._C._distributed_c10d import Work

from attnmux.distributed.agreement import collect
from attnmux.errors import SequenceParallelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch.distributed as dist

__all__ = ["Direct", "Elements", "Parcel", "direct_of", "others"]

_logger = logging.getLogger("attnmux")

# of each process group as long as it lives; None where ranks do not see each other's memory
_found: WeakKeyDictionary[dist.ProcessGroup, Direct | None] = WeakKeyDictionary()

_LEAST = 1 << 21
"""Bytes of a new stage; memory is mapped in pages of this size."""

_SEARCH = "search for memory that all ranks see"


class Elements(NamedTuple):
    """How many elements each rank has for each: `senders[r] * receivers[p]` of rank r for rank p."""

    senders: list[int]
    receivers: list[int]
    rank: int

    @property
    def incoming(self) -> list[int]:
        """Those for this rank, in rank order, its own among them."""
        return [sender * self.receivers[self.rank] for sender in self.senders]

    @property
    def outgoing(self) -> list[int]:
        """Those of this rank, in rank order, its own among them."""
        return [self.senders[self.rank] * receiver for receiver in self.receivers]

    def staged(self, sender: int) -> list[int]:
        """Where what a sender has for each rank starts in its stage, and where the last ends; nothing is there for itself."""
        sizes = [0 if peer == sender else n for peer, n in enumerate(self.receivers)]
        return [self.senders[sender] * end for end in accumulate(sizes, initial=0)]

    @property
    def largest_stage(self) -> int:
        """Elements of the rank that has most for others."""
        total = sum(self.receivers)
        return max(sender * (total - own) for sender, own in zip(self.senders, self.receivers, strict=True))


def others(rank: int, size: int) -> list[range]:
    """Return the ranks before one and those after it, as far as there are any."""
    return [ranks for ranks in (range(rank), range(rank + 1, size)) if ranks]


def direct_of(group: dist.ProcessGroup, device: torch.device, timeout: float) -> Direct | None:
    """Return how ranks of a group copy from each other; None where they cannot. Every rank has to call it, the first time."""
    if group not in _found:
        _found[group] = _find(group, device, timeout)
    return _found[group]


def _find(group: dist.ProcessGroup, device: torch.device, timeout: float) -> Direct | None:
    places = collect(group, _place(group, device), timeout, _SEARCH)
    if not places[0] or len(set(places)) > 1:
        return None
    direct, problem = Direct(), ""
    try:
        direct.reserve(group, device, _LEAST)
    except (ImportError, SequenceParallelError) as error:
        problem = str(error)
    problems = list(filter(None, collect(group, problem, timeout, _SEARCH)))
    if not problems:
        return direct
    _logger.warning("collectives exchange instead: %s", problems[0])
    return None


def _place(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return what ranks have in common that may share memory; empty for one that cannot."""
    if device.type != "cuda" or group._get_backend(device).name() != "nccl":
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip()}" if boot.exists() else ""


class SharedMemory(NamedTuple):
    """Memory that all ranks of a group see.

    Attributes:
        of_rank: Flat bytes of every rank, in rank order.
        meet: Lets the current stream wait until those of all ranks have come as far.
    """

    of_rank: list[torch.Tensor]
    meet: Callable[[], None]


def _share(numel: int, group: dist.ProcessGroup, device: torch.device) -> SharedMemory:
    """Return so many bytes of every rank; each has to ask for as many."""
    from torch.distributed import _symmetric_memory as symmetric

    own = symmetric.empty(numel, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, group)
    seen = [handle.get_buffer(rank, (numel,), torch.uint8) for rank in range(group.size()) if rank != group.rank()]
    seen.insert(group.rank(), own)
    # a rank that does not come ends the kernel, and with it the process, when a collective would end
    limit = group._get_backend(device).options._timeout // timedelta(milliseconds=1)
    return SharedMemory(seen, lambda: handle.barrier(0, limit))


@dataclass
class _Stage:
    """Memory of one exchange at a time, and the stream on which it copies.

    Attributes:
        memory: Of every rank.
        stream: None on a CPU, where everything happens at once.
        is_open: Whether an exchange is between being written and having arrived.
        copied: When this rank has what it copied last, outside of graphs.
        captured: What captured graphs write to: a stage that grew is kept for them.
    """

    memory: SharedMemory
    stream: torch.cuda.Stream | None
    is_open: bool = False
    copied: torch.cuda.Event | None = None
    captured: list[SharedMemory] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Its bytes."""
        return self.memory.of_rank[0].numel()

    def open(self) -> None:
        """Let the current stream write, once all have copied what was written before."""
        self.is_open = True
        if is_capturing():
            if not any(memory is self.memory for memory in self.captured):
                self.captured.append(self.memory)
        elif self.copied is not None:
            # the exchange before may have been waited for on another stream
            self.copied.wait()
        self.memory.meet()

    def copying(self) -> AbstractContextManager[Any]:
        """Enter the stream that copies, after what the current one was given so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Direct:
    """Exchanges among the ranks of a group that see each other's memory. It does not hold the group, whose end is its own.

    Attributes:
        stages: As many as exchanges were under way at a time. Each holds what the rank had for others in its largest one.
    """

    def __init__(self) -> None:
        self.stages: list[_Stage] = []

    def reserve(self, group: dist.ProcessGroup, device: torch.device, numel: int) -> _Stage:
        """Return a stage that is not open, of at least so many bytes; the ranks make the same calls, and so take the same one."""
        stage = next((stage for stage in self.stages if not stage.is_open), None)
        if stage is not None and numel <= stage.numel:
            return stage
        found = f"group {group.group_name!r}: rank {group.rank()}"
        if is_capturing():
            raise SequenceParallelError(
                f"{found} captures a CUDA graph that exchanges {numel} bytes, for which there is no stage yet; run what is "
                "captured once before"
            )
        if device.type == "cuda":
            # nobody comes to the rendezvous before it has copied what it wanted
            torch.cuda.synchronize(device)
        try:
            memory = _share(max(numel, _LEAST), group, device)
        except RuntimeError as error:
            raise SequenceParallelError(
                f"{found} got no {numel} bytes that other ranks see: {error}; a group made with direct=False does without"
            ) from error
        if stage is None:
            # what waits for other ranks gets the first multiprocessor that attention leaves
            stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            stage = _Stage(memory, stream)
            self.stages.append(stage)
        stage.memory = memory
        return stage

    def open(self, group: dist.ProcessGroup, elements: Elements, like: torch.Tensor) -> Parcel:
        """Return what is to be written and sent, of the type and on the device of a tensor."""
        stage = self.reserve(group, like.device, elements.largest_stage * like.element_size())
        stage.open()
        return Parcel(stage, elements, like.dtype)


class Parcel(Work):
    """What a rank has for the others, until what they have for it is there.

    Attributes:
        parts: What is for the ranks before this one, and for those after it, flat and in rank order.
    """

    def __init__(self, stage: _Stage, elements: Elements, dtype: torch.dtype) -> None:
        super().__init__()
        self._stage, self._elements, self._dtype = stage, elements, dtype
        starts, own = elements.staged(elements.rank), self._memory_of(elements.rank)
        self.parts = [
            (ranks, own[starts[ranks.start] : starts[ranks.stop]])
            for ranks in others(elements.rank, len(elements.senders))
        ]
        self._received: torch.Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def _memory_of(self, rank: int) -> torch.Tensor:
        return self._stage.memory.of_rank[rank].view(self._dtype)

    def send(self, received: torch.Tensor) -> torch.Tensor:
        """Start to fill the flat `received`, in rank order, with what others have for this rank; return its own part, untouched."""
        elements, stage, rank = self._elements, self._stage, self._elements.rank
        parts = torch.split(received, elements.incoming)
        with stage.copying():
            stage.memory.meet()
            # each rank begins with another
            for sender in ((rank + step) % len(parts) for step in range(1, len(parts))):
                start = elements.staged(sender)[rank]
                parts[sender].copy_(self._memory_of(sender)[start : start + parts[sender].numel()])
            if stage.stream is not None:
                self._there = stage.stream.record_event()
                stage.copied = None if is_capturing() else self._there
        # its memory is not to be given away before it is filled
        self._received = received
        return parts[rank]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Let the current stream wait for what was received."""
        if self._there is not None:
            self._there.wait()
        self._stage.is_open, self._received = False, None
        return True
