"""The report as a file: what it says comes from records; what a browser makes of it is in test_browser.py."""

import json
import re

import pytest
import report_pages
import tiny
import torch
from paroattn_lab.quality.head_study import AttentionMaps, study_heads
from paroattn_lab.quality.table_rows import TableRow, headline, table_rows
from paroattn_lab.report import head_browser, launch_note, pairs_of, time_parts, write_report
from paroattn_lab.report.charts import quality_chart
from paroattn_lab.report.clips import embedded_clips
from paroattn_lab.report.head_browser import browser_data


@pytest.fixture(scope="module")
def html(report_inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report_pages.write(path, report_inputs)
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]
    return path.read_text()


def test_the_page_loads_nothing(html):
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(link.startswith(("data:", "#")) for link in links)  # markers of charts are links within the page
    assert not re.search(r"https?://", html)


def test_what_users_write_is_escaped(html):
    assert report_pages.EVIL not in html
    assert "<script>alert" not in html
    assert html.count("<script") == html.count("</script>") == 5


def test_figures_are_those_of_the_records(report_inputs, html):
    for record in report_inputs["records"]:
        assert f"{record['psnr']:.2f}" in html
        assert f"{record['speed_up']:.2f}x" in html
    shown = headline(table_rows(report_inputs["records"]))
    assert f"{shown.density:.1%}" in html
    assert f"{shown.attention_speed_up:.1f}x" in html


def test_records_alone_make_a_page(report_inputs, tmp_path):
    bare = [{key: value for key, value in record.items() if key != "attention"} for record in report_inputs["records"]]
    write_report(tmp_path / "bare.html", bare)
    page = (tmp_path / "bare.html").read_text()
    assert "Not measured: attention&#39;s own speed." in page
    assert "<video" not in page
    assert 'id="head-browser"' not in page


def test_the_study_finds_errors_times_and_maps(report_inputs):
    study, plans = report_inputs["study"], report_inputs["plans"]
    for name, found in study.plans.items():
        assert found.errors.shape == plans[name].mask_index.shape
        assert found.seconds > 0
        assert found.full_seconds > 0
    exact, sparse = (study.plans[name] for name in ("all blocks", report_pages.SHOWN))
    assert exact.errors.max() < 1e-4 < 0.01 < sparse.errors.max()
    # On average over a row, attention is uniform attention; whole rows of blocks are compared.
    assert torch.allclose(study.maps.original[..., 0, :].mean(-1), torch.ones(()), atol=0.1)
    assert not torch.allclose(study.maps.original, study.maps.chosen, atol=1e-3)


def test_the_study_leaves_the_pipeline_as_it_was(report_inputs):
    model, plan = report_inputs["model"], report_inputs["plans"]["all blocks"]
    before = model.generate("first", 1)
    study_heads(model, {"x": plan}, ("first", 1), shown="x", progress=False)
    assert torch.equal(model.generate("first", 1), before)


def test_the_study_uses_the_masks_of_each_step(report_inputs):
    model = report_inputs["model"]
    masks = torch.ones(2, 2, 2, 2, 2, dtype=torch.bool)
    masks[1] &= torch.eye(2, dtype=torch.bool)
    plan = tiny.make_plan(model.pipe, masks, edges=(0.0, 0.5))
    study = study_heads(model, {"x": plan}, ("first", 1), shown="x", progress=False)
    errors = study.plans["x"].errors
    assert errors[0].max() < 1e-4  # all blocks
    assert errors[1].min() > 1e-3  # the diagonal
    assert len(errors[1].unique()) == 4  # no head is a copy of another
    assert study.maps.original.isfinite().all()
    assert not torch.equal(study.maps.original[0], study.maps.original[1])


def test_times_add_up_to_the_transformers(report_inputs):
    attention = {"prompt": "second", "seed": 2, "seconds": 1.0, "full_seconds": 3.0, "prologue_seconds": 0.25}
    times = {"attention": attention, "transformer_seconds": [9.0, 2.5], "full_attention_seconds": [9.0, 5.0]}
    (record, _) = report_inputs["records"]
    assert time_parts(table_rows([{**record, **times}])) == {
        "full attention": {"attention": 3.0, "other": 2.0},
        record["variant"]: {"reordering and quantising": 0.25, "attention": 0.75, "other": 1.5},
    }
    unknown = {**attention, "prologue_seconds": None}
    assert time_parts(table_rows([{**record, **times, "attention": unknown}]))[record["variant"]]["attention"] == 1.0


@pytest.mark.parametrize("limit", [60_000, 10_000_000])
def test_clips_stay_within_their_limit_and_say_so(report_inputs, limit):
    rows = table_rows(report_inputs["records"])
    shown = headline(rows)
    clips = embedded_clips(pairs_of(shown), report_inputs["videos"], rows, shown, 8, limit=limit)
    assert len(json.dumps(clips)) < limit + 2000
    assert clips["wanted"] == 2 * len(rows)
    assert (clips["embedded"] < clips["wanted"]) == (limit < 100_000)
    worst = min(range(2), key=lambda number: shown.pair_values("psnr")[number])
    assert clips["pairs"][0]["prompt"] == report_inputs["prompts"][worst]
    assert clips["pairs"][0]["variants"][0]["name"] == shown.name


