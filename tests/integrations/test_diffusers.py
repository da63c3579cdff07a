"""Backends of attnmux in models of diffusers, against the models' own attention."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch._dynamo.testing import CompileCounterWithBackend

from attnmux import (
    BackendSpec,
    Capabilities,
    ForwardContextError,
    UnsupportedRequestError,
    get_forward_context,
    set_forward_context,
    use_backend,
)
from attnmux.integrations.diffusers import Rule, Schedule, apply, register_backend, unregister_backend
from attnmux.integrations.diffusers.redirect import active
from attnmux.testing import assert_close_to_oracle, installed, make_backend
from attnmux_sla import TopkRule
from attnmux_vsa import SparsitySchedule

DENSE_VSA = {"backend": "VIDEO_SPARSE_ATTN", "metadata": {"VSA_sparsity": 0.0}}
SPARSE_VSA = {"backend": "VIDEO_SPARSE_ATTN", "metadata": {"VSA_sparsity": 0.75}}
# metadata options go to builders only, impl_args to impls
SPARSE = {
    "VSA": SPARSE_VSA,
    "SLA": {"backend": "SLA_ATTN", "impl_args": {"topk_ratio": 0.3}},
    # layers 0 and 2 have chunks of time, layer 1 of space
    "VMOBA": {"backend": "VMOBA_ATTN", "metadata": {"topk_ratio": 0.3, "st_layer": 0}},
}
DENSE = {
    "VSA": DENSE_VSA,
    "SLA": {"backend": "SLA_ATTN", "impl_args": {"topk_ratio": 1.0}},
    "VMOBA": {"backend": "VMOBA_ATTN", "metadata": {"topk_ratio": 1.0}},
}


@torch.no_grad()
def test_dense_backend_equals_the_models_own_attention(tiny, make):
    own = tiny()
    oracle = copy.deepcopy(tiny).double()()
    with apply(tiny.model, "TORCH_SDPA", modules="all") as handle:
        assert not handle.kept
        assert_close_to_oracle(tiny(), oracle, own)


def test_denoising_with_a_real_scheduler_equals_the_models_own(tiny):
    own = tiny.denoise()
    oracle = copy.deepcopy(tiny).double().denoise()
    with apply(tiny.model, "TORCH_SDPA", modules="all"):
        assert_close_to_oracle(tiny.denoise(), oracle, own)


@pytest.mark.parametrize("method", DENSE)
def test_sparse_backend_denoises_like_dense_attention_at_its_dense_limit(make, method):
    tiny = make()
    own, oracle = tiny.denoise(), make().double().denoise()
    with apply(tiny.model, **DENSE[method]):
        assert_close_to_oracle(tiny.denoise(), oracle, own)


@pytest.mark.parametrize("method", DENSE)
def test_gradients_equal_the_models_own_at_the_dense_limit(make, method):
    tiny = make()
    own, oracle = tiny.gradients(), make().double().gradients()
    with apply(tiny.model, **DENSE[method]):
        ours = tiny.gradients()
    largest = max(float(value.abs().max()) for value in oracle.values())
    for name, value in own.items():
        assert_close_to_oracle(ours[name], oracle[name], value, kind="gradient", what=name, term_size=largest)


@torch.no_grad()
@pytest.mark.parametrize("method", SPARSE)
def test_sparse_backend_is_really_inside(make, method):
    tiny = make()
    own = tiny()
    with apply(tiny.model, **SPARSE[method]):
        assert (tiny() - own).abs().max() > 1000 * torch.finfo(torch.float32).eps


def test_gradients_equal_those_of_the_models_own_attention(tiny):
    own, oracle = tiny.gradients(), copy.deepcopy(tiny).double().gradients()
    with apply(tiny.model, "TORCH_SDPA", modules="all"):
        ours = tiny.gradients()
    assert ours.keys() == own.keys()
    largest = max(float(value.abs().max()) for value in oracle.values())
    for name, value in ours.items():
        assert_close_to_oracle(value, oracle[name], own[name], kind="gradient", what=name, term_size=largest)


@torch.no_grad()
def test_restore_brings_the_model_back_bit_for_bit(tiny):
    own, keys = tiny(), list(tiny.model.state_dict())
    processors = {name: module.processor for name, module in tiny.model.named_modules() if hasattr(module, "processor")}
    handle = apply(tiny.model, "TORCH_SDPA", modules="all")
    handle.restore()
    handle.restore()
    assert torch.equal(tiny(), own)
    assert list(tiny.model.state_dict()) == keys
    assert all(tiny.model.get_submodule(name).processor is processor for name, processor in processors.items())
    assert not tiny.model._forward_pre_hooks
    assert not tiny.model._forward_hooks


def test_context_manager_restores_after_an_exception(make):
    tiny = make()
    with pytest.raises(KeyError), apply(tiny.model, "TORCH_SDPA"):
        raise KeyError
    assert not any("Attnmux" in type(p).__name__ for p in tiny.model.attn_processors.values())


@torch.no_grad()
def test_nothing_leaks_into_diffusers_or_another_model(make):
    registry, names = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName
    before = registry._active_backend, dict(registry._backends), list(names)
    function, torchs = attention_dispatch.dispatch_attention_fn, torch.nn.functional.scaled_dot_product_attention
    first, second = make(), make()
    own = second()
    with apply(first.model, **SPARSE_VSA):
        changed = first()
        assert torch.equal(second(), own)
    assert not torch.equal(changed, own)
    assert (registry._active_backend, dict(registry._backends), list(names)) == before
    assert attention_dispatch.dispatch_attention_fn is function
    assert torch.nn.functional.scaled_dot_product_attention is torchs
    with pytest.raises(ForwardContextError):
        get_forward_context()
    assert (active.processor, active.gate) == (None, None)


@torch.no_grad()
def test_context_is_gone_after_a_forward_that_raised(make):
    tiny = make()
    with apply(tiny.model, **DENSE_VSA):
        with pytest.raises(Exception, match="shape|size"):
            tiny.model(hidden_states=tiny.latents, timestep=torch.ones(1), encoder_hidden_states=torch.randn(1, 7, 5))
        with pytest.raises(ForwardContextError):
            get_forward_context()
        tiny()


def test_self_and_cross_attention_are_chosen_separately(make):
    tiny = make()
    for modules, names in (
        ("self", ["blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1"]),
        ("cross", ["blocks.0.attn2", "blocks.1.attn2", "blocks.2.attn2"]),
        (["blocks.0.*", "blocks.2.attn2"], ["blocks.0.attn1", "blocks.0.attn2", "blocks.2.attn2"]),
    ):
        with apply(tiny.model, "TORCH_SDPA", modules=modules) as handle:
            assert [item.name for item in handle.replaced] == names
            assert str(handle).startswith(f"{len(names)} of 6 attention modules replaced")


def test_text_refiner_is_no_self_attention_of_the_video(make):
    with apply(make("hunyuan_video").model, "TORCH_SDPA") as handle:
        assert [item.name for item in handle.replaced] == [
            "transformer_blocks.0.attn",
            "single_transformer_blocks.0.attn",
        ]
        assert len(handle.kept) == 1


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("wan", ["blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1"]),
        ("hunyuan_video", ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]),
        ("cogvideox", ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]),
    ],
)
def test_layers_know_their_place_whatever_the_model_calls_them(make, model, names):
    tiny = make(model)
    with apply(tiny.model, "SLA_ATTN"):
        impls = [tiny.model.get_submodule(name).processor.attention["SLA_ATTN"].attn_impl for name in names]
        assert [impl.layer_idx for impl in impls] == list(range(len(names)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"modules": "blocks.9.*"}, "0 of 6 attention modules match 'blocks.9.*'; there are 3 self, 3 cross, 0 other"),
        ({"modules": "cross", "backend": "VSA"}, r"blocks.0.attn2 \(cross attention\).*keys of another length"),
        ({"metadata": {"VSA_sparsty": 0.5}}, "metadata: no backend that was chosen takes VSA_sparsty"),
        ({"impl_args": {"topk_ratio": 0.5}}, "impl_args: no backend that was chosen takes topk_ratio"),
        ({"backend": "TORCH_SDPA", "schedule": Schedule()}, "write the backend as the schedule's default"),
        ({"backend": "BLOCK_SPARSE_ATTN"}, "the metadata of BLOCK_SPARSE_ATTN need index"),
    ],
)
def test_what_cannot_be_applied_is_refused_and_changes_nothing(make, call, text):
    tiny = make()
    with pytest.raises(UnsupportedRequestError, match=text):
        apply(tiny.model, **call)
    assert not any("Attnmux" in type(p).__name__ for p in tiny.model.attn_processors.values())
    assert not tiny.model._forward_pre_hooks


def test_model_without_attention_modules_is_refused():
    with pytest.raises(UnsupportedRequestError, match="Linear has no attention module"):
        apply(torch.nn.Linear(2, 2), "TORCH_SDPA")


def test_second_apply_is_refused(make):
    tiny = make()
    with apply(tiny.model, "TORCH_SDPA"), pytest.raises(UnsupportedRequestError, match="restore"):
        apply(tiny.model, "TORCH_SDPA")


def test_diffusers_own_choice_is_refused_while_ours_is_in_place(make):
    tiny = make()
    with (
        apply(tiny.model, "TORCH_SDPA", modules="all"),
        pytest.raises(UnsupportedRequestError, match="set_attention_backend"),
    ):
        tiny.model.set_attention_backend("native")
    assert attention_dispatch._AttentionBackendRegistry._active_backend.value == "native"


def attend(processor, **options):
    q, k, v = torch.randn(3, 1, 5, 2, 64)
    return processor.attend(
        q, k, v, None, **{"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, **options}
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"is_causal": True}, "asks for causal attention"),
        ({"dropout_p": 0.1}, "asks for dropout_p=0.1"),
        ({"scale": 0.5}, r"asks for scale=0.5, the layer was built with 0.125; give apply\(softmax_scale=0.5\)"),
    ],
)
def test_what_the_layer_was_not_built_for_is_refused(make, options, text):
    tiny = make()
    with apply(tiny.model, "TORCH_SDPA") as handle:
        with pytest.raises(UnsupportedRequestError, match=text):
            attend(tiny.model.blocks[0].attn1.processor, **options)
        assert len(handle.replaced) == 3


def test_scale_is_passed(make):
    tiny = make()
    with apply(tiny.model, "TORCH_SDPA", softmax_scale=0.5):
        torch.manual_seed(0)
        ours = attend(tiny.model.blocks[0].attn1.processor, scale=0.5)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 64).transpose(2, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert torch.equal(ours, expected.transpose(1, 2))


@torch.no_grad()
def test_tokens_that_are_no_video_are_refused_by_a_backend_of_videos(make):
    # joined with text tokens the sequence is longer than the grid
    tiny = make("cogvideox")
    with apply(tiny.model, **DENSE_VSA), pytest.raises(UnsupportedRequestError, match="48|56"):
        tiny()


@torch.no_grad()
def test_grid_is_asked_for_where_latents_show_none(make):
    tiny = make("flux")
    with apply(tiny.model, **DENSE_VSA), pytest.raises(UnsupportedRequestError, match="grid="):
        tiny()


@torch.no_grad()
def test_selection_follows_scope_when_nothing_is_named(make):
    tiny = make()
    with use_backend("WINDOW_ATTN"):
        handle = apply(tiny.model)
    assert {item.plan.backends for item in handle.replaced} == {("WINDOW_ATTN",)}
    handle.restore()
    with apply(tiny.model) as handle:
        assert {item.plan.backends for item in handle.replaced} == {("TORCH_SDPA",)}
        assert "automatic choice" in handle.explain()


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        (SPARSE["VSA"], 1),
        (SPARSE["SLA"], 1),
        (SPARSE["VMOBA"], 2),
        # the first layer is another than the second and the third, which are alike
        ({**SPARSE["VSA"], "metadata": {"VSA_sparsity": SparsitySchedule(sparsity=0.75, dense_layers=(0,))}}, 2),
        ({**SPARSE["SLA"], "metadata": {"schedule": [TopkRule(0.5, layers=(0, 0))]}}, 2),
    ],
    ids=["VSA", "SLA", "VMOBA", "VSA by layer", "SLA by layer"],
)
def test_blocks_compile_once_for_all_layers_of_a_kind_and_all_steps(make, options, graphs, compiled_afresh):
    tiny = make()
    with apply(tiny.model, **options) as handle:
        expected = tiny()
        counter = CompileCounterWithBackend("aot_eager")
        tiny.model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert torch.allclose(tiny(), expected, atol=10 * torch.finfo(torch.float32).eps * float(expected.abs().max()))
        for step in range(1, 4):
            handle.step = step
            tiny()
        assert counter.frame_count == graphs


@torch.no_grad()
def test_blocks_compile_before_the_first_pass(make, compiled_afresh):
    tiny = make()
    own = tiny()
    with apply(tiny.model, "VSA", metadata={"VSA_sparsity": 0.0}):
        tiny.model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert torch.allclose(tiny(), own, atol=1e-4)


@torch.no_grad()
def test_whole_model_compiles_where_no_metadata_are_needed_and_is_refused_where_they_are(make, compiled_afresh):
    tiny = make()
    own = tiny()
    with apply(tiny.model, "TORCH_SDPA", modules="all"):
        assert not tiny.model._forward_pre_hooks
        compiled = torch.compile(tiny.model, backend="eager")
        times = torch.full((1,), 500.0)
        assert torch.equal(compiled(tiny.latents, times, **tiny.arguments, return_dict=False)[0], own)
    torch._dynamo.reset()
    with apply(tiny.model, **SPARSE_VSA):
        compiled = torch.compile(tiny.model, backend="eager")
        with pytest.raises(UnsupportedRequestError, match="compile the model block by block"):
            compiled(tiny.latents, times, **tiny.arguments)


def test_checkpointed_blocks_are_recomputed_with_their_own_metadata(make):
    tiny = make()
    tiny.model.train()
    with apply(tiny.model, **SPARSE_VSA):
        expected = tiny.gradients()
        tiny.model.enable_gradient_checkpointing()
        function = tiny.model._gradient_checkpointing_func
        assert all(torch.equal(value, expected[name]) for name, value in tiny.gradients().items())
        # a forward on another grid comes before the backward
        tiny.model.zero_grad()
        loss = tiny().square().mean()
        tiny(tiny.latents[:, :, :2].contiguous())
        loss.backward()
        assert all(
            torch.equal(p.grad, expected[name]) for name, p in tiny.model.named_parameters() if p.grad is not None
        )
        assert tiny.model._gradient_checkpointing_func is function


STEPWISE = Schedule(
    default="VIDEO_SPARSE_ATTN",
    rules=(Rule("TORCH_SDPA", role="cross"), Rule("TORCH_SDPA", layers=(0, 1)), Rule("TORCH_SDPA", steps=(0, 2))),
)


@torch.no_grad()
def test_schedule_by_layer_role_and_step(make):
    tiny = make()
    own = tiny()
    with apply(tiny.model, schedule=STEPWISE, modules="all", metadata=SPARSE_VSA["metadata"]) as handle:
        assert {item.name: str(item.plan) for item in handle.replaced} == {
            "blocks.0.attn1": "TORCH_SDPA",
            "blocks.0.attn2": "TORCH_SDPA",
            "blocks.1.attn1": "TORCH_SDPA, VIDEO_SPARSE_ATTN from step 2",
            "blocks.1.attn2": "TORCH_SDPA",
            "blocks.2.attn1": "TORCH_SDPA, VIDEO_SPARSE_ATTN from step 2",
            "blocks.2.attn2": "TORCH_SDPA",
        }
        assert "VIDEO_SPARSE_ATTN from step 2" in handle.explain()
        with pytest.raises(ForwardContextError, match="on_step_end"):
            tiny()
        handle.step = 1
        assert torch.equal(tiny(), own)
        handle.step = 2
        sparse = tiny()
        assert not torch.equal(sparse, own)
        # the caller's context wins over the handle
        with set_forward_context(current_timestep=0):
            assert torch.equal(tiny(), own)
        handle.on_step_end(object(), 4, None, {})
        assert handle.step == 5
        assert torch.equal(tiny(), sparse)


BY_STEP = {
    "VSA": {
        "backend": "VIDEO_SPARSE_ATTN",
        "metadata": {"VSA_sparsity": SparsitySchedule(sparsity=0.75, dense_steps=2)},
    },
    "SLA": {"backend": "SLA_ATTN", "metadata": {"schedule": [TopkRule(1.0, steps=(1, 1))]}},
    "VMOBA": {"backend": "VMOBA_ATTN", "metadata": {"first_full_step": 2}},
}


@torch.no_grad()
@pytest.mark.parametrize("method", BY_STEP)
def test_options_by_step_without_a_step_are_an_error_and_not_step_0(make, method):
    tiny = make()
    with apply(tiny.model, **BY_STEP[method]) as handle:
        with pytest.raises(ForwardContextError, match="depend on the denoising step, and nothing says which"):
            tiny()
        outputs = []
        for step in (1, 4):
            handle.step = step
            outputs.append(tiny())
        with set_forward_context(current_timestep=4):
            assert torch.equal(tiny(), outputs[1])
    assert not torch.equal(*outputs)


@torch.no_grad()
def test_schedule_by_step_compiles_once_per_phase(make, compiled_afresh):
    tiny = make()
    schedule = Schedule(default="VIDEO_SPARSE_ATTN", rules=(Rule("TORCH_SDPA", steps=(0, 2)),))
    with apply(tiny.model, schedule=schedule, metadata=SPARSE_VSA["metadata"]) as handle:
        counter = CompileCounterWithBackend("eager")
        tiny.model.compile_repeated_blocks(fullgraph=True, backend=counter)
        tiny.denoise(steps=5, handle=handle)
        assert counter.frame_count == 2


def test_two_backends_that_want_metadata_in_one_step_are_refused(make):
    schedule = Schedule(default="VSA", rules=(Rule("BLOCK_SPARSE_ATTN", layers=(0, 1)),))
    with pytest.raises(UnsupportedRequestError, match="want metadata in the same step"):
        apply(make().model, schedule=schedule, metadata={"VSA_sparsity": 0.5})


@torch.no_grad()
def test_own_metadata_of_the_caller_are_used(make):
    from attnmux_vsa import VideoSparseAttentionMetadataBuilder

    tiny = make()
    build = VideoSparseAttentionMetadataBuilder().build
    with apply(tiny.model, **SPARSE_VSA):
        sparse = tiny()
        with set_forward_context(current_timestep=0, attn_metadata=build(0, (5, 12, 16), (1, 2, 2), 0.0)):
            assert not torch.equal(tiny(), sparse)


@torch.no_grad()
def test_grid_may_be_given_in_tokens(make):
    tiny = make()
    with apply(tiny.model, **SPARSE_VSA):
        expected = tiny()
    with apply(tiny.model, **SPARSE_VSA, grid=(5, 6, 8)):
        assert torch.equal(tiny(), expected)


@torch.no_grad()
def test_dispatchers_own_name(make):
    tiny = make()
    own = tiny()
    name = register_backend("TORCH_SDPA")
    try:
        assert register_backend("SDPA") == name
        for processor in tiny.model.attn_processors.values():
            processor._attention_backend = name
        assert torch.equal(tiny(), own)
        with pytest.raises(UnsupportedRequestError, match="dropout_p"):
            attention_dispatch.dispatch_attention_fn(*torch.randn(3, 1, 4, 2, 64), dropout_p=0.5, backend=name)
    finally:
        unregister_backend(name)
    assert name not in {item.value for item in attention_dispatch.AttentionBackendName}
    with pytest.raises(UnsupportedRequestError, match="is not a name that attnmux registered"):
        unregister_backend(name)


def test_dispatcher_takes_no_backend_that_needs_more_than_tensors():
    with pytest.raises(UnsupportedRequestError, match="needs metadata of every forward pass"):
        register_backend("VIDEO_SPARSE_ATTN")


@torch.no_grad()
def test_copy_of_a_model_works_on_its_own(make):
    tiny = make()
    with apply(tiny.model, **SPARSE_VSA):
        expected = tiny()
        copied = copy.deepcopy(tiny)
    own = tiny()
    assert torch.equal(copied(), expected)
    assert not torch.equal(expected, own)


@torch.no_grad()
def test_threads_are_in_phases_of_their_own(make):
    tiny = make()
    schedule = Schedule(default="VIDEO_SPARSE_ATTN", rules=(Rule("TORCH_SDPA", steps=(0, 1)),))
    with apply(tiny.model, schedule=schedule, metadata=SPARSE_VSA["metadata"]):
        expected = []
        for step in (0, 1):
            with set_forward_context(current_timestep=step):
                expected.append(tiny())

        def run(step):
            torch.set_grad_enabled(False)
            with set_forward_context(current_timestep=step):
                return torch.equal(tiny(), expected[step])

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(run, [0, 1] * 6))
    assert not torch.equal(*expected)


class GroupedProcessor:
    """Somebody's own processor: half as many key heads, a scale of its own, and the dispatcher told so."""

    _attention_backend = None
    scale = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, 64)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = dispatch_attention_fn(
            query, key, value, attention_mask, scale=self.scale, enable_gqa=True, backend=self._attention_backend
        )
        return attn.to_out[0](out.flatten(2))


class GroupedModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        attention = Attention(32, heads=4, kv_heads=2, dim_head=64, processor=GroupedProcessor())
        self.blocks = torch.nn.ModuleList([attention])

    def forward(self, hidden_states):
        return self.blocks[0](hidden_states)


@torch.no_grad()
def test_grouped_heads_of_a_foreign_processor_are_passed():
    model, tokens = GroupedModel(), torch.randn(1, 9, 32)
    own = model(tokens)
    with apply(model, "TORCH_SDPA"):
        layer = model.blocks[0].processor.attention["TORCH_SDPA"]
        assert (layer.num_heads, layer.num_kv_heads) == (4, 2)
        assert torch.equal(model(tokens), own)
    with pytest.raises(UnsupportedRequestError, match="4 query heads over 2 key heads"):
        apply(model, "WINDOW_ATTN")


@torch.no_grad()
def test_scale_of_a_foreign_processor_is_passed_or_refused():
    model, tokens = GroupedModel(), torch.randn(1, 9, 32)
    model.blocks[0].processor.scale = 0.3
    own = model(tokens)
    with apply(model, "TORCH_SDPA", softmax_scale=0.3):
        assert torch.equal(model(tokens), own)
    with apply(model, "TORCH_SDPA"), pytest.raises(UnsupportedRequestError, match="scale=0.3"):
        model(tokens)


def test_backends_are_selected_for_the_device_that_is_named(make):
    tiny = make()
    for device, expected in ((None, "cpu"), ("cuda", "cuda"), (torch.device("cuda", 0), "cuda:0")):
        with apply(tiny.model, "TORCH_SDPA", device=device) as handle:
            selection = handle.replaced[0].selections["TORCH_SDPA"]
            assert selection.report.to_dict()["request"]["device"] == expected


@pytest.mark.parametrize(
    ("has_gpu", "device", "says"), [(True, None, True), (False, None, False), (True, "cpu", False)]
)
def test_model_that_is_still_on_the_cpu_is_pointed_out(make, monkeypatch, has_gpu, device, says):
    spec = BackendSpec(
        "GPU_ATTN",
        target="made:Backend",
        capabilities=Capabilities(dtypes={"float32"}, head_sizes={64}, devices={"cuda"}),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with installed(spec, make_backend("GPU_ATTN")), pytest.raises(UnsupportedRequestError, match="cpu") as refused:
        apply(make().model, "GPU_ATTN", device=device)
    assert ("give apply(device='cuda')" in str(refused.value)) is says
