"""The plug-in in SGLang's contracts: numbers against paroattn.attention, each reason to stay dense, each refusal."""

import logging
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import servers
import tomllib
import torch
from paroattn_sglang import report, settings
from servers import GRID, HEADS, LAYERS, FluxConfig, HunyuanVideoConfig, Request, WanVideoConfig, build, run, start
from servers import tensors as some_tensors
from sglang.multimodal_gen.runtime.distributed import parallel_state
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import AttentionImpl
from sglang.multimodal_gen.runtime.layers.attention.backends.sdpa import SDPAImpl
from sglang.multimodal_gen.runtime.layers.attention.selector import ComponentAttentionBackendNotAppliedError
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

from paroattn import InputError, Plan, PlanError
from paroattn.plan import ModelIdentity


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


def ranks(monkeypatch, *, tensor=(0, 1), sequence=(0, 1)):
    """The process that is tested is a rank of so many."""
    for name, value in (
        ("get_tp_rank", tensor[0]),
        ("get_tp_world_size", tensor[1]),
        ("get_ulysses_parallel_rank", sequence[0]),
        ("get_ulysses_parallel_world_size", sequence[1]),
    ):
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)


def dense_reason(layer, given, **where):
    """The reason of a call that is dense, and is SGLang's own result."""
    before = settings.tally.dense
    output = run(layer, given, **where)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2)
    torch.testing.assert_close(output, exact)
    (reason,) = [reason for reason, count in settings.tally.dense.items() if count != before.get(reason, 0)]
    assert settings.tally.planned == 0
    return reason


def test_every_layer_head_and_step_runs_as_planned(plan, path):
    start(path)
    layers = [build(f"blocks.{number}.attn1") for number in range(LAYERS)]
    given, seen = some_tensors(), set()
    SDPAImpl.calls = 0
    for step, bucket in enumerate((0, 0, 1, 1)):
        for number, layer in enumerate(layers):
            output = run(layer, given, step)
            torch.testing.assert_close(output, servers.planned(plan, number, bucket, *given), atol=1e-5, rtol=1e-5)
            seen |= {round(float(x), 4) for x in output.sum((0, 1, 3))}
    assert len(seen) == 2 * LAYERS * HEADS  # each head has a mask of its own in each layer and bucket
    assert (settings.tally.planned, settings.tally.dense, SDPAImpl.calls) == (8, {}, 0)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
@pytest.mark.parametrize("sequence_ranks", [1, 2])
def test_ranks_have_their_own_heads(plan, path, monkeypatch, tensor_ranks, sequence_ranks):
    """The outputs of all ranks, side by side, are those of one."""
    start(path)
    given, outputs = some_tensors(), []
    layer_heads = HEADS // tensor_ranks
    own = layer_heads // sequence_ranks
    for tensor in range(tensor_ranks):
        for sequence in range(sequence_ranks):
            ranks(monkeypatch, tensor=(tensor, tensor_ranks), sequence=(sequence, sequence_ranks))
            layer = build("blocks.1.attn1", heads=layer_heads)
            first = tensor * layer_heads + sequence * own
            outputs.append(run(layer, [x[:, :, first : first + own] for x in given], step=3))
    expected = servers.planned(plan, 1, 1, *given)
    torch.testing.assert_close(torch.cat(outputs, 2), expected, atol=1e-5, rtol=1e-5)
    assert settings.tally.dense == {}


def test_two_transformers_share_names_of_layers_and_not_layers(tmp_path):
    plan, path = saved(tmp_path, layers=2 * LAYERS)
    start(path, WanVideoConfig(boundary_ratio=0.9))
    given = some_tensors()
    for number, component in enumerate(("transformer", "transformer_2")):
        output = run(build("blocks.1.attn1", component), given)
        expected = servers.planned(plan, number * LAYERS + 1, 0, *given)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", [5, 30])
