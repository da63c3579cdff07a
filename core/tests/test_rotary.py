"""Rotary embedding against complex arithmetic."""

import pytest
import torch

from attnmux import UnsupportedRequestError
from attnmux.rotary import apply_rotary


def tables(length, dim, dtype=torch.float32):
    angles = torch.arange(length)[:, None] * (10000.0 ** (-torch.arange(0, dim, 2) / dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x, cos, sin):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[None, :, None]).flatten(-2)


def test_pairs_turn_as_complex_numbers():
    x = torch.randn(2, 7, 3, 16)
    assert torch.allclose(apply_rotary(x, tables(7, 16)).double(), turned(x, *tables(7, 16)), atol=1e-6)


def test_full_width_tables_repeat_each_value_in_place():
    x = torch.randn(1, 5, 2, 8)
    full = tuple(table.repeat_interleave(2, dim=1) for table in tables(5, 8))
    assert torch.equal(apply_rotary(x, full), apply_rotary(x, tables(5, 8)))


def test_half_precision_is_computed_in_float32():
    x = torch.randn(1, 5, 2, 8).to(torch.bfloat16)
    assert torch.equal(apply_rotary(x, tables(5, 8)), apply_rotary(x.float(), tables(5, 8)).to(torch.bfloat16))


def test_float64_stays_float64():
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    assert torch.allclose(
        apply_rotary(x, tables(5, 8, torch.float64)), turned(x, *tables(5, 8, torch.float64)), atol=1e-14
    )


def test_input_is_not_modified_and_strides_do_not_matter():
    x = torch.randn(1, 5, 2, 16)[..., ::2]
    before = x.clone()
    assert torch.equal(apply_rotary(x, tables(5, 8)), apply_rotary(x.contiguous(), tables(5, 8)))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("shape", "freqs", "text"),
    [
        ((1, 5, 2, 7), tables(5, 8), "head_size=7 is odd"),
        ((1, 6, 2, 8), tables(5, 8), r"cos must be \[6, 4\] or \[6, 8\] for x \[1, 6, 2, 8\], got \[5, 4\]"),
        ((1, 5, 2, 8), torch.ones(5, 4), "must be the pair"),
        ((1, 5, 2, 8), (tables(5, 8)[0], tables(4, 8)[1]), "sin must be"),
        ((1, 5, 2, 8), (torch.ones(5, 4, device="meta"), torch.ones(5, 4)), "cos is on meta, x on cpu"),
    ],
)
def test_tables_that_do_not_fit_are_refused(shape, freqs, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        apply_rotary(torch.zeros(shape), freqs)
