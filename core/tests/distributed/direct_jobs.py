"""What ranks run that see each other's memory: files that all of them map stand in for a GPU's."""

import importlib
import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from jobs import DIM, case, shards

from attnmux import DistributedAttention, SeqPlan, SequenceParallelError, SPGroup
from attnmux.distributed import collective, direct
from attnmux.distributed.agreement import collect

_numbers = {}


def mapped_files(numel, group, device):
    """Bytes that each rank maps of all ranks' files; what is there is not zero, as in memory that was used before."""
    number = next(_numbers.setdefault(group.group_name, count()))
    home = Path(tempfile.gettempdir())
    own = home / f"attnmux-{group.group_name}-{number}-{group.rank()}-{torch.randint(1 << 40, ()).item()}"
    own.write_bytes(b"\xa5" * numel)
    names = collect(group, str(own), 5.0, "test")
    memory = [torch.from_file(name, shared=True, size=numel, dtype=torch.uint8) for name in names]
    collect(group, "mapped", 5.0, "test")
    own.unlink()
    flag = torch.zeros(1)
    return direct.SharedMemory(memory, lambda: dist.all_reduce(flag, group=group))


def seeing(place=lambda group, device: "here", memory=mapped_files):
    """Patches by which ranks find each other's memory, anew for the groups of this block."""
    return patch.multiple(direct, _place=place, _share=memory, _found={})


def run(sp, function, *arguments):
    """Run a job of another module, and see that its exchanges were direct, if they went among several ranks."""
    home, _, name = function.rpartition(".")
    with seeing(), patch.object(collective, "begin_all_to_all", unwanted):
        found = getattr(importlib.import_module(home or "jobs"), name)(sp, *arguments)
        assert sp.size == 1 or all(direct._found.values())
    return found


def unwanted(*arguments, **options):
    raise AssertionError("an exchange was not direct")


def layer_and_shards(sp, length, heads=4, overlap=1):
    video, _, _, _ = case(sp.size, length, 1, heads, heads, 0)
    plan = SeqPlan.balanced(length, sp.size)
    layer = DistributedAttention(heads, DIM, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float64, overlap=overlap)
    return partial(layer, plan=plan), [x.detach() for x in shards(video, plan, sp.rank)]


def stages(sp):
    """Stages are used again, grow where one is too small, and are as many as exchanges are under way."""
    with seeing(), patch.object(direct, "_LEAST", 64):
        layer, mine = layer_and_shards(sp, 8)
        first = layer(*mine)[0]
        (found,) = direct._found.values()
        sizes = [stage.numel for stage in found.stages]
        memory = found.stages[0].memory
        assert torch.equal(layer(*mine)[0], first)
        assert found.stages[0].memory is memory
        longer, longer_shards = layer_and_shards(sp, 16)
        want = longer(*longer_shards)[0]
        grown = [stage.numel for stage in found.stages]
        several, _ = layer_and_shards(sp, 16, overlap=2)
        assert torch.equal(several(*longer_shards)[0], want)
        assert not any(stage.is_open for stage in found.stages)
        # the rank's own part of q, k and v is in none
        return sizes, grown, len(found.stages)


def inference_first(sp):
    """Memory that was shared in inference mode serves training too."""
    with seeing(), torch.inference_mode():
        layer, mine = layer_and_shards(sp, 8)
        layer(*mine)
        with torch.inference_mode(False):
            leaves = [x.clone().requires_grad_() for x in mine]
            output, _ = layer(*leaves)
            output.sum().backward()
            assert all(x.grad.any() for x in leaves[2:])


def elsewhere(sp):
    """Ranks of other hosts exchange by collectives."""
    layer, mine = layer_and_shards(sp, 8)
    want = layer(*mine)[0]
    with seeing(place=lambda group, device: f"host {group.rank()}"):
        assert torch.equal(layer(*mine)[0], want)
        assert list(direct._found.values()) == [None]


def off(sp):
    """A group that is not to copy directly does not look for memory."""
    with seeing(place=unwanted, memory=unwanted):
        layer, mine = layer_and_shards(SPGroup.from_group(dist.group.WORLD, timeout=5.0, direct=False), 8)
        layer(*mine)
        assert not direct._found


def one_without(sp):
    """If a rank gets no memory all exchange by collectives, and say so once."""

    def none_on_rank_1(numel, group, device):
        if group.rank() == 1:
            raise RuntimeError("no peer access")
        return direct.SharedMemory([torch.empty(numel, dtype=torch.uint8)] * group.size(), lambda: None)

    layer, mine = layer_and_shards(sp, 8)
    want = layer(*mine)[0]
    with seeing(memory=none_on_rank_1), patch.object(direct._logger, "warning") as warning:
        for _ in range(2):
            assert torch.equal(layer(*mine)[0], want)
    ((message, *arguments),) = [call.args for call in warning.call_args_list]
    return message % tuple(arguments)


def too_large(sp):
    """A stage that cannot grow is an error that says what to do."""

    def small(numel, group, device):
        if numel > 64:
            raise RuntimeError("out of memory")
        return mapped_files(numel, group, device)

    with seeing(memory=small), patch.object(direct, "_LEAST", 64):
        layer, mine = layer_and_shards(sp, 8)
        try:
            layer(*mine)
        except SequenceParallelError as error:
            return str(error)
    raise AssertionError("no error")


def not_in_a_graph(sp):
    """Nor does it grow while a CUDA graph is captured."""
    with seeing():
        found = direct.Direct()
        stage = found.reserve(dist.group.WORLD, torch.device("cpu"), 64)
        with patch.object(direct, "is_capturing", lambda: True):
            assert found.reserve(dist.group.WORLD, torch.device("cpu"), stage.numel) is stage
            try:
                found.reserve(dist.group.WORLD, torch.device("cpu"), stage.numel + 1)
            except SequenceParallelError as error:
                return str(error)
    raise AssertionError("no error")
