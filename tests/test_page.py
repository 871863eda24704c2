"""The page in a real browser: it renders, sorts, filters, draws, fits a phone, and asks the network for nothing."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from reports.build import build
from tests.bench.report import write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of generated results: 5 models, one of them with 10 schemes x 2 methods."""
    folder = tmp_path_factory.mktemp("report")
    build(write_results(folder / "results", 60), folder / "summary.md", allow_missing=False)
    return folder / "summary.html"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, report):
    said, contexts = [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url)
        )
        page.goto(report.as_uri())
        page.wait_for_function("document.documentElement.dataset.ready === 'true'")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []  # nothing on the console, and nothing from the network


def perplexities(page):
    cells = page.locator("#table-model-0-main tbody tr td:nth-child(3)").evaluate_all(
        "cells => cells.map((cell) => Number(cell.dataset.order))"
    )
    return cells


def test_tables_sort_by_value_and_by_keyboard(open_page):
    page = open_page()
    before = perplexities(page)
    header = page.locator("#table-model-0-main thead th", has_text="perplexity")
    header.locator(".dt-column-order").focus()
    for direction in ("ascending", "descending"):
        page.keyboard.press("Enter")
        expect(header).to_have_attribute("aria-sort", direction)
        assert perplexities(page) == sorted(before, reverse=direction == "descending") != before


def test_tables_filter(open_page):
    page = open_page()
    rows = page.locator("#table-model-0-main tbody tr")
    expect(rows).to_have_count(21)
    page.locator("#table-model-0-main_wrapper input[type=search]").fill("method-1")
    expect(rows).to_have_count(10)


def test_every_chart_is_drawn(open_page):
    page = open_page()
    draw(page)
    assert page.locator(".chart.vega-embed").count() == page.locator(".chart").count() >= 5


def test_the_legend_sets_a_method_off_in_all_panels(open_page):
    page = open_page()
    draw(page)
    for title in ("All methods", "QAT against the best PTQ", "Against full precision"):
        chart = page.locator(f"[aria-label='Interactive chart: {title} of model-0']")
        dimmed = chart.locator("svg [opacity='0.12']")
        expect(dimmed).to_have_count(0)
        chart.locator("svg .role-legend-label text", has_text="method-1").first.click()
        expect(dimmed).not_to_have_count(0)


def draw(page):
    """Scroll to every chart, which draws it."""
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator("svg").first.wait_for()


def test_dark_and_light(open_page):
    color = "getComputedStyle(document.body).backgroundColor"
    page = open_page(color_scheme="dark")
    dark = page.evaluate(color)
    page.get_by_role("button", name="Dark").press("Enter")
    light = page.evaluate(color)
    assert light == "rgb(255, 255, 255)" != dark
    page.reload()
    page.wait_for_function("document.documentElement.dataset.ready === 'true'")
    assert page.evaluate(color) == light  # the choice is kept
    assert open_page(color_scheme="light").evaluate(color) == light


def test_a_phone_scrolls_tables_and_charts_not_the_page(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True)
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
