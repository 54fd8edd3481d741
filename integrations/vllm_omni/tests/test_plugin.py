"""The plug-in in vLLM-Omni's contracts: numbers against paroattn.attention, each reason to stay dense, each refusal."""

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import paroattn_vllm_omni
import pytest
import servers
import tomllib
import torch
from paroattn_vllm_omni import backend, report, settings
from servers import GRID, HEAD_DIM, HEADS, LAYERS, build, published, run, server, some_tensors
from vllm_omni.diffusion.attention.backends.abstract import VideoTokenLayout, VideoTokenSpan
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.platforms import current_omni_platform

from paroattn import InputError, PlanError

NAME = "blocks.0.attn1"


@pytest.fixture(scope="module")
def plan():
    return servers.make_plan()


@pytest.fixture(scope="module")
def path(plan, tmp_path_factory):
    file = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    plan.save(file)
    return file


def saved(folder, **changes):
    plan, file = servers.make_plan(**changes), folder / "plan.safetensors"
    plan.save(file)
    return plan, file


def close(output, expected):
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def dense_reason(layer, given, **where):
    """The reason of a call that is dense, and is vLLM-Omni's own result."""
    before = settings.tally.dense
    output = run(layer, given, **where)
    mask = getattr(where.get("metadata"), "attn_mask", None)
    mask = mask[:, None, None] if mask is not None and mask.ndim == 2 else mask
    own = (x.transpose(1, 2) for x in given)
    close(output, torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=mask).transpose(1, 2))
    (reason,) = [reason for reason, count in settings.tally.dense.items() if count != before.get(reason, 0)]
    assert settings.tally.planned == 0
    return reason


def test_every_layer_head_and_noise_level_runs_as_planned(plan, path):
    layers = build(server(path), *(f"blocks.{number}.attn1" for number in range(LAYERS)))
    given, seen = some_tensors(), set()
    SDPAImpl.calls = 0
    for level, bucket in ((1.0, 0), (0.75, 0), (0.4, 1), (0.1, 1)):
        for number, layer in enumerate(layers):
            output = run(layer, given, level)
            close(output, servers.planned(plan, number, bucket, *given))
            seen |= {round(float(x), 4) for x in output.sum((0, 1, 3))}
    assert len(seen) == 2 * LAYERS * HEADS  # each head has a mask of its own in each layer and bucket
    assert (settings.tally.planned, settings.tally.dense, SDPAImpl.calls) == (8, {}, 0)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
@pytest.mark.parametrize("sequence_ranks", [1, 2])
def test_ranks_have_their_own_heads(plan, path, monkeypatch, tensor_ranks, sequence_ranks):
    """The outputs of all ranks, side by side, are those of one."""
    given, outputs = some_tensors(), []
    layer_heads = HEADS // tensor_ranks
    own = layer_heads // sequence_ranks
    monkeypatch.setattr(backend, "get_tensor_model_parallel_world_size", lambda: tensor_ranks)
    for tensor in range(tensor_ranks):
        monkeypatch.setattr(backend, "get_tensor_model_parallel_rank", lambda tensor=tensor: tensor)
        for sequence in range(sequence_ranks):
            if sequence_ranks > 1:
                monkeypatch.setattr(parallel_state, "get_ulysses_parallel_rank", lambda sequence=sequence: sequence)
            layer = build(server(path, ulysses_degree=sequence_ranks), "blocks.1.attn1", heads=layer_heads)
            first = tensor * layer_heads + sequence * own
            outputs.append(run(layer, [x[:, :, first : first + own] for x in given], 0.1))
    close(torch.cat(outputs, 2), servers.planned(plan, 1, 1, *given))
    assert settings.tally.dense == {}


def test_two_transformers_share_names_of_layers_and_not_layers(tmp_path):
    plan, path = saved(tmp_path, layers=2 * LAYERS)
    names = [f"blocks.{number}.attn1" for number in range(LAYERS)]
    given, config = some_tensors(), server(path, boundary_ratio=0.875)
    for number, layer in enumerate(build(config, *names, *names)):
        close(run(layer, given), servers.planned(plan, number, 0, *given))


@pytest.mark.parametrize(("boundary_ratio", "first"), [(0.0, 0), (1.0, LAYERS)])
def test_one_of_two_transformers_has_its_own_layers(tmp_path, boundary_ratio, first):
    plan, path = saved(tmp_path, layers=2 * LAYERS)
    given = some_tensors()
    layer = build(server(path, boundary_ratio=boundary_ratio), "blocks.1.attn1")
    close(run(layer, given), servers.planned(plan, first + 1, 0, *given))


