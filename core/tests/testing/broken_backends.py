"""Backends that are wrong in one way each, and the few right ones they are made of."""

import time
from dataclasses import dataclass, field, replace

import torch

from attnmux import AttentionMetadata, Capabilities, UnsupportedRequestError
from attnmux.backend import AttentionImpl
from attnmux.testing import FAKE_CAPABILITIES, DenseLimit, FakeImpl, dense_attention_oracle

# one dtype and no compilation keep a run short; both are tested with the right backend
FULL = replace(FAKE_CAPABILITIES, dtypes=frozenset({"float64"}), devices=frozenset({"cpu"}), compile=None,
               sequence_parallel=frozenset())  # fmt: skip
PARTS = replace(FULL, sequence_parallel=frozenset({"ring"}))
MINIMAL = Capabilities(
    dtypes=frozenset({"float64"}), head_sizes=frozenset({32, 64}), devices=frozenset({"cpu"}), exactness="exact"
)


class RightImpl(FakeImpl):
    """The right one, in pieces that the wrong ones replace."""

    dtypes = (torch.float64,)

    def forward(self, query, key, value, attn_metadata=None, *, attn_mask=None, return_lse=False):
        if query.dtype not in self.dtypes:
            raise UnsupportedRequestError(f"inputs of {query.dtype} (supported: {self.dtypes})")
        output, lse = self.attend(query, key, value, attn_mask)
        return (output, lse) if return_lse else output

    def attend(self, q, k, v, mask):
        output, lse = self.compute(q, k, v, mask)
        return output, lse.to(torch.float32).detach()


class StrictImpl(AttentionImpl):
    """Declares nothing optional and refuses all of it."""

    def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, num_kv_heads=None, prefix="", **extra):
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra)
        if causal:
            raise UnsupportedRequestError("STRICT_ATTN cannot run causal=True")
        if softmax_scale not in (None, head_size**-0.5):
            raise UnsupportedRequestError(f"STRICT_ATTN cannot run softmax_scale={softmax_scale}")
        if self.num_kv_heads != num_heads:
            raise UnsupportedRequestError(f"STRICT_ATTN cannot run num_kv_heads={num_kv_heads} under {num_heads} heads")
        if head_size not in (32, 64):
            raise UnsupportedRequestError(f"STRICT_ATTN cannot run head_size={head_size} (supported: 32, 64)")

    def forward(self, query, key, value, attn_metadata):
        if query.shape != key.shape:
            raise UnsupportedRequestError(f"STRICT_ATTN needs one length: S_q={query.shape[1]}, S_k={key.shape[1]}")
        if query.dtype != torch.float64:
            raise UnsupportedRequestError(f"STRICT_ATTN cannot run {query.dtype} (supported: float64)")
        return self.attend(query.detach(), key.detach(), value.detach())

    def attend(self, query, key, value):
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.softmax_scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).contiguous()


class ComputesGradientsUndeclared(StrictImpl):
    def attend(self, query, key, value):
        return super().attend(query.requires_grad_(), key, value)


class AcceptsEverything(StrictImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, num_kv_heads=None, prefix="", **extra):
        super().__init__(num_heads, 32)
        self.softmax_scale = head_size**-0.5

    def forward(self, query, key, value, attn_metadata, **options):
        return self.attend(query, key, value)


class RefusesWithoutNames(StrictImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, num_kv_heads=None, prefix="", **extra):
        try:
            super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra)
        except UnsupportedRequestError:
            raise UnsupportedRequestError("not supported") from None


class RefusesByAssertion(StrictImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, num_kv_heads=None, prefix="", **extra):
        assert not causal, "causal"
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra)


class IgnoresScale(RightImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, *arguments, **options):
        super().__init__(num_heads, head_size, None, *arguments, **options)


class TakesZeroScaleForDefault(RightImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, *arguments, **options):
        super().__init__(num_heads, head_size, softmax_scale or None, *arguments, **options)


