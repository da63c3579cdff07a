"""Which launches of one call share compiled code. A kernel of no device stands in for Triton's."""

import pytest
import torch

pytest.importorskip("triton")

# The package of the kernels needs triton only where they are used.
from attnmux_vmoba.kernels.relaunch import launch


class Compiled:
    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *arguments: self.seen.append((grid, arguments))


class Kernel:
    """Counts how often it is looked up; its code notes the arguments that it is called with."""

    arg_names = ("x_ptr", "stride", "length", "FORWARD", "D")
    do_not_specialize = ("length",)

    def __init__(self):
        self.found, self.seen = 0, []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.found += 1
            return Compiled(self.seen)

        return run


X = torch.zeros(64)


@pytest.mark.parametrize(("arguments", "constants", "num_warps", "shares"), [
    ((X[4:], 8, 100), {}, 4, True), ((X, 8, 2**31), {}, 4, False), ((X, 16, 7), {}, 4, False), ((X[1:], 8, 7), {}, 4, False),
    ((X.double(), 8, 7), {}, 4, False), ((X, 8, 7), {"FORWARD": False}, 4, False), ((X, 8, 7), {}, 8, False),
])  # fmt: skip
def test_only_equal_code_is_launched_again(arguments, constants, num_warps, shares):
    kernel, launches = Kernel(), {}
    launch(launches, kernel, (1, 1, 1), X, 8, 7, num_warps=4, FORWARD=True, D=128)
    launch(launches, kernel, (2, 1, 1), *arguments, num_warps=num_warps, **({"FORWARD": True, "D": 128} | constants))
    assert kernel.found == (1 if shares else 2)
    assert [grid for grid, _ in kernel.seen] == ([(2, 1, 1)] if shares else [])
    for _, found in kernel.seen:
        assert found[1:] == (*arguments[1:], True, 128)
