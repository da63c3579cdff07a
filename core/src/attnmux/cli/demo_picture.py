"""The picture of the demo: what each backend made of a noisy frame, and where a query looked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.testing.clip import PATCH, import_demo_package

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attnmux.cli.demo_runs import BackendRun
    from attnmux.testing.clip import ClipTokens

__all__ = ["draw_picture"]

# inches
_WIDTH = 16.0
_MARGIN = 0.25
_GAP = 0.12
_CAPTION = 0.34
_MAP_COLUMNS = 8
_QUERY_COLOUR = "#ff2d55"
_INK = "#1c1c1e"
_GREY = "#6e6e73"
# how much of a frame's side the magnified part shows
_CROP = 0.25
# weights below this many decades under the largest are drawn as none
_DECADES = 3.0


def draw_picture(
    path: Path,
    tokens: ClipTokens,
    runs: Sequence[BackendRun],
    weights: torch.Tensor,
    *,
    query: int,
    subtitle: str,
) -> None:
    """Write the PNG.

    Args:
        path: Where to.
        tokens: The clip.
        runs: Results, the dense one first.
        weights: Dense softmax weights of the query over all keys, `[S]`.
        query: Raster position of the token that is marked.
        subtitle: One line on clip, tokens and device.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    import_demo_package("matplotlib")
    shown = query // (tokens.grid[1] * tokens.grid[2])
    panels = [
        ("clean", "", tokens.clean[shown]),
        ("noisy", f"{tokens.psnr(tokens.noisy):.1f} dB", tokens.noisy[shown].clamp(0, 1)),
        *((run.name, _result_note(run, runs[0]), run.frames[shown]) for run in runs),
    ]
    maps = [run for run in runs if run.kept is not None]
    columns = _columns(len(panels))
    page = _Page(_height(tokens, len(panels), columns, len(maps)))
    page.title("A noisy clip, denoised by attention", subtitle)
    for start in range(0, len(panels), columns):
        _draw_band(page, tokens, panels[start : start + columns], columns, query)
    page.heading("Where the marked token looks, frame by frame")
    page.note("dense attention: its weights, dark to bright over three decades")
    _draw_maps(page, tokens, _heat_frames(tokens, weights), query)
    for run in maps:
        kept = f", {run.kept_fraction:.1%} of all keys" if run.kept_fraction is not None else ""
        page.note(f"{run.name}: the keys it kept, in colour{kept}")
        _draw_maps(page, tokens, _kept_frames(tokens, run), query)
    page.save(path)