class IgnoresCausal(RightImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, *arguments, **options):
        super().__init__(num_heads, head_size, softmax_scale, False, *arguments, **options)


class AlignsCausalTopLeft(RightImpl):
    def attend(self, q, k, v, mask):
        if self.causal and q.shape[1] != k.shape[1]:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
            return RightImpl(self.num_heads, self.head_size, self.softmax_scale).attend(q, k, v, mask)
        return super().attend(q, k, v, mask)


class MutatesItsInput(RightImpl):
    def attend(self, q, k, v, mask):
        result = super().attend(q, k, v, mask)
        # .data hides the write from autograd
        v.data.mul_(1.5)
        return result


class WritesItsInputBack(RightImpl):
    def attend(self, q, k, v, mask):
        result = super().attend(q, k, v, mask)
        with torch.no_grad():
            k.detach().mul_(2.0).mul_(0.5)
        return result


class IsNotDeterministic(RightImpl):
    def attend(self, q, k, v, mask):
        if self.causal or mask is not None:
            return super().attend(q, k, v, mask)
        # another order of summation every time, as atomic additions give
        order = torch.randperm(k.shape[1])
        return super().attend(q, k[:, order], v[:, order], mask)


class DropsTheMask(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None)


class InvertsTheMask(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, ~mask if mask is not None and mask.dtype == torch.bool else mask)


