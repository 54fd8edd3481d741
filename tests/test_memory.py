"""What users do with a pipeline while a plan is applied: moving, offloading, quantising, adapting, saving; and where
masks live on a GPU.
"""

import diffusers
import pytest
import tiny
import tiny_models
import torch
from packaging.version import Version
from torch import nn

import paroattn
from paroattn import runner
from paroattn.block_mask import block_count, text_blocks
from paroattn.calibration.checkpoint import weights_fingerprint
from paroattn.integrations.linear import block_linears

MODEL = tiny_models.COGVIDEOX
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def relative_error(latents, expected):
    return float(torch.linalg.norm(latents.cpu() - expected.cpu()) / torch.linalg.norm(expected.cpu()))


def latents_on(device, pipe, **changes):
    """Latents from embeddings that are on a device, as a pipeline's own text encoder would leave them there."""
    call = {name: value.to(device) for name, value in MODEL.call().items() if isinstance(value, torch.Tensor)}
    return MODEL.latents(pipe, **call, **changes)


def dense_plan(pipe):
    return tiny.make_plan(pipe, grid=MODEL.grid, edges=(0.0, 0.5), schedule=(0.9, 0.4))


def sparse_plan(pipe, buckets=3):
    generator, blocks = torch.Generator().manual_seed(3), block_count(MODEL.grid.tokens, 64)
    masks = torch.rand(buckets, 2, 2, blocks, blocks, generator=generator) < 0.3
    masks |= torch.eye(blocks, dtype=torch.bool) | text_blocks(MODEL.grid)
    edges = tuple(number / buckets for number in range(buckets))
    return tiny.make_plan(pipe, masks, grid=MODEL.grid, edges=edges, schedule=tuple(1 - edge for edge in edges))


@pytest.fixture
def pipe():
    return MODEL.pipe()


@CUDA
def test_a_large_table_stays_in_the_hosts_memory(pipe, monkeypatch):
    device, plan = torch.device("cuda", 0), sparse_plan(pipe)
    with paroattn.apply(pipe, plan, strict=True):
        expected = MODEL.latents(pipe, steps=6)
    pipe.to(device)
    found = []
    for most in (2**28, 0):
        monkeypatch.setattr(runner, "MOST_ON_GPU", most)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        table = runner.resident(plan.mask_table, device)
        assert table.device == device
        assert torch.equal(table.cpu(), plan.mask_table)
        assert (torch.cuda.memory_allocated() > before) == (most > 0)
        with paroattn.apply(pipe, plan, strict=True):
            found.append(latents_on(device, pipe, steps=6))
    assert torch.equal(*found)
    assert relative_error(found[0], expected) < 1e-3


def test_one_table_of_masks_serves_all_layers(pipe):
    layers = sparse_plan(pipe).layers()
    assert len({layer.mask_table.data_ptr() for layer in layers}) == 1
    assert len({layer.orders.data_ptr() for layer in layers}) == 1


def test_moving_to_another_dtype_while_applied(pipe):
    call = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in MODEL.call().items()
    }

    def latents():
        return pipe(**call, generator=torch.Generator().manual_seed(7))[0].float()

    with paroattn.apply(pipe, dense_plan(pipe)):
        pipe.to(torch.bfloat16)
        applied = latents()
    assert relative_error(applied, latents()) < 0.05


def offload_model(pipe, device):
    pipe.enable_model_cpu_offload(device=device)


def offload_groups(pipe, device):
    pipe.transformer.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
    pipe.vae.to(device)


def offload_sequentially(pipe, device):
    pipe.enable_sequential_cpu_offload(device=device)


OFFLOADS = [
    *(pytest.param(offload, device, id=f"{offload.__name__}-{device}") for offload in (offload_model, offload_groups)
      for device in (torch.device("cpu"),)),
    *(pytest.param(offload, torch.device("cuda", 0), marks=CUDA, id=f"{offload.__name__}-cuda")
      for offload in (offload_model, offload_groups, offload_sequentially)),  # accelerate cannot do the last on a CPU
]  # fmt: skip


@pytest.mark.parametrize(("offload", "device"), OFFLOADS)
@pytest.mark.parametrize("first", ["offload", "apply"])
def test_offloading_goes_together_with_a_plan(pipe, offload, device, first):
    if offload is offload_groups and device.type == "cpu" and Version(diffusers.__version__) < Version("0.37"):
        pytest.skip("diffusers 0.36 offloads groups to a GPU only")
    expected, plan = MODEL.latents(pipe), dense_plan(pipe)
    if first == "offload":
        offload(pipe, device)
    with paroattn.apply(pipe, plan, strict=True):
        if first == "apply":
            offload(pipe, device)
        applied = latents_on(device, pipe)
    assert 0 < relative_error(applied, expected) < (1e-4 if device.type == "cpu" else 1e-2)