def test_text_may_be_longer_or_shorter_than_in_the_plan(tmp_path, text):
    plan, path = saved(tmp_path, text=10, class_name="HunyuanVideoTransformer3DModel")
    start(path, HunyuanVideoConfig())
    for number, name in enumerate(("Hunyuan.double_blocks.0.attn", "Hunyuan.single_blocks.1.attn")):
        given = some_tensors(GRID.tokens + text)
        output = run(build(name), given)
        # Only text sees what only text can tell: with its values changed, every row of blocks that keeps it changes.
        changed = [*given[:2], given[2].clone()]
        changed[2][:, GRID.tokens :] += 1
        assert bool((run(build(name), changed) != output).any(-1).all())
        if text == 10:
            torch.testing.assert_close(output, servers.planned(plan, number, 0, *given))
    assert settings.tally.dense == {}


def test_distilled_pipelines_walk_their_own_steps(plan, path):
    start(path, dmd_denoising_steps=[900, 300])
    layer, given = build("blocks.0.attn1"), some_tensors()
    for step in range(2):
        output = run(layer, given, step)
        torch.testing.assert_close(output, servers.planned(plan, 0, step, *given), atol=1e-5, rtol=1e-5)


def test_a_schedulers_own_configuration_says_how_many_timesteps_there_are(plan, path):
    start(path)
    layer, given = build("blocks.0.attn1"), some_tensors()
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=500))
    output = run(layer, given, request=Request(timesteps=torch.tensor([300.0]), scheduler=scheduler))
    torch.testing.assert_close(output, servers.planned(plan, 0, 0, *given), atol=1e-5, rtol=1e-5)


def test_the_bucket_is_looked_up_once_in_a_forward_pass(plan, path, monkeypatch):
    from paroattn.runner import Runner

    start(path)
    levels, original = [], Runner.bucket
    monkeypatch.setattr(Runner, "bucket", lambda self, level: levels.append(level) or original(self, level))
    layers, given = [build(f"blocks.{number}.attn1") for number in range(LAYERS)], some_tensors()
    for step in range(3):
        with set_forward_context(step, None, Request()):
            for layer in layers:
                layer.forward(*given, None)
    assert [round(float(level), 4) for level in levels] == [1.0, 0.75, 0.4]
    assert all(isinstance(level, torch.Tensor) for level in levels)  # of which no value was read


@pytest.mark.parametrize(
    ("reason", "where"),
    [
        ("plan is for grid 4x6x8", {"request": Request(raw_latent_shape=(1, 16, 4, 16, 12))}),
        ("published no latents of frames", {"request": Request(raw_latent_shape=(1, 192, 64))}),
        ("published no latents of frames", {"request": Request(raw_latent_shape=None)}),
        ("published no noise level", {"request": Request(timesteps=None)}),
        ("published no noise level", {"request": Request(scheduler=None)}),
        ("published no noise level", {"step": 4}),
        ("published no noise level", {"step": torch.tensor(0)}),
    ],
)
def test_what_is_not_published_is_a_reason(path, reason, where):
    start(path)
    assert reason in dense_reason(build("blocks.0.attn1"), some_tensors(), **where)


def test_calls_outside_of_a_request_are_dense(path):
    start(path)
    layer, given = build("blocks.0.attn1"), some_tensors()
    layer.forward(*given, None)
    with set_forward_context(0, None, None):
        layer.forward(*given, None)
    assert list(settings.tally.dense.values()) == [2]
    assert "published no request" in report()


@pytest.mark.parametrize(
    ("prefix", "arguments", "reason"),
    [
        ("blocks.0.attn2", {}, "names none of the plan's layers"),
        ("vace_blocks.0.attn1", {}, "names none of the plan's layers"),
        ("", {}, "names none of the plan's layers"),
        ("blocks.0.attn1", {"component": "text_encoder", "lenient": True}, "names none of the plan's layers"),
    ],
)
def test_layers_that_no_plan_is_about_are_dense(path, prefix, arguments, reason):
    start(path)
    assert reason in dense_reason(build(prefix, **arguments), some_tensors())


