"""Requests that a plan does not cover, and pipelines side by side."""

import threading
import warnings
from dataclasses import replace

import diffusers
import pytest
import tiny
import tiny_models
import torch
from tiny_families import FAMILIES
from tiny_models import FLUX, QWEN, random

import paroattn
from paroattn import TokenGrid
from paroattn.integrations.descriptors import DESCRIPTORS


def flux_like(kind, **arguments):
    pipe = kind(**FLUX.pipe().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**FLUX.arguments(), "num_inference_steps": 2, "output_type": "latent", **arguments}


def kontext():
    return flux_like(
        diffusers.FluxKontextPipeline, image=torch.rand(1, 3, 20, 28), max_area=20 * 28, _auto_resize=False
    )


def qwen_edit():
    pipe = QWEN.pipe()

    def with_another_image(module, args, kwargs):
        """As QwenImageEditPipeline does: the tokens of a second image behind the first, both in img_shapes."""
        kwargs["hidden_states"] = torch.cat((kwargs["hidden_states"], kwargs["hidden_states"][:, :70]), 1)
        kwargs["img_shapes"] = [[(1, 10, 14), (1, 5, 14)]]
        return args, kwargs

    def first_image_only(module, args, kwargs, output):
        return (output[0][:, :140],)

    pipe.transformer.register_forward_pre_hook(with_another_image, with_kwargs=True)
    pipe.transformer.register_forward_hook(first_image_only, with_kwargs=True)
    return pipe, QWEN.call()


def portrait_flux():
    return flux_like(diffusers.FluxPipeline, height=28, width=20)  # as many tokens, another shape


REQUESTS = {"kontext": (kontext, FLUX), "qwen edit": (qwen_edit, QWEN), "portrait": (portrait_flux, FLUX)}


@pytest.mark.parametrize("name", REQUESTS)
def test_tokens_beyond_the_grid_and_other_shapes_run_dense_or_raise(name):
    make, model = REQUESTS[name]
    pipe, call = make()
    plan = tiny.make_plan(model.pipe(), grid=model.grid, precision="int4")

    def run():
        return pipe(**{**call, "generator": torch.Generator().manual_seed(1)})[0]

    full = run()
    with paroattn.apply(pipe, plan), pytest.warns(UserWarning, match="plan is for grid 1x10x14 .* this request has"):
        applied = run()
    assert torch.equal(applied, full)
    with (
        paroattn.apply(pipe, plan, strict=True),
        pytest.raises(paroattn.PlanError, match="Calibrate for such requests") as caught,
    ):
        run()
    assert "\n" not in str(caught.value)


