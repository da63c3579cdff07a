"""What a backend declares about itself and what a caller asks for, as plain data.

Nothing here imports torch, so a plugin's `plugin.py` can build its `BackendSpec` without loading anything heavy:

    SPEC = BackendSpec(
        name="MY_ATTN",
        target="my_package.backend:MyBackend",
        capabilities=Capabilities(dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, exactness="exact"),
        summary="one line for `attnmux list`",
    )
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnmux.errors import UnsupportedRequestError

__all__ = [
    "DTYPES",
    "MASK_KINDS",
    "PLUGIN_API",
    "SP_STRATEGIES",
    "SUPPORTED_APIS",
    "AttentionBackendEnum",
    "AttentionRequest",
    "BackendSpec",
    "Capabilities",
    "Reason",
    "backend_name_to_enum",
    "canonical_name",
]

PLUGIN_API = 1
"""The plugin API of this core. A plugin writes the number it was written for; it does not import this one."""

SUPPORTED_APIS = frozenset({1})

DTYPES = ("float16", "bfloat16", "float32", "float64")

_SHORT_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32", "fp64": "float64",
    "double": "float64",
}  # fmt: skip

MASK_KINDS = ("bool", "additive", "key_padding")
"""Forms of `attn_mask`: bool (True = attend) or additive float, broadcastable to `[B, H, S_q, S_k]`; key padding is the
bool form `[B, 1, 1, S_k]`."""

SP_STRATEGIES = ("ulysses", "ring", "usp", "allgather_kv")
"""Ways in which ranks share a sequence."""

Exactness = Literal["exact", "sparse", "linear", "quantized"]
CompileSupport = Literal["fullgraph", "breaks"]

_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
_TARGET = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


class AttentionBackendEnum(enum.Enum):
    """Backend names that the core knows; membership says nothing of being installed."""

    TORCH_SDPA = "TORCH_SDPA"
    FLASH_ATTN = "FLASH_ATTN"
    BLOCK_SPARSE_ATTN = "BLOCK_SPARSE_ATTN"
    SLA_ATTN = "SLA_ATTN"
    SAGE_SLA_ATTN = "SAGE_SLA_ATTN"
    SAGE_ATTN = "SAGE_ATTN"
    VIDEO_SPARSE_ATTN = "VIDEO_SPARSE_ATTN"
    VMOBA_ATTN = "VMOBA_ATTN"
    NO_ATTENTION = "NO_ATTENTION"

    @property
    def distribution(self) -> str:
        """Name of the distribution that registers this backend."""
        return _DISTRIBUTIONS[self.value]


_DISTRIBUTIONS = {
    "TORCH_SDPA": "attnmux",
    "FLASH_ATTN": "attnmux",
    "NO_ATTENTION": "attnmux",
    "BLOCK_SPARSE_ATTN": "attnmux-blocksparse",
    "SLA_ATTN": "attnmux-sla",
    "SAGE_SLA_ATTN": "attnmux-sage",
    "SAGE_ATTN": "attnmux-sage",
    "VIDEO_SPARSE_ATTN": "attnmux-vsa",
    "VMOBA_ATTN": "attnmux-vmoba",
}


def canonical_name(name: AttentionBackendEnum | str) -> str:
    """Return a backend's name in its one spelling: upper case, no surrounding blanks."""
    if isinstance(name, AttentionBackendEnum):
        return name.value
    if not isinstance(name, str):
        raise UnsupportedRequestError(
            f"a backend is named by a string or an AttentionBackendEnum member, got {name!r} ({type(name).__name__})"
        )
    return name.strip().upper()


