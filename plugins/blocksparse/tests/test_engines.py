"""How an engine is chosen, here and in the operators of other packages around this one."""

import pytest
import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason
from attnmux_blocksparse.kernels import gpu_reasons, head_size_reasons, pick_engine
from attnmux_blocksparse.prepare import compute_dtype, resolve_scale

ENGINES = ("slow", "fast", "exotic")


def pick(name, refused=()):
    reasons = {engine: [Reason("first", f"{engine} lacks this"), Reason("second", "and that")] for engine in refused}
    return pick_engine(name, ENGINES, ("fast", "slow"), lambda engine: reasons.get(engine, []))


@pytest.mark.parametrize("name", [None, ""])
def test_first_of_the_order_that_serves_is_taken(name):
    assert pick(name) == "fast"
    assert pick(name, refused=["fast"]) == "slow"


def test_named_engine_is_taken_or_refused_with_every_reason():
    assert pick("slow") == "slow"
    assert pick("exotic") == "exotic"
    with pytest.raises(
        UnsupportedRequestError, match=r"engine 'fast' cannot run this call: fast lacks this; and that\."
    ) as it:
        pick("fast", refused=["fast"])
    assert [reason.code for reason in it.value.reasons] == ["first", "second"]


def test_unknown_engine_is_refused_with_the_names():
    with pytest.raises(UnsupportedRequestError, match=r"engine='quick' is not known; engines are slow, fast, exotic\."):
        pick("quick")


def test_no_engine_at_all_is_refused_with_the_reasons_of_the_last():
    with pytest.raises(UnsupportedRequestError, match="no engine can run this call: slow lacks this"):
        pick(None, refused=["fast", "slow"])


def test_gpu_reasons_name_device_type_and_emptiness():
    x = torch.zeros(1, 0, 2, 16)
    codes = [reason.code for reason in gpu_reasons(x, x, dtypes=(torch.float16,))]
    assert [code for code in codes if code != "triton"] == ["device", "dtype", "shape"]
    assert "supported: float16, float32" in str(gpu_reasons(x.double(), x, dtypes=(torch.float16, torch.float32)))


@pytest.mark.parametrize(
    ("head_dim", "serves"), [(16, True), (80, True), (128, True), (8, False), (72, False), (144, False)]
)
def test_head_sizes_go_in_steps_of_16(head_dim, serves):
    assert bool(head_size_reasons(head_dim, 128)) is not serves


def test_scale_is_a_value_or_the_usual_one():
    assert resolve_scale(None, 64) == 0.125
    assert resolve_scale(0.0, 64) == 0.0
    for scale in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(UnsupportedRequestError, match="softmax_scale must be finite"):
            resolve_scale(scale, 64)


def test_only_float64_is_computed_in_float64():
    assert compute_dtype(torch.float64) == torch.float64
    assert {compute_dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
