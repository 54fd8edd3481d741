"""The report and the page of a plan in headless Chromium, opened from the file system."""

import shutil
from contextlib import contextmanager
from itertools import pairwise

import pytest
import report_pages
from paroattn_lab.report import write_plan_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]
WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(report_inputs, tmp_path_factory):
    """Files by name: the whole report, one of images, and the page of a plan alone."""
    folder = tmp_path_factory.mktemp("pages <b>&' quoted")
    report_pages.write(folder / "report.html", report_inputs)
    images = {name: [video[:1] for video in videos] for name, videos in report_inputs["videos"].items()}
    report_pages.write(folder / "images.html", {**report_inputs, "videos": images})
    write_plan_page(folder / "plan.html", report_inputs["plans"][report_pages.SHOWN], report_pages.EVIL)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def opened(browser, pages):
    """Opens a page; when the test ends, nothing may have been said on the console or asked from a network."""

    @contextmanager
    def open_page(name, width=1440, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        page = context.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith("http") and complaints.append(request.url))
        page.goto(pages[name].as_uri())
        yield page
        context.close()
        assert complaints == []

    return open_page


def picture(page, name):
    return page.evaluate("name => document.querySelector(`canvas[name=${name}]`).toDataURL()", name)


def choose(page, **places):
    """Set sliders of the head browser and wait until it has drawn."""
    for name, value in places.items():
        page.locator(f"#head-browser [name={name}]").fill(str(value))
    wanted = " ".join(
        page.locator(f"#head-browser [name={name}]").input_value() for name in ("layer", "head", "bucket")
    )
    page.wait_for_function("wanted => document.querySelector('#head-browser').dataset.shown === wanted", arg=wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "images", "plan"])
def test_pages_open_without_complaint_and_nothing_overflows(opened, name, width, scheme):
    with opened(name, width, color_scheme=scheme) as page:
        choose(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """width => [...document.querySelectorAll("body *")]
                .filter((item) => item.getBoundingClientRect().right > width + 0.5 && !item.closest(".wide"))
                .map((item) => item.tagName)""",
            width,
        )
        assert outside == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
        chart = page.locator("svg.chart text").first
        assert chart.evaluate("item => getComputedStyle(item).fill") == page.evaluate(
            "getComputedStyle(document.body).color"
        )


def test_pages_are_small(pages):
    assert max(path.stat().st_size for path in pages.values()) < 20_000_000


def test_the_theme_can_be_chosen(opened):
    with opened("plan", color_scheme="light") as page:
        shades = []
        for _ in range(3):
            page.locator("#theme").click()
            shades.append(
                (page.locator("#theme span").inner_text(), page.evaluate("document.documentElement.dataset.theme"))
            )
        assert shades == [("light", "light"), ("dark", "dark"), ("system", "light")]


@pytest.mark.parametrize("name", ["report", "plan"])
def test_the_head_browser_shows_the_head_that_is_chosen(opened, name):
    kinds = ("original", "chosen", "mask") if name == "report" else ("mask",)
    with opened(name) as page:
        seen = {kind: set() for kind in kinds}
        places = [
            {"layer": layer, "head": head, "bucket": bucket}
            for layer, head, bucket in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
        ]
        facts = set()
        for place in places:
            choose(page, **place)
            for kind in kinds:
                seen[kind].add(picture(page, kind))
            facts.add(page.locator("#head-browser dl").inner_text())
        assert {kind: len(pictures) for kind, pictures in seen.items()} == dict.fromkeys(kinds, 4)
        assert len(facts) == 4


def test_the_head_browser_says_what_the_plan_holds(opened, report_inputs):
    plan = report_inputs["plans"][report_pages.SHOWN]
    errors = report_inputs["study"].plans[report_pages.SHOWN].errors
    with opened("report") as page:
        choose(page, layer=1, head=0, bucket=1)
        order = plan.order_names[int(plan.order_index[1, 0])]
        text = page.locator("#head-browser dl").inner_text()
        assert order in text
        assert f"{100 * float(plan.densities()[1, 1, 0]):.3g}"[:4] in text
        assert f"{100 * float(errors[1, 1, 0]):.3g}"[:4] in text
        assert "int8" in text


