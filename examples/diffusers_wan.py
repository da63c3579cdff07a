"""A clip through a Wan transformer with random weights, with every backend in turn.

    python examples/diffusers_wan.py                                    # a minute on a CPU
    python examples/diffusers_wan.py --device cuda --dtype bfloat16 --frames 84 --height 480 --width 832 \\
        --layers 30 --heads 12 --head-size 128                          # Wan 2.1 1.3B at 480p

The clip becomes latents by a fixed orthogonal projection, noise is added, and a few steps of a real scheduler run on it. The
weights are random, so the result is no better picture: it shows what a backend does to the same computation, its time and its
distance from the model's own attention. Needs `pip install 'attnmux[demo,integrations]'`.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch

from attnmux.errors import AttnmuxError
from attnmux.integrations.diffusers import apply
from attnmux.registry import get_registry
from attnmux.testing.clip import default_clip, read_clip

OPTIONS = {
    "VIDEO_SPARSE_ATTN": {"metadata": {"VSA_sparsity": 0.75}},
    "NABLA_ATTN": {"metadata": {"threshold": 0.8}},
    "RADIAL_ATTN": {"metadata": {"width": 0.5}},
}
CHANNELS = 16
SCALE = 0.9  # makes latents of about unit variance
NOISE = 0.2  # share of noise at the first step
FRAMES, SIDE = 4, 8  # pixels of one latent along time, and along rows and columns


def projection() -> torch.Tensor:
    """Return the fixed map [3 * SIDE * SIDE, CHANNELS] from pixels to latents: low cosine frequencies, orthonormal columns."""
    wave = torch.cos(torch.pi / SIDE * (torch.arange(SIDE) + 0.5)[:, None] * torch.arange(3))
    wave = wave / wave.norm(dim=0)
    frequencies = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    planes = torch.stack([torch.outer(wave[:, row], wave[:, column]).flatten() for row, column in frequencies], 1)
    basis = torch.block_diag(planes, planes, planes)
    # one more for brightness: the sixth frequency, the same in all colours
    last = torch.outer(wave[:, 2], wave[:, 0]).flatten().repeat(3) / 3**0.5
    return torch.cat([basis, last[:, None]], 1)


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Return latents [1, CHANNELS, T / FRAMES, H / SIDE, W / SIDE] of pixels [T, 3, H, W] in [0, 1]."""
    means = pixels.unflatten(0, (-1, FRAMES)).mean(1) - 0.5
    patches = means.unflatten(2, (-1, SIDE)).unflatten(4, (-1, SIDE)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return (patches @ projection()).permute(3, 0, 1, 2)[None] / SCALE


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Return the middle frame [H, W, 3] that latents stand for, as far as the projection kept it."""
    middle = latents[0, :, latents.shape[2] // 2].float().cpu().permute(1, 2, 0) @ projection().T * SCALE
    patches = middle.unflatten(-1, (3, SIDE, SIDE)).permute(0, 3, 1, 4, 2)
    return (patches.flatten(2, 3).flatten(0, 1) + 0.5).clamp(0, 1)


def make_model(arguments: argparse.Namespace) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.head_size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=64,
        ffn_dim=4 * arguments.heads * arguments.head_size,
        num_layers=arguments.layers,
    )
    # as from_pretrained(torch_dtype=...) does: some layers stay in float32
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(getattr(torch, arguments.dtype))
    return model.to(arguments.device).eval()


@torch.no_grad()
def denoise(model: torch.nn.Module, noisy: torch.Tensor, steps: int, handle=None) -> tuple[torch.Tensor, float]:
    """Return the latents after the steps, and the seconds of the fastest one."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(NOISE, NOISE / steps, steps).tolist())
    text = torch.zeros(1, 16, 64, device=noisy.device, dtype=noisy.dtype)
    latents, seconds = noisy.clone(), []
    for step, timestep in enumerate(scheduler.timesteps):
        if handle is not None:
            handle.step = step
        started = time.perf_counter()
        velocity = model(latents, timestep.expand(1).to(noisy.device), text, return_dict=False)[0]
        if noisy.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0].to(noisy.dtype)
    return latents, min(seconds)


def draw(frames: dict[str, torch.Tensor], own: torch.Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    differences = {name: (frame - own).abs().mean(-1) for name, frame in frames.items()}
    largest = max(max(float(difference.max()) for difference in differences.values()), 1e-6)
    figure = Figure(figsize=(4 * len(frames), 5.2), layout="constrained")
    axes = figure.subplots(2, len(frames), squeeze=False)
    for column, (name, frame) in enumerate(frames.items()):
        axes[0][column].imshow(frame)
        axes[0][column].set_title(name)
        axes[1][column].imshow(differences[name], cmap="magma", vmin=0, vmax=largest)
        axes[1][column].set_title(f"difference from the model's own, 0 to {largest:.1g}", fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(path, dpi=90)


def conditions(arguments: argparse.Namespace, tokens: int) -> dict[str, object]:
    """Return what a time depends on."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    names = ("device", "dtype", "frames", "height", "width", "layers", "heads", "head_size", "steps")
    return {
        **{name: getattr(arguments, name) for name in names},
        "tokens": tokens,
        "device": torch.cuda.get_device_name(arguments.device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A clip through a Wan transformer, with every backend in turn.")
    parser.add_argument("--backend", action="append", help="backend to run; several times for several; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, default in (
        ("frames", 32),
        ("height", 160),
        ("width", 288),
        ("layers", 4),
        ("heads", 4),
        ("head-size", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("diffusers_wan.png"))
    parser.add_argument("--json", type=Path, help="file for the table, with device and versions")
    arguments = parser.parse_args(words)

    pixels = read_clip(default_clip(), frames=arguments.frames, height=arguments.height, width=arguments.width)
    clean = encode(pixels).to(arguments.device, getattr(torch, arguments.dtype))
    noisy = (1 - NOISE) * clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean)
    model = make_model(arguments)
    tokens = clean[0, 0].numel() // 4
    print(
        f"{tokens} tokens, {arguments.layers} layers, {arguments.heads} heads of {arguments.head_size}, {arguments.dtype}"
    )
    print(f"{'attention':<20} {'ms per step':>12} {'distance':>10}  what was done")
    own, seconds = denoise(model, noisy, arguments.steps)
    print(f"{'own':<20} {1e3 * seconds:>12.1f} {0.0:>10.1e}  diffusers as it is")
    frames = {"the model's own": decode(own)}
    rows = [{"attention": "own", "ms_per_step": 1e3 * seconds, "distance": 0.0, "options": {}, "done": ""}]
    for name in arguments.backend or sorted(get_registry().records()):
        options = OPTIONS.get(name, {})
        try:
            with apply(model, name, **options) as handle:
                latents, seconds = denoise(model, noisy, arguments.steps, handle)
        except AttnmuxError as error:
            print(f"{name:<20} {'':>12} {'':>10}  {str(error).splitlines()[0]}")
            rows.append({"attention": name, "error": str(error).splitlines()[0]})
            if arguments.backend:
                return 1
            continue
        distance = float((latents - own).float().norm() / own.float().norm())
        done = str(handle).splitlines()[0]
        print(f"{name:<20} {1e3 * seconds:>12.1f} {distance:>10.1e}  {done}; {options}", flush=True)
        row = {"attention": name, "ms_per_step": 1e3 * seconds, "distance": distance, "options": options, "done": done}
        rows.append(row)
        frames[name] = decode(latents)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**conditions(arguments, tokens), "rows": rows}, indent=1) + "\n")
    draw(frames, decode(own), arguments.output)
    print(f"picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