def test_an_image_is_an_image(report_inputs):
    rows = table_rows(report_inputs["records"])
    images = {name: [video[:1] for video in videos] for name, videos in report_inputs["videos"].items()}
    clips = embedded_clips(pairs_of(rows[0]), images, rows, rows[0], 8)
    assert clips["images"]
    assert clips["pairs"][0]["full"].startswith("data:image/webp;base64,")


def test_large_plans_are_averaged_down_until_they_fit(report_inputs):
    plan = report_inputs["plans"][report_pages.SHOWN]
    torch.manual_seed(0)
    noise = torch.rand(*plan.mask_index.shape, 64, 64) * 10
    maps = AttentionMaps(noise, noise.flip(-1), 500)
    whole = browser_data(plan, None, maps)["maps"]
    small = browser_data(plan, None, maps, map_bytes=20_000)["maps"]
    none = browser_data(plan, None, maps, map_bytes=100)["maps"]
    assert whole["size"] == [64, 64]
    assert small["size"] < [64, 64]
    assert sum(map(len, small["original"] + small["chosen"])) <= 20_000
    assert none["original"] == []


def test_order_names_in_words():
    assert head_browser.order_meaning("FHW") == "the model's own order"
    assert head_browser.order_meaning("HWF") == "frames vary fastest, then columns, then rows"
    assert head_browser.order_meaning("4x2x8").endswith("4 frames x 2 rows x 8 columns")


def record(**changes):
    base = {
        "variant": "paroattn 0.3",
        "density": 0.3,
        "precisions": ["exact"],
        "orders": ["FHW", "HWF"],
        "method": "paroattn",
        "asked_density": 0.3,
        "precision": "exact",
        "calibration": {"method": "paroattn", "density": 0.3},
        "psnr": 30.0,
        "psnr_spread": 1.0,
        "pairs": [{"prompt": "a", "seed": 1, "psnr": 29.0}, {"prompt": "b", "seed": 2, "psnr": 31.0}],
    }
    return {**base, **changes}


def test_the_headline_is_paroattns_near_the_density_in_the_lowest_precision():
    paper = record(variant="paper 0.3", method="paper")
    rows = table_rows(
        [
            paper,
            record(variant="paroattn 0.5", asked_density=0.5, density=0.5),
            record(variant="paroattn 0.3", density=0.301),
            record(variant="paroattn 0.3 + int8", density=0.302, precision="int8", precisions=["int8"]),
        ]
    )
    assert headline(rows).name == "paroattn 0.3 + int8"
    assert headline(table_rows([paper])).name == "paper 0.3"


def test_rows_take_whatever_metrics_records_hold():
    pairs = [{"prompt": "a", "seed": 1, "new_l2": 0.1}, {"prompt": "b", "seed": 2, "new_l2": 0.3}]
    row = TableRow(record(new_l2=0.2, new_l2_spread=0.1, pairs=pairs))
    assert row.figures["new_l2"].worst == 0.3  # lower is closer
    assert row.figures["new_l2"].spread == pytest.approx(0.1414, abs=1e-4)
    assert TableRow(record(psnr=None, pairs=[])).figures["psnr"].shown(None) == "∞"
    ablation = TableRow(
        {"method": "m", "asked_density": 0.3, "precision": "int8", "ssim": 0.5, "ssim_pairs": [0.4, 0.6]}
    )
    assert (ablation.name, ablation.series, ablation.figures["ssim"].worst) == ("m 0.3 + int8", "m + int8", 0.4)
    assert TableRow(record(variant="mine")).series == "mine"  # a plan from a file stands alone


def test_a_chart_names_its_methods_and_says_how_many_it_leaves_out():
    rows = table_rows(
        [
            record(
                variant=f"<m{number}> $x^ {density}",
                method=f"<m{number}> $x^",
                asked_density=density,
                density=density,
                psnr=30.0 + number,
            )
            for number in range(10)
            for density in (0.3, 0.5)
        ]
    )
    svg, left_out = quality_chart(rows, "psnr")
    assert left_out == 2
    assert "&lt;m9&gt; $x^" in svg
    assert "&lt;m0&gt;" not in svg
    assert "currentColor" in svg
    assert quality_chart(rows, "ssim") is None


def test_a_gpu_that_waits_for_the_cpu_is_told_about(report_inputs):
    record = report_inputs["records"][0]
    assert 0.5 < record["launch_share"] <= 1
    assert not launch_note(record)  # on a CPU nothing waits for it
    waiting = {**record, "gpu": "NVIDIA H200", "launch_share": 0.97, "full_attention_launch_share": 0.55}
    assert "took 97% of the transformer's time to launch its operations (55% with full attention)" in launch_note(
        waiting
    )
    assert not launch_note({**waiting, "launch_share": 0.6})
