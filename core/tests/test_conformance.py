"""The core's own backends, held to the suite that every plugin is held to."""

from attnmux.testing import BackendConformance


class TestTorchSDPA(BackendConformance):
    backend = "TORCH_SDPA"


class TestFlashAttention(BackendConformance):
    backend = "FLASH_ATTN"
