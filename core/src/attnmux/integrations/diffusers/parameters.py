"""Parameters that backends bring into a model: where they are, and how they come from a checkpoint.

They live under the processor, `<module>.processor.attention.<BACKEND>.attn_impl.<name>` and
`<module>.processor.to_gate_compress.<name>`, so that `state_dict()` and `save_pretrained()` hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from attnmux.integrations.diffusers.processor import AttnmuxProcessor

__all__ = ["load_parameters"]


def load_parameters(processors: Mapping[str, AttnmuxProcessor], checkpoint: str | Path) -> list[str]:
    """Copy into the processors what a checkpoint holds for them and return the names that it holds.

    Besides the names of this package those are understood that models with the layers in the block or the attention module
    itself give: `<module or block>.attn_impl.<name>`, `<module or block>.to_gate_compress.<name>`.

    Args:
        processors: By the path of their attention module.
        checkpoint: A `.safetensors` file, or a folder that holds some.

    Raises:
        UnsupportedRequestError: There is no such file, or a tensor has another shape; names it.
    """
    stored = _stored_names(checkpoint)
    loaded = []
    for path, processor in processors.items():
        for name, target in processor.state_dict(keep_vars=True).items():
            source = next((key for key in _aliases(path, name) if key in stored), None)
            if source is None:
                continue
            value = _read(stored[source], source)
            if value.shape != target.shape:
                raise UnsupportedRequestError(
                    f"{stored[source]}: {source} is {list(value.shape)}, and {path} needs {list(target.shape)}; it belongs to "
                    "another model or backend"
                )
            with torch.no_grad():
                target.copy_(value)
            loaded.append(f"{path}.processor.{name}")
    return loaded


def _aliases(path: str, name: str) -> Iterator[str]:
    yield f"{path}.processor.{name}"
    # attention.<BACKEND>.attn_impl.<name> is attn_impl.<name> where a layer is the block's own
    short = name.partition("attn_impl.")
    tail = f"attn_impl.{short[2]}" if short[1] else name
    yield f"{path}.{tail}"
    yield f"{path.rpartition('.')[0]}.{tail}"


def _stored_names(checkpoint: str | Path) -> dict[str, Path]:
    from safetensors import safe_open

    place = Path(checkpoint)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise UnsupportedRequestError(
            f"checkpoint={str(checkpoint)!r} is neither a .safetensors file nor a folder that holds one; give the folder that "
            "save_pretrained() wrote"
        )
    names: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def _read(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        value: Any = tensors.get_tensor(name)
    assert isinstance(value, torch.Tensor)
    return value