def test_an_ip_adapters_own_attention_is_left_to_it():
    """Its processor attends twice: to the sequence, which the plan takes over, and to the adapter's image."""
    pipe = FLUX.pipe()
    embeds = 3 * random(5, 1, 1, 16)
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(1)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=16, scale=[3.0]))
    pipe.transformer.encoder_hid_proj = _PassOn()
    call = {**FLUX.call(), "joint_attention_kwargs": {"ip_adapter_image_embeds": [embeds]}}

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(1))[0]

    full = run()
    plan = tiny.make_plan(pipe, grid=FLUX.grid)
    with paroattn.apply(pipe, plan, strict=True):
        applied = run()
    assert 0 < torch.linalg.norm(applied - full) <= 1e-4 * torch.linalg.norm(full)
    call["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [-embeds]}
    assert torch.linalg.norm(run() - full) > 1e-2 * torch.linalg.norm(full)


class _PassOn(torch.nn.Module):
    def forward(self, embeds):
        return embeds


def test_vace_takes_the_control_video_along():
    torch.manual_seed(0)
    transformer = diffusers.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, vace_layers=[0], vace_in_channels=8, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    pipe = tiny.tiny_wan()
    pipe.transformer = transformer
    call = {
        "hidden_states": random(1, 1, 4, 6, 8, 10),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": tiny.TEXT,
        "control_hidden_states": random(2, 1, 8, 6, 8, 10),
    }
    with torch.no_grad():
        full = transformer(**call)[0]
        plan = tiny.make_plan(pipe)
        assert plan.model.layers == 3
        with paroattn.apply(pipe, plan, strict=True):
            applied = transformer(**call)[0]
        assert 0 < torch.linalg.norm(applied - full) <= 1e-4 * torch.linalg.norm(full)
        sparse = tiny.make_plan(pipe, torch.eye(2, dtype=torch.bool).expand(1, 3, 2, 2, 2))
        with paroattn.apply(pipe, sparse, strict=True):
            assert torch.linalg.norm(transformer(**call)[0] - full) > 1e-3 * torch.linalg.norm(full)


def test_other_dimensions_are_noticed_within_compiled_code():
    """Compiled in place, the grid is compared within the graph: another one gets a dense graph of its own."""
    pipe = tiny.tiny_wan()
    plan = tiny.make_plan(pipe, precision="int4")
    wide, narrow = tiny.latents(pipe), tiny.latents(pipe, height=48)
    pipe.transformer.compile(fullgraph=True, backend="aot_eager")
    with paroattn.apply(pipe, plan):
        assert not torch.allclose(tiny.latents(pipe), wide, rtol=1e-3)
        torch.testing.assert_close(tiny.latents(pipe, height=48), narrow)
        assert not torch.allclose(tiny.latents(pipe), wide, rtol=1e-3)


def test_two_pipelines_in_two_threads_do_not_meet():
    makers = {"a": (tiny_models.COGVIDEOX, 3), "b": (tiny_models.HUNYUAN, 5), "c": (tiny_models.COGVIDEOX, 7)}
    pipes, plans, expected, found = {}, {}, {}, {}
    for name, (model, seed) in makers.items():
        pipes[name] = model.pipe()
        blocks = -(-model.grid.tokens // 64)
        masks = torch.rand(1, model.layers, 2, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
        masks |= torch.eye(blocks, dtype=torch.bool) | paroattn.block_mask.text_blocks(model.grid)
        plans[name] = tiny.make_plan(pipes[name], masks, grid=model.grid)
        with paroattn.apply(pipes[name], plans[name], strict=True):
            expected[name] = model.latents(pipes[name], steps=6)
    handles = [paroattn.apply(pipes[name], plans[name], strict=True) for name in makers]

    def generate(name):
        found[name] = makers[name][0].latents(pipes[name], steps=6)

    threads = [threading.Thread(target=generate, args=(name,)) for name in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for name in makers:
        assert torch.equal(found[name], expected[name])
    assert not torch.equal(found["a"], found["c"])


def test_nothing_global_in_diffusers_is_changed():
    from diffusers.models import attention_dispatch, attention_processor
    from diffusers.models.transformers import transformer_flux

    before = [dict(vars(module)) for module in (attention_dispatch, attention_processor, transformer_flux)]
    pipe = FLUX.pipe()
    with warnings.catch_warnings(), paroattn.apply(pipe, tiny.make_plan(pipe, grid=FLUX.grid)):
        FLUX.latents(pipe)
        now = [dict(vars(module)) for module in (attention_dispatch, attention_processor, transformer_flux)]
    assert now == before


IMAGE = torch.cartesian_prod(*(torch.arange(size) for size in (1, 4, 6, 1)))
REFERENCE = IMAGE[: 4 * 6 // 2] + torch.tensor([10, 0, 0, 0])  # of 2 x 6 tokens
TEXT = torch.zeros(5, 4, dtype=torch.long)


def _calls():
    """Class of the transformer, arguments of a forward call, and the token grid; None for tokens that form no boxes."""
    latents = torch.zeros(4, 1, 8, 12)
    indicator = torch.tensor([[0] * 2 + [1] * 3 + [2] * 24, [0] * 3 + [1] * 2 + [2] * 24])
    two = TokenGrid(1, 4, 6, 5, "prefix", ((1, 2, 6),))
    text = {"encoder_hidden_states": torch.zeros(1, 5, 8)}
    return [
        ("Flux2Transformer2DModel", {**text, "img_ids": torch.cat((IMAGE, REFERENCE))}, two),
        ("Flux2Transformer2DModel", {**text, "img_ids": torch.cat((IMAGE, REFERENCE[:-1]))}, None),
        ("Flux2Transformer2DModel", {**text, "img_ids": IMAGE.flip(0)}, None),
        (
            "Flux2Transformer2DModel",
            {**text, "img_ids": torch.arange(18).view(-1, 1) * torch.tensor([[1, 0, 0]])},
            None,
        ),
        ("Flux3Transformer2DModel", {"img_ids": IMAGE, "image_cond_hidden_states": torch.zeros(1, 24, 8)}, None),
        ("Krea2Transformer2DModel", {**text, "position_ids": torch.cat((TEXT, IMAGE, REFERENCE))}, two),
        (
            "MiniMaxH3Transformer3DModel",
            {
                "position_ids": torch.cat((TEXT, IMAGE, TEXT, IMAGE)),
                "video_indices": torch.cat((torch.arange(5, 29), torch.arange(34, 58))),
            },
            None,
        ),
        ("QwenImageTransformer2DModel", {**text, "img_shapes": [[(1, 4, 6), (1, 2, 6)]]}, two),
        (  # two of its five tokens of text are a condition's
            "QwenImage21Transformer2DModel",
            {**text, "img_shapes": [[(1, 2, 4), (1, 4, 6)]]},
            TokenGrid(1, 4, 6, 3 + 8, "prefix"),
        ),
        ("ZImageTransformer2DModel", {"x": [latents, latents[..., 2:]], "cap_feats": [torch.zeros(5, 8)] * 2}, None),
        (
            "Lumina2Transformer2DModel",
            {
                "hidden_states": torch.zeros(2, 4, 8, 12),
                "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
            },
            None,
        ),
        (
            "Ideogram4Transformer2DModel",
            {"position_ids": torch.cat((TEXT, IMAGE))[None], "indicator": indicator[:, :-1]},
            None,
        ),
        ("LTXVideoTransformer3DModel", {"hidden_states": torch.zeros(1, 23, 8)}, None),
        (
            "LTX2VideoTransformer3DModel",
            {"hidden_states": torch.zeros(1, 30, 8), "num_frames": 1, "height": 4, "width": 6},
            TokenGrid(1, 4, 6, 6),
        ),
    ]


@pytest.mark.parametrize(("name", "arguments", "expected"), _calls())
def test_the_grid_of_a_forward_call_has_its_boxes(name, arguments, expected):
    config = type("Config", (), {"patch_size": 2})
    assert DESCRIPTORS[name].grid(config, arguments) == expected


@pytest.mark.family
def test_a_plan_without_references_leaves_a_request_with_an_image_to_the_model():
    model = next(model for model in FAMILIES if model.name == "kontext")
    pipe = model.pipe()
    full = model.latents(pipe)
    plan = tiny.make_plan(pipe, grid=FLUX.grid, precision="int4")
    with (
        paroattn.apply(pipe, plan, other_sizes="adapt") as handle,
        pytest.warns(UserWarning, match="this request has grid 1x10x14 and 1x8x10"),
    ):
        assert torch.equal(model.latents(pipe), full)
    assert handle.report().planned == 0


@pytest.mark.family
def test_without_a_plan_text_with_masks_of_its_own_leaves_attention_to_the_model():
    model = next(model for model in FAMILIES if model.name == "omnigen")
    pipe = model.pipe()
    full = model.latents(pipe)
    with (
        paroattn.apply(pipe, precision="int8") as handle,
        pytest.warns(UserWarning, match="only a plan says which tokens are text"),
    ):
        assert torch.equal(model.latents(pipe), full)
    assert handle.report().planned == 0


@pytest.mark.family
def test_a_plan_is_adapted_to_images_of_other_sizes():
    model = next(model for model in FAMILIES if model.name == "kontext")
    pipe = model.pipe()
    grid = replace(model.grid, references=((1, 10, 6),))
    with paroattn.apply(pipe, tiny.make_plan(pipe, grid=grid), other_sizes="adapt", strict=True) as handle:
        found = model.latents(pipe)
    assert handle.report().planned > 0
    assert torch.allclose(found, model.latents(pipe), rtol=1e-3, atol=1e-4)


def _skyreels_by_blocks_of_frames():
    model = next(model for model in FAMILIES if model.name == "skyreels")
    pipe = model.pipe()
    pipe.transformer.register_to_config(num_frame_per_block=2)
    return model, pipe, {}


def _chroma_with_a_mask_that_adds():
    """As its own text encoder's: 1 for a token, 0 for padding, added to logits."""
    model = next(model for model in FAMILIES if model.name == "chroma")
    masks = {name: mask.float() for name, mask in model.arguments().items() if name.endswith("mask")}
    return model, model.pipe(), masks


@pytest.mark.family
@pytest.mark.parametrize("make", [_skyreels_by_blocks_of_frames, _chroma_with_a_mask_that_adds])
def test_masks_that_do_more_than_hide_keys_leave_attention_to_the_model(make):
    model, pipe, changes = make()
    full = model.latents(pipe, **changes)
    plan = tiny.make_plan(model.pipe(), grid=model.grid, precision="int4")
    with (
        paroattn.apply(pipe, plan) as handle,
        pytest.warns(UserWarning, match="the attention mask hides more than keys"),
    ):
        assert torch.equal(model.latents(pipe, **changes), full)
    assert handle.report().planned == 0