class GivesNaNInEmptyRows(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output.masked_fill((lse == float("-inf")).transpose(1, 2)[..., None], float("nan")), lse


class GivesLSEInBaseTwo(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output, lse * 1.4426950408889634


class GivesLSEByToken(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output, lse.transpose(1, 2)


class GivesZeroLSEInEmptyRows(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output, lse.masked_fill(lse.isinf(), 0.0)


class GivesAPartTheGradientsOfItsOwnSoftmax(RightImpl):
    def part_gradients(self, grad, query, key, value, output, lse, attn_metadata):
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
            part, part_lse = self.compute(q, k, v)
        weight = (part_lse.detach() - lse).exp().transpose(1, 2)[..., None]
        return torch.autograd.grad(part, (q, k, v), grad * weight)


class ForgetsTheScaleInParts(RightImpl):
    def attend_part(self, query, key, value, attn_metadata):
        plain = RightImpl(self.num_heads, self.head_size, num_kv_heads=self.num_kv_heads)
        return plain.attend_part(query, key, value, attn_metadata)


class LeaksAcrossTheBatch(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v + 1e-3 * v.roll(1, 0), mask)


def rounded(x, largest):
    """Return x on a grid of 2**-44 of the largest value, as quantisation does, with the gradient of x."""
    step = largest * 2.0**-44
    return x + ((x / step).round() * step - x).detach()


class QuantisesByTheBatch(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, rounded(v, v.detach().abs().amax()), mask)


class QuantisesByAllHeads(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, rounded(v, v.detach().abs().amax((1, 2, 3), keepdim=True)), mask)


class MixesHeads(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output.roll(1, 2), lse


class HasABandwidthPerHead(RightImpl):
    """Right by its own oracle, and not the same for every head."""

    def attend(self, q, k, v, mask):
        return super().attend(q * bandwidths(self.num_heads), k, v, mask)


def bandwidths(num_heads):
    return torch.linspace(0.5, 1.0, num_heads, dtype=torch.float64)[:, None]


def bandwidth_oracle(self, q, k, v, metadata, *, softmax_scale, causal, attn_mask, impl):
    q = q * bandwidths(q.shape[2])
    return dense_attention_oracle(q, k, v, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask)


def bandwidth_lse(self, q, k, metadata, *, softmax_scale, causal, attn_mask):
    q = q * bandwidths(q.shape[2])
    return dense_attention_oracle(
        q, k, k, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask, return_lse=True
    )[1]


class LeavesMemoryUnwritten(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        # stands for a padded row that is computed with: harmless while fresh memory happens to be finite
        padding = torch.empty((), dtype=q.dtype)
        return output + torch.where(padding.isfinite(), 0.0, padding), lse


class LosesThePartialTile(RightImpl):
    def attend(self, q, k, v, mask):
        length = k.shape[1] if k.shape[1] < 64 else k.shape[1] // 64 * 64
        if self.causal or mask is not None:
            length = k.shape[1]
        return super().attend(q, k[:, :length], v[:, :length], mask)


class TilesKeyHeads(RightImpl):
    """Query head h reads key head h % H_kv."""

    def attend(self, q, k, v, mask):
        group = self.num_heads // k.shape[2]
        dense = RightImpl(self.num_heads, self.head_size, self.softmax_scale, self.causal)
        return dense.attend(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1), mask)


class SwapsCrossLengths(RightImpl):
    """Takes the number of keys from q."""

    def attend(self, q, k, v, mask):
        if self.causal or mask is not None:
            return super().attend(q, k, v, mask)
        return super().attend(q, k[:, : q.shape[1]], v[:, : q.shape[1]], mask)


class LeavesComputeDtype(RightImpl):
    dtypes = (torch.float32, torch.float64)

    def attend(self, q, k, v, mask):
        return super().attend(q.double(), k.double(), v.double(), mask)


class ReturnsItsInput(RightImpl):
    """Over a single key attention is the value: no copy is the fastest."""

    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        alone = k.shape == q.shape and k.shape[1] == 1 and mask is None
        return (v if alone else output), lse


class AssumesContiguousKeys(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, k.as_strided(k.shape, torch.empty(k.shape, device="meta").stride()), v, mask)


class OverflowsOnLargeScores(RightImpl):
    def attend(self, q, k, v, mask):
        if self.causal or mask is not None or self.num_kv_heads != self.num_heads:
            return super().attend(q, k, v, mask)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.softmax_scale).exp()
        sums = weights.sum(-1, keepdim=True)
        output = torch.einsum("bhqk,bkhd->bqhd", weights / sums, v).contiguous()
        return output, sums.squeeze(-1).log().float().detach()


class ComputesInFloat32(RightImpl):
    def attend(self, q, k, v, mask):
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        output, lse = super().attend(q.float(), k.float(), v.float(), mask)
        return output.to(q.dtype), lse


class BreaksTheGraph(RightImpl):
    def attend(self, q, k, v, mask):
        if v.sum().item() > 1e30:
            raise UnsupportedRequestError("values are too large")
        return super().attend(q, k, v, mask)


class CompilesForEveryLength(RightImpl):
    tables = dict.fromkeys(range(2048), 1.0)

    def attend(self, q, k, v, mask):
        return super().attend(q, k * self.tables[k.shape[1]], v, mask)


class HalvesTheGradientOfKeys(RightImpl):
    def attend(self, q, k, v, mask):
        return super().attend(q, (k + k.detach()) / 2, v, mask)


class CutsTheGraph(RightImpl):
    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output.detach(), lse


class SwallowsUnknownInputs(RightImpl):
    def forward(self, query, key, value, attn_metadata=None, *, attn_mask=None, return_lse=False, **unknown):
        return super().forward(query, key, value, attn_metadata, attn_mask=attn_mask, return_lse=return_lse)


class SwallowsUnknownArguments(RightImpl):
    def __init__(self, num_heads, head_size, softmax_scale=None, causal=False, num_kv_heads=None, prefix="", **extra):
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix)


class TakesTheMaskByPosition(RightImpl):
    def forward(self, query, key, value, attn_metadata=None, attn_mask=None, *, return_lse=False):
        return super().forward(query, key, value, attn_metadata, attn_mask=attn_mask, return_lse=return_lse)


class KeepsInputsOnItself(RightImpl):
    def attend(self, q, k, v, mask):
        self.query = q
        # another thread gets its turn
        time.sleep(0.002)
        return super().attend(self.query, k, v, mask)


class KeepsTheMask(RightImpl):
    mask = None

    def attend(self, q, k, v, mask):
        if mask is not None:
            self.mask = mask
        return super().attend(q, k, v, self.mask)


class ShiftsByTheBatch(RightImpl):
    """Attention does not see the order of keys, so that a shift that is undone after it goes unnoticed."""

    def preprocess_qkv(self, qkv, attn_metadata):
        return qkv if self.causal else qkv.roll(qkv.shape[0], 1)

    def postprocess_output(self, output, attn_metadata):
        return output if self.causal else output.roll(-output.shape[0], 1)


class DoesNotUndoItsShift(RightImpl):
    def preprocess_qkv(self, qkv, attn_metadata):
        return qkv.roll(1, 1)


class Scaled(RightImpl, torch.nn.Module):
    """Right, with a parameter: one factor on the output."""

    def __init__(self, *arguments, **options):
        torch.nn.Module.__init__(self)
        RightImpl.__init__(self, *arguments, **options)
        # float64, so that rounding it is no error of the backend
        self.gain = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def attend(self, q, k, v, mask):
        output, lse = super().attend(q, k, v, mask)
        return output * self.factor().to(output.dtype), lse

    def factor(self):
        return 1.0 + self.gain.double()


class HasStateOutsideTheStateDict(Scaled):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.offset = torch.rand((), dtype=torch.float64)

    def factor(self):
        return super().factor() + self.offset.double()


class DoesNotTrainItsParameter(Scaled):
    def factor(self):
        return super().factor().detach()


def scaled_oracle(self, q, k, v, metadata, *, softmax_scale, causal, attn_mask, impl):
    gain = impl.gain + float(getattr(impl, "offset", 0.0))
    dense = dense_attention_oracle(q, k, v, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask)
    return dense * (1.0 + gain)


SCALED = {"oracle": scaled_oracle, "dense_limit": lambda self, q, k: DenseLimit()}
SCALED_CAPABILITIES = replace(FULL, exactness="linear", trainable_parameters=True, returns_lse=False)


class ScaledWithoutLSE(Scaled):
    """Right: `SCALED_CAPABILITIES`, oracle in `SCALED`."""

    def forward(self, query, key, value, attn_metadata=None, *, attn_mask=None):
        return super().forward(query, key, value, attn_metadata, attn_mask=attn_mask)


class HasStateOutsideTheStateDictWithoutLSE(ScaledWithoutLSE, HasStateOutsideTheStateDict):
    pass


class DoesNotTrainItsParameterWithoutLSE(ScaledWithoutLSE, DoesNotTrainItsParameter):
    pass


class IsNotDenseAtItsLimit(ScaledWithoutLSE):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        torch.nn.init.constant_(self.gain, 0.01)


@dataclass
class MetadataWithFunction(AttentionMetadata):
    choose: object = field(default_factory=lambda: lambda x: x)


class MetadataWithoutDecorator(AttentionMetadata):
    grid: tuple = (1, 1, 1)


@dataclass
class MetadataWithLength(AttentionMetadata):
    length: int = 0


class ReadsMetadata(RightImpl):
    """Right: refuses missing metadata, and metadata of another length."""

    def forward(self, query, key, value, attn_metadata=None, *, attn_mask=None, return_lse=False):
        if attn_metadata is None:
            raise UnsupportedRequestError("attn_metadata is needed: build it with the metadata builder")
        if attn_metadata.length != query.shape[1]:
            raise UnsupportedRequestError(f"metadata for {attn_metadata.length} tokens, q has {query.shape[1]}")
        return super().forward(query, key, value, attn_metadata, attn_mask=attn_mask, return_lse=return_lse)


class IgnoresMetadata(RightImpl):
    pass


def make_length_metadata(self, seq_len_q, seq_len_k, *, batch, device):
    return MetadataWithLength(current_timestep=0, length=seq_len_q)
