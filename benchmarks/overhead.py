"""What attnmux costs on the host: selection, the layer around an impl, imports, listings.

    python benchmarks/overhead.py benchmarks/results/overhead.json

Times are the best of several repetitions: host overhead is a floor, and other processes only add to it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import timeit

import torch

from attnmux import (
    AttentionBackendEnum,
    AttentionRequest,
    DistributedAttention,
    LocalAttention,
    get_attn_backend,
    select_backend,
)
from attnmux.bench import describe_environment


def microseconds(function, number=5000, repeat=9):
    function()
    return min(timeit.repeat(function, number=number, repeat=repeat)) / number * 1e6


def seconds(*arguments):
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    arguments = parser.parse_args()
    request = AttentionRequest(head_size=64, dtype="bfloat16", device="cpu")
    allowed = [AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.FLASH_ATTN]
    layer, alone = (kind(4, 16, backend="TORCH_SDPA") for kind in (LocalAttention, DistributedAttention))
    q, k, v = torch.randn(3, 1, 1, 4, 16)

    def trivial(query, key, value, metadata):
        return query

    # an impl that does nothing: next to a real one the layer's share would drown in the noise
    layer.attn_impl.forward = alone.attn_impl.forward = trivial
    with torch.no_grad():
        whole = microseconds(lambda: layer(q, k, v))
        one_rank = microseconds(lambda: alone(q, k, v))
        bare = microseconds(lambda: trivial(q, k, v, None))
    rows = {
        "select_backend, cached (us)": microseconds(lambda: select_backend(request)),
        "get_attn_backend, cached (us)": microseconds(lambda: get_attn_backend(64, torch.bfloat16)),
        "get_attn_backend with an allow-list, cached (us)": microseconds(
            lambda: get_attn_backend(64, torch.bfloat16, allowed)
        ),
        "LocalAttention around its impl, one call (us)": whole - bare,
        "DistributedAttention around its impl at one rank, one call (us)": one_rank - bare,
        "import attnmux (s, interpreter subtracted)": seconds("-c", "import attnmux") - seconds("-c", "pass"),
        "attnmux list (s, whole process)": seconds("-m", "attnmux", "list"),
    }
    environment = describe_environment(torch.device("cpu"), commit=os.environ.get("COMMIT"))
    about = {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": environment.commit,
        "date": environment.date,
    }
    with open(arguments.output, "w") as file:
        json.dump({**about, "rows": rows}, file, indent=1)
    for name, value in rows.items():
        sys.stdout.write(f"{name:64s} {value:8.3f}\n")


if __name__ == "__main__":
    main()