def test_models_are_told_apart_by_their_configuration(plan, path):
    given = some_tensors()
    for _ in range(2):
        close(run(build(server(path), NAME), given), servers.planned(plan, 0, 0, *given))


@pytest.mark.parametrize("masked", [False, True])
def test_padding_for_ranks_takes_no_part(plan, path, masked):
    given = some_tensors(GRID.tokens + 3)
    mask = torch.arange(GRID.tokens + 3)[None] < GRID.tokens
    padding = {"sp_padding_size": 3, "sp_original_seq_len": GRID.tokens}
    output = run(build(server(path), NAME), given, metadata=published(attn_mask=mask if masked else None), **padding)
    close(output[:, : GRID.tokens], servers.planned(plan, 0, 0, *(x[:, : GRID.tokens] for x in given)))
    assert output.shape == given[0].shape
    assert not output[:, GRID.tokens :].any()


def test_a_key_mask_is_obeyed(plan, path):
    given, mask = some_tensors(), torch.rand(1, GRID.tokens) < 0.8
    output = run(build(server(path), NAME), given, metadata=published(attn_mask=mask))
    close(output, servers.planned(plan, 0, 0, *given, key_mask=mask))
    assert settings.tally.planned == 1


SPANS = (VideoTokenSpan(0, (2, 6, 8), "reference"), VideoTokenSpan(96, (2, 6, 8), "target"))


@pytest.mark.parametrize(
    ("reason", "where"),
    [
        ("no token grid", {"metadata": published(video_layout=None)}),
        ("no token grid", {"metadata": published(video_layout=VideoTokenLayout(video_spans=SPANS))}),
        ("see others than the rest", {"metadata": published(full_attn_spans=[[(0, 3)]])}),
        ("see others than the rest", {"metadata": published(query_ranges=())}),
        (
            "see others than the rest",
            {"metadata": published(video_layout=VideoTokenLayout(0, GRID.size, 192, SPANS))},
        ),
        ("tokens before its video", {"metadata": published(video_layout=VideoTokenLayout(8, (4, 23, 2), 192))}),
        ("tokens before its video", {"metadata": published(joint_query=torch.zeros(1))}),
        ("plan is for grid 4x6x8", {"metadata": published(video_layout=VideoTokenLayout(0, (4, 8, 6), 192))}),
        ("mask is none of keys alone", {"metadata": published(attn_mask=torch.ones(1, 1, 192, 192).bool())}),
        ("mask is none of keys alone", {"metadata": published(attn_mask=torch.zeros(1, 192))}),
        ("no noise level", {"level": None}),
    ],
)
def test_what_is_not_published_is_a_reason(path, reason, where):
    assert reason in dense_reason(build(server(path), NAME), some_tensors(), **where)


def test_calls_without_context_or_metadata_are_dense(path):
    layer, given = build(server(path), NAME), some_tensors()
    layer.forward(*given, published())
    layer.forward(*given)
    assert [reason.split(" published ")[1] for reason in settings.tally.dense] == [
        "no noise level of the step",
        "no token grid with the call",
    ]


@pytest.mark.parametrize("prefix", ["blocks.0.attn2", "vace_blocks.0.attn1", "single_blocks.0.attn1", ""])
def test_layers_that_no_plan_is_about_are_dense(path, prefix):
    assert "names none of the plan's layers" in dense_reason(build(server(path), prefix), some_tensors())


def test_causal_grouped_and_turned_attention_are_dense(path):
    query, key, value = some_tensors()
    causal = run(build(server(path), NAME, causal=True), (query, key, value))
    close(causal[:, 0], value[:, 0])
    run(build(server(path), NAME, num_kv_heads=2), (query, key[:, :, :2], value[:, :, :2]))
    run(build(server(path), NAME, qkv_layout="BNSD"), (query, key, value))
    assert list(settings.tally.dense) == [
        "its attention is causal",
        f"its {HEADS} heads share 2 heads of keys and values",
        "its tensors are BNSD, not BSND",
    ]


def test_other_lengths_are_dense(path):
    layer = build(server(path), NAME)
    query, key, value = some_tensors()
    assert "cross-attention" in dense_reason(layer, (query, key[:, :60], value[:, :60]))
    assert "names no padding" in dense_reason(layer, some_tensors(202))
    other = {"sp_padding_size": 10, "sp_original_seq_len": 180}
    assert "names no padding" in dense_reason(layer, some_tensors(202), **other)
    assert "96 tokens; the plan has 192" in dense_reason(layer, some_tensors(96))


