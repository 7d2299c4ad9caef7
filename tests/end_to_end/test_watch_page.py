"""The page of `watch` in a real headless browser: it loads itself again, keeps its place, and holds hostile text."""

import pytest

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.report.scored_dump import save_scores
from megatron_egrsd.watch.page import Page
from megatron_egrsd.watch.state import Reader
from tests.end_to_end.test_pages import HOSTILE, TEXT, copies  # noqa: F401  (a fixture)
from tests.unit.test_report import make_run
from tests.unit.test_scores import batch
from tests.unit.test_watch import configure

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def watched(tmp_path):
    """A run of 3 of 9 steps with a hostile sample; its reader and its page."""
    run = make_run(tmp_path / "run & <i>", 3, **{"response/truncated": 0.75, "gate/mean": 0.9})
    configure(run, 9)
    save_scores(
        batch(ObjectiveConfig(), text=TEXT, problem=Problem(HOSTILE, HOSTILE, HOSTILE, HOSTILE)),
        run / "scores" / "step_000003.jsonl",
    )
    reader, page = Reader(run), Page(tmp_path / "watch.html")
    page.write(reader.read(), every=5)
    return run, reader, page


def test_the_page_loads_itself_again_and_keeps_its_place(watched, open_page):
    run, reader, page = watched
    shown = open_page(page.path, paused=True)
    assert shown.locator(".line").text_content().split()[:4] == ["step", "3", "of", "9"]
    assert shown.locator(".stage").text_content() == "running" and "33 %" in shown.title()
    assert shown.locator(".tile").first.locator("b").text_content() == "50.0%"
    assert "75% of the responses are cut off" in shown.locator(".warning").text_content()
    assert shown.locator("figure svg").count() >= 3 and shown.locator(".steps pre").is_visible()
    shown.evaluate("window.scrollTo(0, 200)")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "accuracy": 0.75, "time/step": 5.0}\n')
    page.write(reader.read(), every=5)
    shown.clock.run_for(4000)
    assert "3 of 9" in shown.locator(".line").text_content()
    shown.clock.run_for(2000)
    expect(shown.locator(".line")).to_contain_text("4 of 9")
    assert shown.evaluate("window.scrollY") > 0  # 200 less the height of the warning, which no longer holds
    assert shown.locator(".tile").first.locator("b").text_content() == "75.0%"


def test_a_page_that_nothing_writes_any_more_says_so(watched, open_page):
    _, reader, page = watched
    shown = open_page(page.path, paused=True)
    assert shown.evaluate("[59.6, 119.7, 3599.8].map(duration)") == ["1m00s", "2m00s", "1h00m"]
    stale = shown.locator(".stale")
    assert not stale.is_visible()
    shown.evaluate("document.getSelection().selectAllChildren(document.querySelector('h1'))")  # so it is not reloaded
    shown.clock.run_for(60_000)
    assert stale.is_visible()
    page.write(reader.read(), every=0)  # the last picture of a run
    shown.reload()
    shown.clock.run_for(60_000)
    assert not stale.is_visible()


def test_nothing_breaks_out_of_the_data(watched, open_page):
    """The fixture also asserts that the page requested nothing but itself, and that no script failed."""
    page = open_page(watched[2].path, paused=True)
    assert page.evaluate("window.broken") is None and page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert "".join(page.locator(".sample .text span").all_text_contents()) == TEXT
    assert page.locator(".problem").text_content() == HOSTILE
    span = page.locator(".sample .text span").nth(2)
    assert span.get_attribute("title").startswith("weight +")
    assert span.evaluate("s => getComputedStyle(s).backgroundColor").startswith("rgba(0, 114, 178")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(scheme, watched, tmp_path, open_page):
    empty = tmp_path / "empty"
    empty.mkdir()
    Page(tmp_path / "empty.html").write(Reader(empty).read(), every=0)
    for path in (watched[2].path, tmp_path / "empty.html"):
        for width in (480, 1280, 1920):
            page = open_page(path, width, paused=True, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("h1").is_visible()