def test_quantised_weights_go_together_with_a_plan(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    expected = MODEL.latents(pipe)
    assert weights_fingerprint([pipe.transformer]) == weights_fingerprint([pipe.transformer])
    assert weights_fingerprint([pipe.transformer]) != weights_fingerprint([MODEL.pipe().transformer.apply(_negate)])
    with paroattn.apply(pipe, dense_plan(pipe)):
        assert 0 < relative_error(MODEL.latents(pipe), expected) < 1e-4


@pytest.mark.parametrize("first", ["quantised", "applied", "loaded"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_quantised_linear_layers_go_together_with_a_plan(pipe, first, compiled, tmp_path):
    """Before `apply`, after it, and where diffusers quantises while loading, as far as the order can matter."""
    quantization = pytest.importorskip("torchao.quantization")
    plan, plain = sparse_plan(pipe), MODEL.latents(pipe)
    with paroattn.apply(pipe, plan, strict=True):
        sparse = MODEL.latents(pipe)
    chosen = block_linears(pipe.transformer)
    if first == "loaded":
        names = [name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        others = [name for name in names if pipe.transformer.get_submodule(name) not in chosen]
        pipe.transformer.save_pretrained(tmp_path)
        config = diffusers.TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig(), others)
        pipe.transformer = type(pipe.transformer).from_pretrained(
            tmp_path, quantization_config=config, torch_dtype=torch.float32
        )
    elif first == "quantised":
        assert paroattn.quantize_linears(pipe, "int8") == len(chosen) > 0
    handle = paroattn.apply(pipe, plan, strict=True, compile_blocks=compiled)
    if first == "applied":
        paroattn.quantize_linears(pipe, "int8")
    found = MODEL.latents(pipe)
    handle.remove()
    quantised = MODEL.latents(pipe)
    assert 1e-5 < relative_error(found, sparse) < 0.1
    assert 1e-5 < relative_error(quantised, plain) < 0.1
    assert torch.equal(MODEL.latents(pipe), quantised)
    assert relative_error(found, quantised) > 2 * relative_error(found, sparse)  # blocks are left out still


def test_linear_layers_outside_of_blocks_and_of_modulations_stay(pipe):
    names = {module: name for name, module in pipe.transformer.named_modules()}
    chosen = {names[module] for module in block_linears(pipe.transformer)}
    assert "transformer_blocks.0.attn1.to_q" in chosen
    assert all(name.startswith("transformer_blocks.") for name in chosen)
    flux = tiny_models.FLUX.pipe().transformer
    names = {module: name for name, module in flux.named_modules()}
    assert not any("norm" in names[module] for module in block_linears(flux))
    with pytest.raises(ValueError, match="format is 'int4'; expected one of float8, int8"):
        paroattn.quantize_linears(pipe, "int4")


def _negate(module):
    for parameter in module.parameters(recurse=False):
        parameter.data.neg_()


@pytest.mark.parametrize("first", ["adapter", "apply"])
def test_a_lora_loaded_before_or_after_takes_effect(pipe, first):
    peft = pytest.importorskip("peft")
    plain, plan = MODEL.latents(pipe), dense_plan(pipe)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    if first == "adapter":
        pipe.transformer.add_adapter(config)
    with paroattn.apply(pipe, plan):
        if first == "apply":
            pipe.transformer.add_adapter(config)
        applied = MODEL.latents(pipe)
    assert relative_error(applied, plain) > 0.05
    assert relative_error(applied, MODEL.latents(pipe)) < 1e-4


def test_projections_fused_before_go_together_and_fused_after_are_named(pipe):
    plan, expected = dense_plan(pipe), MODEL.latents(pipe)
    pipe.transformer.fuse_qkv_projections()
    with paroattn.apply(pipe, plan):
        assert relative_error(MODEL.latents(pipe), expected) < 1e-4
    pipe.transformer.unfuse_qkv_projections()
    with paroattn.apply(pipe, plan) as handle:
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(ValueError, match="processors were replaced after paroattn was applied") as caught:
            MODEL.latents(pipe)
        assert "\n" not in str(caught.value)
        handle.remove()


def test_saving_while_applied_saves_the_model_alone(pipe, tmp_path):
    before = pipe.transformer.state_dict().keys()
    with paroattn.apply(pipe, sparse_plan(pipe)):
        assert pipe.transformer.state_dict().keys() == before
        pipe.save_pretrained(tmp_path)
        assert not [module for module in pipe.transformer.modules() if isinstance(module, nn.Module) and
                    type(module).__module__.startswith("paroattn")]  # fmt: skip
    loaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert loaded.state_dict().keys() == before


@CUDA
@pytest.mark.parametrize("most", [2**28, 0], ids=["on the device", "in the host's memory"])
def test_a_captured_graph_follows_the_noise_level(monkeypatch, most):
    """Nothing is asked of the device: a CUDA graph replays with the masks of the level that is in its input."""
    monkeypatch.setattr(runner, "MOST_ON_GPU", most)
    device = torch.device("cuda", 0)
    own = runner.Runner(sparse_plan(MODEL.pipe(), buckets=2), device, backend="triton")
    query, key, value = torch.randn(3, 1, MODEL.grid.tokens, 2, 16, device=device, dtype=torch.bfloat16)
    level = torch.ones((), device=device)

    def call():
        return own.call(0, query, key, value, bucket=own.bucket(level))

    expected = []
    for noise in (1.0, 0.0):
        level.fill_(noise)
        expected.append(call().clone())
    assert not torch.equal(*expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for number in (0, 1, 0):
        level.fill_(1.0 - number)
        graph.replay()
        torch.testing.assert_close(output, expected[number])