def test_causal_and_grouped_attention_are_dense(path):
    start(path)
    query, key, value = some_tensors()
    causal = run(build("blocks.0.attn1", causal=True), (query, key, value))
    torch.testing.assert_close(causal[:, 0], value[:, 0])
    run(build("blocks.0.attn1", num_kv_heads=2), (query, key[:, :, :2], value[:, :, :2]))
    assert list(settings.tally.dense) == [
        "its attention is causal",
        f"its {HEADS} heads share 2 heads of keys and values",
    ]


def test_other_lengths_and_dtypes_are_dense(path):
    start(path)
    layer = build("blocks.0.attn1")
    query, key, value = some_tensors()
    assert "cross-attention" in dense_reason(layer, (query, key[:, :60], value[:, :60]))
    assert "202 tokens; the plan has 192" in dense_reason(layer, some_tensors(202))  # padded for a number of ranks


def test_heads_that_no_rank_has_are_dense(path, monkeypatch):
    start(path)
    layer = build("blocks.0.attn1")
    ranks(monkeypatch, sequence=(1, 2))
    assert "3 of a layer's 4 heads, which 2 ranks share" in dense_reason(layer, some_tensors(heads=3))


def test_text_that_ranks_share_is_dense(tmp_path, monkeypatch):
    _, path = saved(tmp_path, text=10, class_name="HunyuanVideoTransformer3DModel")
    start(path, HunyuanVideoConfig())
    layer = build("Hunyuan.double_blocks.0.attn")
    ranks(monkeypatch, sequence=(0, 2))
    reason = dense_reason(layer, some_tensors(GRID.tokens + 10, HEADS // 2))
    assert "2 ranks share a sequence with text" in reason


def test_distilled_steps_that_are_shifted_are_dense(path):
    start(path, dmd_denoising_steps=[900, 300], warp_denoising_step=True)
    assert "published no noise level" in dense_reason(build("blocks.0.attn1"), some_tensors())


def test_packed_sequences_are_dense(path):
    start(path)
    layer = build("blocks.0.attn1")
    query, key, value = (x[0] for x in some_tensors())
    output = layer.forward_varlen(query, key, value, cu_seqlens=torch.tensor([0, 100, 192]), max_seqlen=100)
    assert output.shape == query.shape
    assert "packs several sequences" in report()
    assert type(layer).forward_varlen is not AttentionImpl.forward_varlen  # by which SGLang asks


def test_cross_attention_never_gets_here(path):
    start(path)
    assert isinstance(build("blocks.0.attn2", cross=True), SDPAImpl)


@pytest.mark.parametrize("config", [{}, None, {"topk": 0.5}])
def test_without_a_plan_the_name_is_sglangs_own(config):
    start(None, setting=config or {})
    assert isinstance(build("blocks.0.attn1"), SDPAImpl)


def test_a_log_has_each_reason_once_and_each_request_in_a_line(path, caplog):
    caplog.set_level(logging.INFO, "paroattn_sglang")
    start(path)
    layer, given = build("blocks.0.attn1"), some_tensors()
    first = Request()
    for step in range(2):
        run(layer, given, step, first)
        run(layer, some_tensors(202), step, first)
    run(layer, given, 0, Request())
    dense = "there are 202 tokens; the plan has 192"
    assert [record.getMessage() for record in caplog.records] == [
        f"paroattn: {path} is in use, for WanTransformer3DModel and grid 4x6x8 (192 visual tokens)",
        f"paroattn: {dense}: the engine's own attention runs instead",
        f"paroattn: 2 of 4 attention calls ran as planned; 2 did not: {dense}",
    ]
    assert report() == f"3 of 5 attention calls ran as planned; 2 did not: {dense}"


@pytest.mark.parametrize(
    ("started", "message"),
    [
        ({"setting": {"paroattn_plan": 3}}, r"paroattn_plan in --attention-backend-config is 3; expected the path"),
        ({"setting": {"paroattn_plan": ""}}, "expected the path of a plan file"),
        ({"backend": "fa"}, "the attention backend is fa; expected --attention-backend sparge_attn"),
        ({"backend": None}, "the attention backend is None; expected --attention-backend sparge_attn"),
        ({"config": FluxConfig()}, "which SGLang runs with a WanVideoConfig; this model has a FluxConfig"),
        (
            {
                "backend": None,
                "components": {"transformer": "sparge_attn"},
                "config": WanVideoConfig(boundary_ratio=0.9),
            },
            "cannot tell this model's two transformers apart",
        ),
    ],
)
def test_a_start_that_cannot_be_is_one_line(path, started, message):
    with pytest.raises(InputError, match=message) as raised:
        start(path, **started)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"not a plan"])
