"""`paroattn bench model`: what is called, what is timed, and its records."""

import json
import time

import pytest
import tiny
import torch
from click.testing import CliRunner
from paroattn_lab.speed import attention_share, model_bench
from paroattn_lab.speed.forward_arguments import CALLS, forward_arguments
from paroattn_lab.speed.model_bench import bench_model
from paroattn_lab.speed.presets import PRESETS
from paroattn_lab.speed.random_plan import random_plan
from paroattn_lab.speed.rounds import interleaved, median_and_spread, paired_ratio
from paroattn_lab.speed.subjects import Subject, pipeline_of, random_subject
from tiny_models import MODELS

from paroattn.cli.group import command_line
from paroattn.grid import TokenGrid
from paroattn.integrations.apply import apply
from paroattn.integrations.descriptors import DESCRIPTORS, attention_modules, describe
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import rebind
from paroattn.order import AXIS_ORDERS

SIZE = (21, 64, 80)  # frames and pixels of tiny.GRID
SIZE_TEXT = "21x64x80"


@pytest.fixture
def subject():
    transformer = tiny.tiny_wan().transformer
    return Subject("tiny", pipeline_of([transformer]), forward_arguments(transformer, SIZE), "random", 2)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    tiny.tiny_wan().transformer.save_config(tmp_path)
    return path


def bench(*arguments):
    return CliRunner().invoke(command_line, ["bench", "model", "--device", "cpu", *map(str, arguments)])


def test_a_config_is_timed_with_random_weights_and_recorded(config, tmp_path):
    output = tmp_path / "records.jsonl"
    arguments = ["--config", config, "--size", SIZE_TEXT, "--density", "0.5", "--density", "0.75", "--rounds", 2]
    result = bench(*arguments, "--json", "--output", output)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert records == [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["method"] for record in records] == ["own attention", "paroattn", "paroattn"]
    assert [record["density"] for record in records] == [1, 0.5, 0.75]
    for record in records:
        assert record["kind"] == "model"
        assert (record["tokens"], record["layers"], record["model_layers"]) == (120, 2, 2)
        assert (record["heads"], record["head_dim"], record["batch"]) == (2, 24, 1)
        assert (record["weights"], record["dtype"], record["compiled"]) == ("random", "float32", False)
        assert record["median_ms"] > 0
        assert 0 < record["attention_share"] < 1
        assert {"machine", "threads", "versions", "commit"} <= record.keys()
    assert records[0]["times_own"] == 1
    assert records[1]["precision"] == "int8"
    assert records[1]["backend"]


def test_the_table_names_contenders_and_sizes(config):
    result = bench("--config", config, "--size", SIZE_TEXT, "--rounds", 1, "--density", "0.75", "--layers", 1)
    assert result.exit_code == 0, result.output
    for text in ("own attention", "paroattn int8", "0.750", "120 tokens, 1 of 2 layers"):
        assert text in result.stdout