def backend_name_to_enum(backend_name: str) -> AttentionBackendEnum | None:
    """Return the enum member of that name, in any case, or None for an out-of-tree backend."""
    return AttentionBackendEnum.__members__.get(canonical_name(backend_name))


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot serve a request, or what it would use to serve it.

    Attributes:
        code: Short stable word to test on, such as "head_size" or "device".
        text: One clause for a person, with the value asked for and the values supported.
        hint: What to do about it; empty where nothing can be done.
    """

    code: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.hint})" if self.hint else self.text


def _plain(value: object) -> str:
    """Return a torch dtype, a torch device or a string as the plain string that requests keep."""
    return str(value).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What an attention layer needs from its backend.

    Attributes:
        head_size: Channels of one head, >= 1.
        dtype: Of q, k and v; a torch dtype, its name or its short name ("bf16"), kept as the name ("bfloat16").
        device: Where it runs; a torch device or its name, kept as a string ("cuda:0").
        causal: Whether a query sees only keys up to its own position.
        num_heads: Query heads, or None if unknown.
        num_kv_heads: Key and value heads; fewer than `num_heads` means grouped-query attention. None = `num_heads`.
        needs_backward: Whether gradients of q, k and v are needed.
        needs_lse: Whether the log-sum-exp of the scores is needed.
        cross_attention: Whether the lengths of q and k differ.
        mask: Form of the mask that will be passed, one of `MASK_KINDS`, or None.
        sp_size: Ranks over which one sequence is split, >= 1.
        sp_strategy: How they share it, one of `SP_STRATEGIES`; read only where `sp_size` > 1.
        compile: Whether the layer is to trace under `torch.compile(fullgraph=True)`.
        role: Free label of the layer ("self", "cross", ...), for hooks; the core does not read it.
        softmax_scale: Factor on the scores, or None for `head_size ** -0.5`.

    Raises:
        UnsupportedRequestError: A field is out of its range; the message names the field and the value.
    """

    head_size: int
    dtype: str
    device: str
    causal: bool = False
    num_heads: int | None = None
    num_kv_heads: int | None = None
    needs_backward: bool = False
    needs_lse: bool = False
    cross_attention: bool = False
    mask: str | None = None
    sp_size: int = 1
    compile: bool = False
    role: str | None = None
    softmax_scale: float | None = None
    sp_strategy: str = "ulysses"

    def __post_init__(self) -> None:
        dtype = _plain(self.dtype)
        object.__setattr__(self, "dtype", _SHORT_DTYPES.get(dtype, dtype))
        object.__setattr__(self, "device", _plain(self.device))
        for field in ("head_size", "num_heads", "num_kv_heads", "sp_size"):
            value = getattr(self, field)
            if value is None and field in ("num_heads", "num_kv_heads"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedRequestError(f"{field} must be an integer >= 1, got {value!r}")
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise UnsupportedRequestError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; grouped-query "
                "attention gives every key head the same number of query heads"
            )
        if not re.fullmatch(r"\w+(:\d+)?", self.device):
            raise UnsupportedRequestError(f"device {self.device!r} is not a device; expected 'cpu', 'cuda' or 'cuda:N'")
        if self.mask is not None and self.mask not in MASK_KINDS:
            raise UnsupportedRequestError(
                f"mask={self.mask!r} is not a mask form; expected one of {MASK_KINDS} or None"
            )
        if self.sp_strategy not in SP_STRATEGIES:
            raise UnsupportedRequestError(
                f"sp_strategy={self.sp_strategy!r} is unknown; expected one of {', '.join(SP_STRATEGIES)}"
            )

    @property
    def device_type(self) -> str:
        """Device without its index: "cpu", "cuda"."""
        return self.device.partition(":")[0]

    @property
    def uses_gqa(self) -> bool:
        """Whether several query heads share one key head."""
        return bool(self.num_heads and self.num_kv_heads and self.num_heads != self.num_kv_heads)

    @property
    def has_custom_scale(self) -> bool:
        """Whether the factor on the scores is another one than `head_size ** -0.5`."""
        return self.softmax_scale is not None and self.softmax_scale != self.head_size**-0.5

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _arch(value: object) -> int | str:
    """Return a compute capability as the number that is compared: 90 for 90, "90", "sm90", "sm_90a", "9.0"; or "any"."""
    text = str(value).lower().strip()
    if text == "any":
        return "any"
    match = re.fullmatch(r"(?:sm_?)?(\d+)(?:\.(\d))?[af]?", text)
    if not match:
        raise ValueError(f"cuda_archs: {value!r} is no compute capability; write 90, 'sm90' or '9.0', or 'any'")
    return int(match[1]) * 10 + int(match[2]) if match[2] else int(match[1])


