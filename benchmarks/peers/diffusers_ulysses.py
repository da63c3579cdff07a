"""diffusers' own ulysses attention, from PyPI, over all ranks."""

import torch.distributed as dist


def make_ulysses(device):
    """Return a function of shards q, k, v `[B, rows, H, D]`, rows and heads multiples of the ranks.

    Raises:
        ImportError: diffusers is not installed, or too old.
    """
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    size = dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh(device.type, (1, size), mesh_dim_names=("ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=1, ulysses_degree=size))
    config.setup(dist.get_rank(), size, device, mesh=mesh)
    backend = "_native_cudnn" if device.type == "cuda" else "native"

    def attend(q, k, v):
        return dispatch_attention_fn(q, k, v, backend=backend, parallel_config=config)

    return attend


def version():
    """The name of the row."""
    try:
        import diffusers
    except ImportError:
        return "diffusers"
    return f"diffusers {diffusers.__version__}"