def test_heads_that_were_padded_for_ranks_are_dense(path, monkeypatch):
    monkeypatch.setattr(parallel_state, "get_ulysses_parallel_rank", lambda: 2)
    layer = build(server(path, ulysses_degree=3), NAME)
    assert "2 of a layer's 4 heads, which 3 ranks share" in dense_reason(layer, some_tensors(heads=2))


def test_a_plan_for_two_transformers_is_not_used_with_one(tmp_path):
    _, path = saved(tmp_path, layers=2 * LAYERS)
    assert "for two transformers" in dense_reason(build(server(path), NAME), some_tensors())


def test_a_log_has_each_reason_once_and_each_request_in_a_line(path, caplog):
    caplog.set_level(logging.INFO, "vllm_omni.paroattn")
    layer, given = build(server(path), NAME), some_tensors()
    for step in (0, 1, 0):
        run(layer, given, denoise_step_idx=step)
        run(layer, some_tensors(96), denoise_step_idx=step)
    dense = "there are 96 tokens; the plan has 192"
    assert [record.getMessage() for record in caplog.records] == [
        f"paroattn: {path} is in use, for WanTransformer3DModel and grid 4x6x8 (192 visual tokens)",
        f"paroattn: {dense}: the engine's own attention runs instead",
        f"paroattn: 2 of 4 attention calls ran as planned; 2 did not: {dense}",
    ]
    assert report() == f"3 of 6 attention calls ran as planned; 3 did not: {dense}"


@pytest.mark.parametrize(
    ("started", "message"),
    [
        ({"additional_config": {}}, "paroattn_plan in additional_config is None; expected the path of a plan file"),
        ({"additional_config": {"paroattn_plan": 3}}, "paroattn_plan in additional_config is 3"),
        ({"ring_degree": 2}, "ring_degree is 2"),
        ({"allgather_degree": 2}, "allgather_degree is 2"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(path, started, message):
    with pytest.raises(InputError, match=message) as raised:
        build(server(path, **started), NAME)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"not a plan"])
def test_a_bad_file_ends_the_start(tmp_path, content):
    file = tmp_path / "plan.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.safetensors"):
        build(server(file), NAME)


@pytest.mark.parametrize(
    ("changes", "transformer", "names", "message"),
    [
        ({}, {"num_layers": 3}, [NAME], "number of layers is 2, this model's is 3"),
        ({"layers": 3}, {"num_layers": LAYERS}, [NAME], "number of layers is 3, this model's is 2"),
        ({}, {"num_layers": LAYERS}, [NAME, NAME], "number of layers is 2, this model's is 4"),
        (
            {},
            {"_class_name": "WanVACETransformer3DModel"},
            [NAME],
            "class is WanTransformer3DModel, this model's is Wan",
        ),
        ({"class_name": "FluxTransformer2DModel"}, {}, [NAME], "plan is for FluxTransformer2DModel; in vLLM-Omni"),
    ],
)
def test_a_plan_for_another_model_ends_the_start(tmp_path, changes, transformer, names, message):
    _, path = saved(tmp_path, **changes)
    with pytest.raises(PlanError, match=message):
        build(server(path, transformer=transformer), *names)


def test_heads_of_all_tensor_ranks_are_compared(path, monkeypatch):
    with pytest.raises(PlanError, match="number of heads is 4, this model's is 2"):
        build(server(path), NAME, heads=2)
    with pytest.raises(PlanError, match="head_dim is 16, this model's is 8"):
        build(server(path), NAME, head_dim=HEAD_DIM // 2)
    monkeypatch.setattr(backend, "get_tensor_model_parallel_world_size", lambda: 2)
    build(server(path), NAME, heads=2)


def test_the_name_stays_as_it_is_where_its_own_backend_runs(monkeypatch):
    own = DiffusionAttentionBackendEnum.RAINFUSION_ATTN
    try:
        monkeypatch.setattr(type(current_omni_platform), "is_npu", lambda self: True)
        own.clear_override()
        paroattn_vllm_omni.register()
        assert own.get_path() == own.value
        monkeypatch.setattr(type(current_omni_platform), "is_npu", lambda self: False)
    finally:
        paroattn_vllm_omni.register()
        paroattn_vllm_omni.register()  # vLLM-Omni may load plug-ins more than once
    assert own.get_class() is backend.ParoAttentionBackend


def test_the_entry_point_is_the_one_that_vllm_omni_looks_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm_omni.general_plugins"].items()
    assert callable(EntryPoint(name, value, "vllm_omni.general_plugins").load())
    assert not [line for line in project["dependencies"] if "vllm" in line]


def test_the_package_imports_no_host():
    code = "import sys, paroattn_vllm_omni; assert not {'vllm', 'vllm_omni', 'torch'} & sys.modules.keys()"
    source = Path(__file__).parents[1] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source)})
