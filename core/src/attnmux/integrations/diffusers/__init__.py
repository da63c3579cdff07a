"""Any attnmux backend in a diffusers transformer.

    from attnmux.integrations.diffusers import apply

    handle = apply(transformer, backend="VIDEO_SPARSE_ATTN", metadata={"VSA_sparsity": 0.8})
    print(handle)  # 30 of 60 attention modules replaced ...
    pipeline(..., callback_on_step_end=handle.on_step_end)
    handle.restore()

Every processor keeps its own mathematics; only the attention inside is replaced. diffusers' registry, environment and other
models are not touched. `register_backend` is the other way: a name for diffusers' own dispatcher, where that is enough.
"""

from attnmux.integrations.diffusers.applied import Applied, Replacement, apply
from attnmux.integrations.diffusers.dispatcher import register_backend, unregister_backend
from attnmux.schedule import Rule, Schedule

__all__ = ["Applied", "Replacement", "Rule", "Schedule", "apply", "register_backend", "unregister_backend"]