@pytest.mark.models
def test_the_bundled_model_is_called_as_its_pipeline_calls_it():
    result = bench("--size", "2x128x128", "--rounds", 1, "--density", "0.5", "--precision", "exact", "--json")
    assert result.exit_code == 0, result.output
    own, planned = (json.loads(line) for line in result.stdout.splitlines())
    assert (own["model"], own["weights"], own["tokens"]) == ("moving-digits", "the model's", 512)
    assert planned["precision"] == "exact"
    assert planned["density"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_class_can_be_called_with_random_arguments(model):
    transformer = model.pipe().transformer
    size = (9, 128, 192)
    arguments = forward_arguments(transformer, size, batch=2, text_tokens=model.grid.text_tokens or 5)
    with torch.no_grad():
        output = transformer(**arguments, return_dict=False)[0]
    assert bool(output.isfinite().all())
    assert len(output) == 2
    per_frame, per_pixel = CALLS[type(transformer).__name__].compression(transformer.config)
    grid = describe(transformer).grid(transformer.config, arguments)
    side = per_pixel if type(transformer).__name__.startswith("LTX") else 2 * per_pixel
    assert (grid.frames, grid.height, grid.width) == (
        8 // per_frame + 1 if per_frame > 1 else 1,
        128 // side,
        192 // side,
    )
    assert grid.text_tokens == model.grid.text_tokens


def test_every_model_class_that_can_be_timed_is_one_that_paroattn_knows():
    assert CALLS.keys() <= DESCRIPTORS.keys()


@pytest.mark.parametrize(
    ("name", "tokens", "layers", "heads", "head_dim"),
    [
        ("wan-2.1-1.3b-480p", 32_760, 30, 12, 128),
        ("wan-2.1-14b-720p", 75_600, 40, 40, 128),
        ("wan-2.2-14b-720p", 75_600, 40, 40, 128),
        ("cogvideox-5b", 17_776, 42, 48, 64),
        ("hunyuanvideo-720p", 119_056, 60, 24, 128),
    ],
)
def test_presets_have_the_published_sizes(name, tokens, layers, heads, head_dim):
    found = random_subject(name, device=torch.device("meta"), dtype=torch.bfloat16)
    identity = Pipeline(found.pipe).identity
    assert found.grid.tokens == tokens
    assert (
        (identity.layers, identity.heads, identity.head_dim)
        == (layers, heads, head_dim)
        == (found.layers, heads, head_dim)
    )


def test_flux_has_the_published_size():
    arguments = {"device": torch.device("meta"), "dtype": torch.bfloat16}
    found = random_subject("flux.1-dev", **arguments)
    assert found.arguments["img_ids"].shape[0] + found.arguments["txt_ids"].shape[0] == 4096 + 512
    assert found.layers == 57
    assert len(attention_modules(random_subject("flux.1-dev", layers=6, **arguments).transformer)) == 6
    assert "flux.1-dev" in PRESETS


def test_weights_are_of_the_dtype_except_what_diffusers_keeps_in_float32(config):
    found = random_subject(str(config), SIZE, device=torch.device("cpu"), dtype=torch.bfloat16).transformer
    assert found.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert found.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_twin_has_the_same_weights_and_attention_of_its_own(subject):
    twin = subject.twin()
    assert twin.transformer.blocks[0].ffn.net[2].weight is subject.transformer.blocks[0].ffn.net[2].weight
    expected = subject.step()
    assert torch.equal(twin.step(), expected)
    with apply(twin.pipe, random_plan(Pipeline(twin.pipe).identity, twin.grid, 0.5, seed=1)):
        assert not torch.equal(twin.step(), expected)
        assert torch.equal(subject.step(), expected)


def test_random_plans_have_exactly_the_density_and_keep_text():
    identity = Pipeline(tiny.tiny_wan(layers=3, heads=2)).identity
    plan = random_plan(identity, TokenGrid(4, 16, 16, 30, "prefix"), 0.5, "int8/bf16", seed=3)
    blocks = 17 * 17
    assert (plan.densities() * blocks).unique().tolist() == [round(0.5 * blocks)]
    assert len(plan.mask_table) == 2
    assert plan.mask_index[0].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert len(plan.order_names) > len(AXIS_ORDERS)
    assert len(plan.order_index.unique()) > 1
    assert [str(precision) for precision in plan.precisions] == ["int8/bf16"]


class Slow:
    def __call__(self, call):
        time.sleep(0.05)
        return call.dense()


def test_the_share_of_attention_is_that_of_the_attention_calls(subject):
    modules = attention_modules(subject.transformer)
    for module in modules:
        module.processor = rebind(module.processor, Slow())
    processors = [module.processor for module in modules]
    found = attention_share.attention_seconds(subject.step, processors, subject.device)
    assert 100 < found["attention_ms"] < 1000
    assert 0.5 < found["attention_share"] < 1
    assert all(isinstance(processor._paroattn_intercept, Slow) for processor in processors)


def test_on_a_gpu_the_share_is_what_a_step_without_attention_lacks(subject, monkeypatch):
    modules = attention_modules(subject.transformer)
    for module in modules:
        module.processor = rebind(module.processor, lambda call: calls.append(call) or call.dense())
    calls = []

    def kernel_ms(step, device):
        calls.clear()
        step()
        return 10.0 if calls else 4.0

    monkeypatch.setattr(attention_share, "_kernel_ms", kernel_ms)
    processors = [module.processor for module in modules]
    found = attention_share.attention_seconds(subject.step, processors, torch.device("cuda"))
    assert found == {"attention_ms": 6.0, "attention_share": 0.6}
    assert kernel_ms(subject.step, None) == 10.0  # the intercepts are back


def test_a_plan_is_timed_in_the_bucket_of_its_typical_density(subject):
    blocks = torch.ones(3, 2, 2, 2, 2, dtype=torch.bool)
    blocks[1, :, :, 0, 1] = False  # 0.75
    blocks[2, :, :, [0, 1], [1, 0]] = False  # 0.5
    plan = tiny.make_plan(subject.pipe, blocks, edges=(0.0, 1 / 3, 2 / 3), schedule=(0.9, 0.7, 0.3))
    records = bench_model(subject, plan=plan, rounds=1, progress=False)
    assert records[1]["density"] == 0.75
    assert records[1]["plan"]["bucket"] == 1
    twin = subject.twin().at(model_bench.level_in(plan, 1))
    own = twin.step()
    with apply(twin.pipe, plan, strict=True):
        expected = twin.step()
    assert records[1]["difference"] == pytest.approx(float((expected - own).norm() / own.norm()), rel=1e-4)


def test_all_contenders_are_compiled_alike(subject, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    records = bench_model(subject, (0.5, 0.75), compiled=True, rounds=1, progress=False)
    assert compiled == ["WanTransformerBlock"] * 2 * 3
    assert all(record["compiled"] for record in records)


def test_attention_that_is_not_the_models_is_not_timed(config, monkeypatch):
    monkeypatch.setattr(model_bench, "_DIFFERENCE_LIMITS", {"int8": 1e-9})
    result = bench("--config", config, "--size", SIZE_TEXT, "--density", "0.5")
    assert result.exit_code == 2
    assert "int8 with all blocks is" in result.stderr
    assert "from the model's own attention; expected at most 1e-09" in result.stderr
    assert not result.stdout


def test_kernels_that_do_not_take_the_inputs_are_left_out(subject, caplog):
    own = subject.step()
    (contender,) = model_bench._sdpa_contender(subject, own, "sdpa math", "MATH")
    assert contender.difference < 1e-5
    assert model_bench._sdpa_contender(subject, own, "sdpa cudnn", "CUDNN_ATTENTION") == []
    assert "sdpa cudnn is left out" in caplog.text


def test_rounds_are_interleaved_and_the_first_does_not_count():
    calls = []

    def contender(name, seconds):
        return lambda: calls.append(name) or seconds.pop(0)

    times = interleaved([contender("a", [9.0, 2.0, 4.0]), contender("b", [9.0, 1.0, 1.0])], 2, progress=False)
    assert calls == ["a", "b"] * 3
    assert times == [[2.0, 4.0], [1.0, 1.0]]
    assert paired_ratio(*times) == 3
    assert median_and_spread(times[0])["median_ms"] == 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no-such"], "config 'no-such' is no file; expected one, or one of wan-2.1-1.3b-480p"),
        (["--config", "CONFIG"], "size is missing"),
        (["--config", "BROKEN", "--size", SIZE_TEXT], "is not a JSON object"),
        (
            ["--config", "OTHER", "--size", SIZE_TEXT],
            "is of class 'UNet2DModel'; without weights WanTransformer3DModel",
        ),
        (["--config", "CONFIG", "--size", "3x4"], "size is 1x3x4; expected at least 16 x 16 pixels"),
        (["--config", "CONFIG", "--size", "big"], "'big'; expected FRAMESxHEIGHTxWIDTH"),
        (["--config", "CONFIG", "--size", SIZE_TEXT, "--layers", "3"], "layers is 3; expected 1 to 2"),
        (["--config", "CONFIG", "--size", SIZE_TEXT, "--density", "0.1"], "density 0.1 cannot be reached"),
        (["--config", "CONFIG", "--size", SIZE_TEXT, "--density", "2"], "density is 2.0"),
        (["--config", "CONFIG", "--size", SIZE_TEXT, "--precision", "int9"], "int9"),
        (["--config", "CONFIG", "--size", "21x128x160", "--backend", "magic"], "backend 'magic' is unknown"),
        (["--config", "CONFIG", "--size", SIZE_TEXT, "--plan", "none"], "plan file 'none' does not exist"),
        (["--config", "CONFIG", "--model", "x"], "expected one of them"),
        (["--layers", "2"], "--layers is 2, which needs --config"),
        (["--model", "no-such-model"], "model 'no-such-model' does not exist"),
        pytest.param(
            ["--device", "cuda"],
            "--device is 'cuda', but torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_bad_arguments_end_with_one_line(config, arguments, message):
    (config.parent / "broken.json").write_text("[1")
    (config.parent / "other.json").write_text('{"_class_name": "UNet2DModel"}')
    paths = {"CONFIG": config, "BROKEN": config.parent / "broken.json", "OTHER": config.parent / "other.json"}
    result = bench(*(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
    assert "Traceback" not in result.output
