"""DistributedAttention_VSA on ranks that talk over gloo."""

import pytest

from attnmux.distributed import SeqPlan


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_vsa_gives_the_same_bits_on_any_number_of_ranks(pools, size, gated):
    pytest.importorskip("attnmux_vsa")
    counts = pools(size).run("video_sparse", gated)
    if size > 1:
        rows, heads, dim = 7 * 5 * 3, 4, 8
        for rank, (collectives, elements) in enumerate(counts):
            length = SeqPlan.balanced(rows, size).lengths[rank]
            own = heads // size
            want = length * dim * (heads - own) * (4 if gated else 3) + (rows - length) * dim * own
            assert (collectives, elements) == (2, want)
