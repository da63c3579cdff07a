"""Which of torch's own attention kernels is fastest for a request: the measurement behind TORCH_SDPA's choice.

    python benchmarks/sdpa_kernels.py benchmarks/results/sdpa_kernels.json

Every kernel is checked against float32 before it is timed; one that is wrong gets no number. Times are medians of CUDA
events over repeated launches, inputs of one case in turn by all kernels.
"""

import argparse
import json
import os
import sys

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnmux.bench import describe_environment

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# batch, query length, key length, heads, key heads, head size, causal, mask
CASES = [
    *(
        (1, length, length, 12, 12, size, False, None)
        for length in (256, 1024, 4096, 16384, 32768)
        for size in (64, 128)
    ),
    *((1, length, length, 12, 12, 128, True, None) for length in (1024, 16384)),
    (1, 4096, 4096, 12, 12, 72, False, None),
    (1, 16384, 16384, 12, 12, 96, False, None),
    (1, 8192, 8192, 12, 12, 256, False, None),
    (1, 32768, 512, 12, 12, 128, False, None),
    (1, 32768, 77, 12, 12, 64, False, None),
    (4, 1024, 1024, 12, 12, 64, False, None),
    (1, 16384, 16384, 12, 3, 128, False, None),
    (1, 8192, 8192, 12, 12, 128, False, "key_padding"),
    (1, 8192, 512, 12, 12, 128, False, "key_padding"),
]


def make(case, dtype):
    batch, length_q, length_k, heads, kv_heads, size, _, mask = case
    q, k, v = (
        torch.randn(batch, length, n, size, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for length, n in ((length_q, heads), (length_k, kv_heads), (length_k, kv_heads))
    )
    keep = None
    if mask == "key_padding":
        keep = (torch.arange(length_k, device="cuda") < length_k - length_k // 8).expand(batch, 1, 1, length_k)
    return q, k, v, keep


def attend(q, k, v, keep, causal):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def error_of(out, q, k, v, keep, causal):
    """Relative L2 error against float32 on the first head's last 256 queries."""
    group = q.shape[1] // k.shape[1]
    rows = slice(max(0, q.shape[2] - 256), None)
    scores = q[:, 0, rows].float() @ k[:, 0 // group].float().transpose(-1, -2) / q.shape[-1] ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep[:, 0], float("-inf"))
    if causal:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device="cuda").tril()[rows]
        scores = scores.masked_fill(~visible, float("-inf"))
    want = scores.softmax(-1) @ v[:, 0].float()
    return ((out[:, 0, rows].float() - want).norm() / want.norm()).item()


def median_ms(function, budget_ms=60):
    function()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    count = max(5, min(100, int(budget_ms / max(start.elapsed_time(end), 0.01))))
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device="cuda")
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for first, last in events:
        flush.zero_()
        first.record()
        function()
        last.record()
    torch.cuda.synchronize()
    return sorted(first.elapsed_time(last) for first, last in events)[count // 2]


def measure(case, dtype):
    q, k, v, keep = make(case, dtype)
    causal = case[6]
    rows = []
    for name, kernel in KERNELS.items():
        row = dict(zip(("B", "S_q", "S_k", "H", "H_kv", "D", "causal", "mask"), case, strict=True))
        row |= {"dtype": str(dtype).removeprefix("torch."), "kernel": name}
        try:
            with sdpa_kernel([kernel]):
                out = attend(q, k, v, keep, causal)
                with torch.no_grad():
                    row["relative_l2"] = error_of(out, q, k, v, keep, causal)
                if row["relative_l2"] > 1e-2:
                    row["refused"] = "wrong result"
                else:
                    grad = torch.randn_like(out)
                    with torch.no_grad():
                        row["forward_ms"] = median_ms(lambda: attend(q, k, v, keep, causal))
                    row["backward_ms"] = median_ms(
                        lambda out=out, grad=grad: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
                    )
        except RuntimeError as error:
            row["refused"] = str(error).splitlines()[0][:120]
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    arguments = parser.parse_args()
    environment = describe_environment(torch.device("cuda"), commit=os.environ.get("COMMIT"))
    rows = []
    for case in CASES:
        for row in measure(case, torch.bfloat16):
            rows.append(row)
            times = f"{row['forward_ms']:8.3f} {row['backward_ms']:8.3f}" if "forward_ms" in row else row["refused"]
            sys.stdout.write(f"{case} {row['kernel']:10s} {times}\n")
            sys.stdout.flush()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": environment.commit,
        "date": environment.date,
    }
    with open(arguments.output, "w") as file:
        json.dump({**about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
