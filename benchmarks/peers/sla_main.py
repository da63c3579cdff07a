"""The public SLA package (github.com/thu-ml/SLA, branch main): the whole module, from [B, S, H, D] as a model has it.

It is not on PyPI: put its checkout on PYTHONPATH. Its projection is zero, so that it computes block-sparse attention; which
blocks it keeps, chosen from scores in half precision, is read from itself.
"""

import torch

from attnmux.bench import Workload
from attnmux_blocksparse import BlockIndex
from attnmux_blocksparse.bench import ListPattern
from peers.requirements import refuse_unless


class LazyPattern:
    """The keys that the last call attended to, as a `Pattern`."""

    def __init__(self, case):
        self.case, self.lists = case, None

    def _pattern(self):
        lists = self.lists.sort(-1).values.int().contiguous()
        counts = torch.full(lists.shape[:3], lists.shape[3], dtype=torch.int32, device=lists.device)
        blocks = {"block_q": self.case.block_q, "block_k": self.case.block_k}
        num_key_blocks = -(-self.case.S_k // self.case.block_k)
        return ListPattern(BlockIndex(lists, counts, num_key_blocks=num_key_blocks, **blocks), self.case)

    def visible(self, batch, head, rows, keys):
        return self._pattern().visible(batch, head, rows, keys)

    def pairs(self):
        return self._pattern().pairs()


def sla_main(case):
    refuse_unless(case.H_kv == case.H and case.S_q == case.S_k, "equal heads and lengths of queries and keys")
    from sparse_linear_attention import SparseLinearAttention
    from sparse_linear_attention.utils import get_block_map

    module = SparseLinearAttention(case.D, case.keep, BLKQ=case.block_q, BLKK=case.block_k).cuda()
    pattern = LazyPattern(case)

    def attend(q, k, v):
        heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        if pattern.lists is None:
            pattern.lists = get_block_map(*heads_first[:2], case.keep, case.block_q, case.block_k)[1]
        with torch.autocast("cuda", torch.bfloat16):
            return module(*heads_first).transpose(1, 2).contiguous()

    return Workload(case=case, backend="SLA", engine="main branch", attend=attend, pattern=pattern, is_peer=True)
