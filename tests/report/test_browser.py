"""The pages in a headless Chromium: drawn, silent, offline, on a phone and on paper."""

from __future__ import annotations

import pytest

from puzzle_nas.report.figures.layers import Bar, child_figure
from puzzle_nas.report.page import SECTIONS, render_page
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear
from tests.report.browser import chromium, visit
from tests.report.test_page import make_run

FIGURES = 11


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    file = folder / "report.html"
    file.write_text(render_page(*make_run(folder / "run")))
    return file


def drawn(page) -> int:
    return page.locator(".plot.drawn svg.main-svg:first-child").count()


def test_it_draws_says_nothing_and_asks_for_nothing(browser, report):
    seen = visit(browser, report)
    page = seen.page
    assert page.locator("section").count() == len(SECTIONS)
    before = drawn(page)
    assert 0 < before < FIGURES
    page.click("button")
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.wait_for_function(f"document.querySelectorAll('.plot.drawn .main-svg:first-child').length === {FIGURES}")
    assert page.locator("#decision .scatterlayer .point").count() > 10
    assert page.locator("details:not([open])").count() == 0
    assert seen.complaints == []
    assert seen.requests == [report.resolve().as_uri()]


def test_a_request_would_be_noticed_and_refused(browser, report):
    seen = visit(browser, report)
    refused = seen.page.evaluate("fetch('https://example.org/x').then(() => 'fetched', error => 'refused')")
    assert refused == "refused" and seen.complaints


def test_hovering_names_a_point(browser, report):
    page = visit(browser, report).page
    page.locator("#decision .scatterlayer .trace").last.locator(".point").first.hover(force=True)
    page.wait_for_selector("#decision .hoverlayer text")
    assert "nats" in page.locator("#decision .hoverlayer").text_content()


def test_a_phone_scrolls_tables_and_not_the_page(browser, report):
    page = visit(browser, report, width=360).page
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.wait_for_function(f"document.querySelectorAll('.plot.drawn .main-svg:first-child').length === {FIGURES}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    widths = page.evaluate("[...document.querySelectorAll('.plot')].map(plot => plot.querySelector('svg').clientWidth)")
    assert all(200 < width <= 360 for width in widths)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme(browser, report, scheme):
    page = visit(browser, report, color_scheme=scheme).page
    look = "getComputedStyle(document.{}).{}.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    paper, ink = page.evaluate(look.format("body", "backgroundColor")), page.evaluate(look.format("body", "color"))
    text = page.evaluate(look.format("querySelector('.plot text')", "fill"))
    assert (paper > 600 and ink < 200) if scheme == "light" else (paper < 200 and ink > 600)
    assert text == ink


def test_paper_shows_every_section_and_leaves_the_page_as_it_was(browser, report):
    page = visit(browser, report, color_scheme="dark").page
    folded = page.locator("details:not([open])").count()
    page.evaluate("addEventListener('beforeprint', () => window.onPaper = document.querySelectorAll('.drawn').length)")
    assert len(page.pdf(format="A4")) > 50_000
    assert page.evaluate("window.onPaper") == FIGURES
    assert page.locator("details:not([open])").count() == folded > 0


def test_bars_of_rare_kinds_are_as_narrow_as_all_others(browser, tmp_path):
    """Left to itself, plotly widens bars of a trace that has none in neighbouring layers."""
    specs = [Linear("ffn") if layer in (3, 5) else GatedFFN(341) for layer in range(9)]
    bars = [Bar(layer, spec, spec != Linear("ffn"), 50.0) for layer, spec in enumerate(specs)]
    file = tmp_path / "figure.html"
    child_figure([*bars, *(Bar(layer, GroupedAttention(2), True, 100.0) for layer in range(9))]).write_html(file)
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector(".barlayer .point path")
    widths = page.locator(".barlayer .point path").evaluate_all("paths => paths.map(path => path.getBBox().width)")
    assert len(widths) == 4 * 9 and max(widths) < 1.05 * min(widths)