class _Page:
    """A figure that is filled from the top; lengths are inches."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure: Any = Figure(figsize=(_WIDTH, height), dpi=110, facecolor="white")
        self.y = height - _MARGIN

    def title(self, title: str, subtitle: str) -> None:
        self._line(title, 0.42, size=21, weight="bold")
        self._line(subtitle, 0.36, size=11.5, color=_GREY)

    def heading(self, text: str) -> None:
        self.y -= 0.12
        self._line(text, 0.34, size=15, weight="bold")

    def note(self, text: str) -> None:
        self._line(text, 0.27, size=11, color=_INK)

    def caption(self, x: float, width: float, left: str, right: str) -> None:
        base = (self.y - 0.24) / self.height
        self.figure.text(x / _WIDTH, base, left, size=12.5, weight="bold", color=_INK)
        self.figure.text((x + width) / _WIDTH, base, right, size=11, color=_GREY, ha="right")

    def image(self, x: float, top: float, width: float, height: float, pixels: torch.Tensor) -> Any:
        axes = self.figure.add_axes((x / _WIDTH, (top - height) / self.height, width / _WIDTH, height / self.height))
        axes.imshow(pixels.numpy(), interpolation="nearest", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def save(self, path: Path) -> None:
        self.figure.savefig(path, format="png")

    def _line(self, text: str, height: float, **style: Any) -> None:
        self.y -= height
        self.figure.text(_MARGIN / _WIDTH, (self.y + 0.1) / self.height, text, **style)


def _result_note(run: BackendRun, dense: BackendRun) -> str:
    note = f"{run.psnr:.1f} dB"
    if run is dense:
        return f"{note}, dense"
    return f"{note}, {dense.milliseconds / run.milliseconds:.1f}x speed"


def _columns(panels: int) -> int:
    """Return how many frames stand side by side: three or four, whichever leaves fewer places empty."""
    return min((4, 3), key=lambda columns: -panels % columns)


def _cell(tokens: ClipTokens, columns: int) -> tuple[float, float]:
    """Return width and height of one of `columns` frames side by side."""
    width = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) / columns
    return width, width * tokens.clean.shape[1] / tokens.clean.shape[2]


def _height(tokens: ClipTokens, panels: int, columns: int, maps: int) -> float:
    bands = -(-panels // columns)
    band = _CAPTION + 2 * _cell(tokens, columns)[1] + 2 * _GAP
    row = 0.27 + _cell(tokens, _MAP_COLUMNS)[1] + _GAP
    return 2 * _MARGIN + 0.78 + bands * band + 0.46 + (maps + 1) * row


def _draw_band(
    page: _Page, tokens: ClipTokens, panels: list[tuple[str, str, torch.Tensor]], columns: int, query: int
) -> None:
    """Draw frames side by side, below each a part of it, magnified."""
    width, height = _cell(tokens, columns)
    top, left, crop_height, crop_width = _crop(tokens, query)
    for index, (name, note, frame) in enumerate(panels):
        x = _MARGIN + index * (width + _GAP)
        page.caption(x, width, name, note)
        axes = page.image(x, page.y - _CAPTION, width, height, frame)
        _outline(axes, left, top, crop_width, crop_height, "white", 1.6)
        _mark(axes, tokens, query)
        part = frame[top : top + crop_height, left : left + crop_width]
        page.image(x, page.y - _CAPTION - height - 0.04, width, height, part)
    page.y -= _CAPTION + 2 * height + 2 * _GAP


def _draw_maps(page: _Page, tokens: ClipTokens, frames: torch.Tensor, query: int) -> None:
    """Draw one small picture per frame, evenly spaced ones if there are many."""
    count = min(len(frames), _MAP_COLUMNS)
    asked = query // (tokens.grid[1] * tokens.grid[2])
    shown = torch.linspace(0, len(frames) - 1, count).round().long().tolist()
    if asked not in shown:
        shown[min(range(count), key=lambda index: abs(shown[index] - asked))] = asked
    width, height = _cell(tokens, _MAP_COLUMNS)
    for index, frame in enumerate(shown):
        axes = page.image(_MARGIN + index * (width + _GAP), page.y, width, height, frames[frame])
        axes.text(4, tokens.clean.shape[1] - 6, f"{frame}", color="white", size=9, weight="bold")
        if frame == asked:
            _mark(axes, tokens, query)
    page.y -= height + _GAP


def _crop(tokens: ClipTokens, query: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the part of the frame around the query, in pixels."""
    height, width = tokens.clean.shape[1:3]
    rows, columns = max(PATCH, round(height * _CROP)), max(PATCH, round(width * _CROP))
    row, column = _corner(tokens, query)
    top = min(max(row + PATCH // 2 - rows // 2, 0), height - rows)
    left = min(max(column + PATCH // 2 - columns // 2, 0), width - columns)
    return top, left, rows, columns


def _corner(tokens: ClipTokens, query: int) -> tuple[int, int]:
    """Return row and column of a token's upper left pixel."""
    _, rows, columns = tokens.grid
    return query % (rows * columns) // columns * PATCH, query % columns * PATCH


def _mark(axes: Any, tokens: ClipTokens, query: int) -> None:
    row, column = _corner(tokens, query)
    _outline(axes, column - 1, row - 1, PATCH + 2, PATCH + 2, _QUERY_COLOUR, 2.0)


def _outline(axes: Any, x: float, y: float, width: float, height: float, colour: str, line: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linewidth=line))


def _pixels_of_tokens(tokens: ClipTokens, values: torch.Tensor) -> torch.Tensor:
    """Spread one number per token `[S]` over its pixels: `[T, height, width, 1]`."""
    grid = values.reshape(tokens.grid)
    return grid.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[..., None]


def _dimmed(tokens: ClipTokens) -> torch.Tensor:
    return tokens.clean.mean(-1, keepdim=True).expand(-1, -1, -1, 3) * 0.32


def _kept_frames(tokens: ClipTokens, run: BackendRun) -> torch.Tensor:
    assert run.kept is not None
    return torch.where(_pixels_of_tokens(tokens, run.kept), tokens.clean, _dimmed(tokens))


def _heat_frames(tokens: ClipTokens, weights: torch.Tensor) -> torch.Tensor:
    from matplotlib import colormaps

    strength = (torch.log10(weights.clamp(min=1e-30) / weights.max()) / _DECADES + 1).clamp(0, 1)
    strength = _pixels_of_tokens(tokens, strength)
    colours = torch.from_numpy(colormaps["inferno"](0.35 + 0.6 * strength[..., 0].numpy())[..., :3]).float()
    return torch.where(strength > 0, colours, _dimmed(tokens))