def _names(field: str, value: Iterable[object], allowed: Iterable[str] | None = None) -> frozenset[str]:
    if isinstance(value, str):
        raise ValueError(f"{field} is a set of strings, got the string {value!r}; write {{{value!r}}}")
    names = frozenset(_plain(item) for item in value)
    if allowed is not None and (unknown := names - frozenset(allowed)):
        raise ValueError(f"{field}: unknown {sorted(unknown)}; expected some of {sorted(allowed)}")
    return names


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can do. Whatever is not declared counts as unsupported.

    Attributes:
        dtypes: Of q, k and v: some of `DTYPES`.
        head_sizes: Set or range of head sizes.
        devices: Some of "cpu", "cuda" and other torch device types.
        cuda_archs: Compute capabilities as numbers (90 for sm_90); a set, not a minimum; {"any"} for every one.
        causal: Causal attention.
        gqa: Fewer key heads than query heads.
        cross_attention: Keys of another length than queries.
        masks: Some of `MASK_KINDS`.
        varlen: Packed sequences of several lengths, described by the metadata.
        softmax_scale: Any factor on the scores, 0 included.
        backward: Gradients of q, k and v.
        deterministic: Same input, same bits, forward and backward.
        returns_lse: `forward(..., return_lse=True)`.
        exactness: "exact" computes softmax attention over every key; "sparse", "linear" and "quantized" do not, and are
            never chosen automatically. None (undeclared) counts as not exact.
        trainable_parameters: The impl is an `nn.Module` with parameters of its own.
        compile: "fullgraph" traces under `torch.compile(fullgraph=True)`, "breaks" traces with graph breaks.
        sequence_parallel: Strategies over several ranks, some of `SP_STRATEGIES`. "ulysses": right on some of the heads. "ring"
            and "usp": `returns_lse`, and every part of the keys by itself, in any order, is right. "allgather_kv":
            `cross_attention`, and right on some of the queries.
        extra_inputs: Keyword-only tensors that `forward` takes, such as "attn_mask" or "gate_compress".
        needs_metadata: `forward` cannot run without metadata.

    Raises:
        ValueError: A field holds a value that does not exist; the message names the field.
    """

    dtypes: frozenset[str] = frozenset()
    head_sizes: frozenset[int] | range = frozenset()
    devices: frozenset[str] = frozenset()
    cuda_archs: frozenset[int | str] = frozenset()
    causal: bool = False
    gqa: bool = False
    cross_attention: bool = False
    masks: frozenset[str] = frozenset()
    varlen: bool = False
    softmax_scale: bool = False
    backward: bool = False
    deterministic: bool = False
    returns_lse: bool = False
    exactness: Exactness | None = None
    trainable_parameters: bool = False
    compile: CompileSupport | None = None
    sequence_parallel: frozenset[str] = frozenset()
    extra_inputs: frozenset[str] = frozenset()
    needs_metadata: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "dtypes", _names("dtypes", self.dtypes, DTYPES))
        put(self, "devices", _names("devices", self.devices))
        put(self, "masks", _names("masks", self.masks, MASK_KINDS))
        put(self, "sequence_parallel", _names("sequence_parallel", self.sequence_parallel, SP_STRATEGIES))
        if self.sequence_parallel & {"ring", "usp"} and not self.returns_lse:
            raise ValueError(
                "sequence_parallel: 'ring' and 'usp' merge parts by their log-sum-exp: declare returns_lse"
            )
        if "allgather_kv" in self.sequence_parallel and not self.cross_attention:
            raise ValueError("sequence_parallel: 'allgather_kv' has more keys than queries: declare cross_attention")
        put(self, "extra_inputs", _names("extra_inputs", self.extra_inputs))
        put(self, "cuda_archs", frozenset(_arch(arch) for arch in self.cuda_archs))
        if not isinstance(self.head_sizes, range):
            put(self, "head_sizes", frozenset(int(size) for size in self.head_sizes))
        if self.exactness not in (None, "exact", "sparse", "linear", "quantized"):
            raise ValueError(f"exactness={self.exactness!r}; expected 'exact', 'sparse', 'linear' or 'quantized'")
        if self.compile not in (None, "fullgraph", "breaks"):
            raise ValueError(f"compile={self.compile!r}; expected 'fullgraph', 'breaks' or None")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able data: sets become sorted lists, a range its first, last and step."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, frozenset):
                value = sorted(value, key=lambda item: (isinstance(item, str), item))
            elif isinstance(value, range):
                value = {"start": value.start, "stop": value.stop, "step": value.step}
            plain[field.name] = value
        return plain

    def missing(self, request: AttentionRequest, cuda_arch: int | None = None) -> list[Reason]:
        """Return every reason why these capabilities do not cover the request; empty if they do.

        Args:
            request: What is asked.
            cuda_arch: Compute capability of the request's device (90 for sm_90); None if it is unknown, which no set of
                architectures but {"any"} covers.
        """
        reasons: list[Reason] = []

        def refuse(code: str, text: str) -> None:
            reasons.append(Reason(code, text))

        if request.dtype not in self.dtypes:
            refuse("dtype", f"dtype={request.dtype} (supported: {_listing(self.dtypes)})")
        if request.head_size not in self.head_sizes:
            refuse("head_size", f"head_size={request.head_size} (supported: {_listing(self.head_sizes)})")
        if request.device_type not in self.devices:
            refuse("device", f"device={request.device} (supported: {_listing(self.devices)})")
        elif request.device_type == "cuda" and "any" not in self.cuda_archs and cuda_arch not in self.cuda_archs:
            found = "unknown" if cuda_arch is None else f"sm_{cuda_arch}"
            refuse("cuda_arch", f"compute capability {found} (supported: {_listing(self.cuda_archs)})")
        for asked, has, code, text in (
            (request.causal, self.causal, "causal", "causal attention"),
            (
                request.uses_gqa,
                self.gqa,
                "gqa",
                f"{request.num_heads} query heads over {request.num_kv_heads} key heads",
            ),
            (request.cross_attention, self.cross_attention, "cross_attention", "keys of another length than queries"),
            (request.has_custom_scale, self.softmax_scale, "softmax_scale", f"softmax_scale={request.softmax_scale}"),
            (request.needs_backward, self.backward, "backward", "gradients"),
            (request.needs_lse, self.returns_lse, "lse", "the log-sum-exp of the scores"),
        ):
            if asked and not has:
                refuse(code, f"{text} (not supported)")
        if request.mask is not None and request.mask not in self.masks:
            refuse("mask", f"a mask of form {request.mask!r} (supported: {_listing(self.masks)})")
        if request.compile and self.compile != "fullgraph":
            refuse("compile", f"fullgraph compilation (declared: {self.compile or 'nothing'})")
        if request.sp_size > 1 and request.sp_strategy not in self.sequence_parallel:
            why = f"declared: {_listing(self.sequence_parallel)}"
            if request.sp_strategy in ("ring", "usp") and not self.returns_lse:
                why += "; it returns no log-sum-exp to merge parts by"
            refuse(
                "sequence_parallel", f"a sequence split over {request.sp_size} ranks by {request.sp_strategy!r} ({why})"
            )
        return reasons


def _listing(values: Iterable[object]) -> str:
    if isinstance(values, range):
        step = f" in steps of {values.step}" if values.step != 1 else ""
        return f"{values.start} to {values[-1]}{step}" if len(values) else "none"
    return ", ".join(str(value) for value in sorted(values, key=lambda item: (isinstance(item, str), item))) or "none"


@dataclass(frozen=True)
class BackendSpec:
    """One backend, as its distribution registers it: data only, nothing is imported until the backend is used.

    Attributes:
        name: Backend name, the same as the entry point's key: upper case, such as "MY_ATTN".
        target: Where the `AttentionBackend` subclass is, "package.module:Class".
        capabilities: What it can do.
        api: Plugin API that the plugin was written for; write the number.
        priority: Rank among exact backends in automatic choice; higher wins.
        aliases: Other names that users may type.
        requires: Distributions that must be installed, as PEP 508 strings ("my-kernels>=1.2").
        probe: "package.module:function", called without arguments; it returns None where the backend can run on this
            machine, else the reason as a string. An exception counts as a reason.
        summary: One line for listings.

    Raises:
        ValueError: A field is malformed; the message names the field and the value.
        TypeError: A field is of the wrong type.
    """

    name: str
    target: str
    capabilities: Capabilities = Capabilities()
    api: int = 1
    priority: int = 0
    aliases: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    probe: str | None = None
    summary: str = ""

    def __post_init__(self) -> None:
        for field in ("aliases", "requires"):
            value = getattr(self, field)
            if isinstance(value, (str, Mapping)):
                raise TypeError(f"{field} is a tuple of strings, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        if not isinstance(self.capabilities, Capabilities):
            raise TypeError(f"capabilities must be a Capabilities, got {type(self.capabilities).__name__}")
        for name in (self.name, *self.aliases):
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"backend name {name!r} must be upper case words joined by '_', such as 'MY_ATTN'")
        for field in ("target", "probe"):
            value = getattr(self, field)
            if value is None and field == "probe":
                continue
            if not isinstance(value, str) or not _TARGET.fullmatch(value):
                raise ValueError(f"{field}={value!r} must be 'package.module:name'")
