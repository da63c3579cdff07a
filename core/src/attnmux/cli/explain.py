"""`attnmux explain`: which backend would serve a request, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnmux.report import Candidate, SelectionReport

__all__ = ["explain"]


def explain(
    backend: Annotated[str | None, typer.Option(help="Ask for this backend instead of the automatic choice.")] = None,
    head_size: Annotated[int, typer.Option(help="Channels of one head.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA if there is one.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option(help="Key heads; fewer than the query heads is GQA.")] = None,
    softmax_scale: Annotated[
        float | None, typer.Option(help="Factor on the scores; default: head size ** -0.5.")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="Form of the mask: bool, additive or key_padding.")] = None,
    sp_size: Annotated[int, typer.Option(help="Ranks that one sequence is split over.")] = 1,
    sp_strategy: Annotated[
        str, typer.Option(help="How ranks share it: ulysses, ring, usp or allgather_kv.")
    ] = "ulysses",
    role: Annotated[str | None, typer.Option(help="Label of the layer, for hooks.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="A query sees keys up to its own position.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Gradients are needed.")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="The log-sum-exp is needed.")] = False,
    cross: Annotated[bool, typer.Option("--cross", help="Keys have another length than queries.")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile(fullgraph=True) is to trace it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain which backend would serve a request, with the reasons for and against every candidate.

    Exit status 1 if none would, or if the backend that is named cannot.
    """
    from attnmux.cli.output import plain_text, plugin_output_to_stderr, print_error, print_json, show
    from attnmux.errors import AttnmuxError
    from attnmux.selector import current_device, select_backend
    from attnmux.spec import AttentionRequest

    request = AttentionRequest(
        head_size=head_size,
        dtype=dtype,
        device=device or current_device(),
        causal=causal,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        needs_backward=train,
        needs_lse=lse,
        cross_attention=cross,
        mask=mask,
        sp_size=sp_size,
        sp_strategy=sp_strategy,
        compile=compile_,
        role=role,
        softmax_scale=softmax_scale,
    )
    refusal: AttnmuxError | None = None
    with plugin_output_to_stderr(as_json=as_json):
        try:
            report = select_backend(request, backend=backend).report
        except AttnmuxError as error:
            if error.report is None:
                raise
            report, refusal = error.report, error
    if as_json:
        print_json(report.to_dict())
    else:
        header, _, _ = report.explain().partition("\n  ")
        show(plain_text(header), _table(report))
    if refusal is None:
        return
    # the message of a failed automatic choice is the report itself, which is on stdout already
    if not as_json and report.source != "automatic":
        print_error(refusal, as_json=False)
    raise typer.Exit(1)


def _table(report: SelectionReport) -> RenderableType:
    from attnmux.cli.output import make_table

    cells = [
        (row.backend, row.status, f"{row.distribution} {row.version}".strip(), _why(row)) for row in report.candidates
    ]
    return make_table(("backend", "status", "distribution", "why"), cells)


def _why(row: Candidate) -> str:
    lines = [str(reason) for reason in row.reasons]
    if row.hint and not any(row.hint in line for line in lines):
        lines.append(row.hint)
    return "\n".join(lines)