def test_a_bad_file_ends_the_start(tmp_path, content):
    file = tmp_path / "plan.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match="plan.safetensors"):
        start(file)


def test_a_plan_for_a_model_that_the_plug_in_does_not_know_ends_the_start(tmp_path):
    _, path = saved(tmp_path, class_name="FluxTransformer2DModel")
    with pytest.raises(PlanError, match="plan is for FluxTransformer2DModel; in SGLang, plans can be used with Wan"):
        start(path, FluxConfig())


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, WanVideoConfig(num_layers=3), "number of layers is 2, this model's is 3"),
        ({}, WanVideoConfig(boundary_ratio=0.9), "number of layers is 2, this model's is 4"),
        ({"layers": 4}, WanVideoConfig(), "number of layers is 4, this model's is 2"),
        ({"model": ModelIdentity("WanTransformer3DModel", "abc", 2, HEADS, 32)}, WanVideoConfig(), "head_dim is 32"),
        ({"text": 10}, WanVideoConfig(), "has text tokens as suffix; this model has no text tokens"),
    ],
)
def test_a_plan_that_does_not_fit_ends_the_building_of_the_model(tmp_path, changes, config, message):
    """By an error that SGLang's loader passes on; after most others it goes on with diffusers' own model."""
    _, path = saved(tmp_path, **changes)
    start(path, config)
    with pytest.raises(ComponentAttentionBackendNotAppliedError, match=message) as raised:
        build("blocks.0.attn1")
    assert isinstance(raised.value, PlanError)
    assert str(path) in str(raised.value)


def test_tensor_ranks_are_counted_when_heads_are_compared(path, monkeypatch):
    start(path)
    with pytest.raises(PlanError, match="number of heads is 4, this model's is 2"):
        build("blocks.0.attn1", heads=2)
    ranks(monkeypatch, tensor=(1, 2))
    build("blocks.0.attn1", heads=2)


def test_plans_are_loaded_whole_while_a_model_is_built(path, plan):
    """SGLang builds models on the meta device, with another default dtype."""
    start(path)
    settings.served_plan.cache_clear()
    layer = build("blocks.0.attn1")
    loaded = settings.served_plan(str(path)).plan
    assert isinstance(loaded, Plan)
    assert loaded.usage.dtype is torch.float32
    given = some_tensors()
    torch.testing.assert_close(run(layer, given), servers.planned(plan, 0, 0, *given), atol=1e-5, rtol=1e-5)


def test_the_entry_point_is_the_one_that_sglang_looks_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["sglang.multimodal_gen.plugins"].items()
    assert callable(EntryPoint(name, value, "sglang.multimodal_gen.plugins").load())
    assert not [line for line in project["dependencies"] if "sglang" in line]


def test_the_package_imports_no_host():
    import subprocess
    import sys

    code = "import sys, paroattn_sglang; assert not {'sglang', 'torch'} & sys.modules.keys()"
    source = Path(__file__).parents[1] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source)})