def test_the_head_browser_works_by_keyboard(opened):
    with opened("report") as page:
        choose(page, layer=0, head=0, bucket=0)
        page.locator("#head-browser [name=layer]").press("ArrowRight")
        choose(page)
        assert page.locator("#head-browser").get_attribute("data-shown") == "1 0 0"
        assert page.get_by_role("slider", name="Layer").get_attribute("aria-valuetext") == "1"


def times(page):
    return page.evaluate("[...document.querySelectorAll('video')].map((video) => video.currentTime)")


def wait_for_videos(page):
    page.wait_for_function(
        "[...document.querySelectorAll('video')].every((video) => video.readyState > 2 && video.duration > 0.5)"
    )


def test_videos_play_in_step_and_loop(opened):
    with opened("report") as page:
        wait_for_videos(page)
        samples = []
        for _ in range(30):
            page.wait_for_timeout(100)
            samples.append(times(page))
        leads = [sample[0] for sample in samples]
        assert len(set(leads)) > 5
        assert any(after < before for before, after in pairwise(leads))  # it began again
        apart = sorted(max(sample) - min(sample) for sample in samples)
        assert apart[len(apart) * 3 // 4] < 0.1  # all but moments at which it begins again


def test_one_control_pauses_and_scrubs_all_videos(opened):
    with opened("report") as page:
        wait_for_videos(page)
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("slider", name="Position").fill("0.5")
        page.wait_for_function("[...document.querySelectorAll('video')].every((video) => !video.seeking)")
        assert times(page) == pytest.approx([0.5] * 3, abs=0.01)
        page.wait_for_timeout(300)
        assert times(page) == pytest.approx([0.5] * 3, abs=0.01)
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("document.querySelector('video').currentTime !== 0.5")


def test_nothing_moves_by_itself_where_motion_is_not_wanted(opened):
    with opened("report", reduced_motion="reduce") as page:
        wait_for_videos(page)
        page.wait_for_timeout(300)
        assert times(page) == [0, 0, 0]
        assert page.get_by_role("button", name="Play").is_visible()


@pytest.mark.parametrize("name", ["report", "images"])
def test_another_method_or_prompt_shows_other_pictures(opened, name):
    with opened(name) as page:
        panes = page.locator("#player video, #player img")
        sources = [panes.evaluate_all("panes => panes.map((pane) => pane.src)")]
        page.get_by_role("combobox", name="Method").select_option(index=1)
        sources.append(panes.evaluate_all("panes => panes.map((pane) => pane.src)"))
        page.get_by_role("combobox", name="Prompt").select_option(index=1)
        sources.append(panes.evaluate_all("panes => panes.map((pane) => pane.src)"))
        assert sources[0][0] == sources[1][0]  # the same full attention beside another method
        assert len({sample[1] for sample in sources}) == 3
        assert sources[0][2] != sources[1][2]
        assert "on this pair: PSNR" in page.locator("#clip-figures").inner_text()
        page.wait_for_timeout(300)


def test_prompts_and_names_are_shown_as_they_were_written(opened):
    with opened("report", reduced_motion="reduce") as page:
        assert report_pages.EVIL in page.locator("main").inner_text()
        options = page.locator("#player option").all_inner_texts()
        assert report_pages.SHOWN in options
        assert f"“first {report_pages.EVIL}”, seed 1" in options
    with opened("plan") as page:
        assert report_pages.EVIL in page.locator("h1").inner_text()
        assert report_pages.EVIL in page.title()


def test_the_report_prints_in_light_colours_without_controls(opened):
    with opened("report", color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.get_by_role("button", name="Pause").is_visible()
