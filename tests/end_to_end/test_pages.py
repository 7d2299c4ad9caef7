"""The token page and the report page in a real headless browser: clicked, hovered, switched, filtered, and attacked.

Needs a Chromium: $CHROMIUM or one on PATH (`make test` gets one from npm if it can). Skipped if there is none.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.report import command
from megatron_egrsd.report.scored_dump import save_scores
from tests.presets import preset_objective
from tests.unit.test_report import make_run
from tests.unit.test_scores import batch

pytestmark = pytest.mark.timeout(120)

HOSTILE = "</script></span><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
TEXT = f"so 1 + 1 = 2\n\n{HOSTILE} {{{{ 7 * 7 }}}} ünï 🙂 \u202egnp.exe {{% raw %}}"


@pytest.fixture(autouse=True, scope="module")
def copies():
    """Take the place of the package's: these tests start no process."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a dump and its page by the command; every text in the dump is hostile. Returns the rollouts and the page."""
    root = tmp_path_factory.mktemp("pages") / "run & <i>"
    scored = batch(ObjectiveConfig(), text=TEXT, problem=Problem(HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    save_scores(scored, root / "scores" / "step_000004.jsonl")
    command.main(["--tokens", str(root)])
    return scored, root / "tokens_step_000004.html"


def token(page, rollout: int, index: int):
    return page.locator(".rollout").nth(rollout).locator(".text span").nth(index)


def shown(page) -> dict[str, str]:
    """Return the inspector's values by name."""
    cells = page.locator(".inspector dt, .inspector dd").all_text_contents()
    weights = page.locator(".weights > span:not(.bar)").all_text_contents()
    return dict(zip(cells[::2], cells[1::2], strict=True)) | dict(zip(weights[::2], weights[1::2], strict=True))


def number(text: str) -> float:
    return float(re.search(r"[+−\-]?[\d.]+", text)[0].replace("−", "-"))


def test_hovering_shows_the_numbers_of_the_token(made, open_page):
    scored, path = made
    largest = max(1.0, *(r.teacher_entropy.max() for r in scored))
    page = open_page(path)
    assert page.locator("input[value=cl_egrsd] + span").get_attribute("title") == "ε 0.2, γ 0.3, W 3"
    for rollout, t in ((0, 7), (1, 0), (2, 3), (2, 8), (4, 2)):
        token(page, rollout, t).hover()
        r, values = scored[rollout], shown(page)
        a, delta = r.advantage, r.teacher_log_prob[t] - r.student_log_prob[t]
        ratio = np.exp(np.sign(a) * delta)
        w = np.clip(ratio, 0.8, 1.2)
        h, ahead = r.teacher_entropy[t] / largest, r.teacher_entropy[t : t + 4].min() / largest
        omega = np.clip(1 - 0.3 * ahead, 0.1, 1)
        expected = {
            "advantage A": a,
            "direction D = sign(A)": np.sign(a),
            "student log p_S": r.student_log_prob[t],
            "teacher log p_T": r.teacher_log_prob[t],
            "gap δ of the two": delta,
            "exp(D δ)": ratio,
            "magnitude w": w,
            "student entropy": r.student_entropy[t],
            "teacher entropy H": r.teacher_entropy[t],
            "Ĥ": h,
            "Ĥ^CL, W 3": ahead,
            "confidence ω": omega,
            "GRPO": a,
            "EGRSD without gate": a * w,
            "EGRSD": a * w * (1 - 0.3 * h),
            "CL-EGRSD": a * w * omega,
        }
        assert number(page.locator(".weight").text_content()) == pytest.approx(float(a * w * omega), abs=6e-4)
        facts = page.locator(".rollout").nth(rollout).locator(".facts").text_content()
        assert f"shaped reward {r.shaped_reward:.3g}" in facts and f"reward {r.reward:.3g}" in facts
        for name, value in expected.items():
            assert number(values[name]) == pytest.approx(float(value), abs=6e-4), name
        clip = "to 0.80" if ratio < 0.8 else "to 1.20" if ratio > 1.2 else "not reached"
        assert values["clip"] == clip


def test_switching_the_objective_repaints_every_token(made, open_page):
    page = open_page(made[1])
    assert page.locator("input[name=objective]:checked").get_attribute("value") == "cl_egrsd"

    def colours(rollout):
        return page.locator(".rollout").nth(rollout).locator(".text span").evaluate_all(
            "spans => spans.map(s => (s.className.match(/[pn]\\d+/) || [''])[0])"
        )  # fmt: skip

    before = colours(2)
    page.get_by_text("GRPO", exact=True).first.click()
    assert len(set(colours(2))) == 1 and colours(2) != before  # GRPO weighs every token of a response alike
    assert all(c.startswith("p") for c in colours(2)) and all(c.startswith("n") for c in colours(1))
    assert set(colours(3)) == {""}  # no advantage
    token(page, 2, 0).hover()
    assert shown(page)["confidence ω"] == "1.000"
    assert page.locator(".weights .chosen").first.text_content() == "GRPO"
    page.get_by_text("CL-EGRSD", exact=True).first.click()
    assert colours(2) == before
    background = token(page, 2, 0).evaluate("s => getComputedStyle(s).backgroundColor")
    assert background.startswith("rgba(0, 114, 178")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colour_by_regime_with_the_keyboard(scheme, made, open_page):
    scored, path = made
    page = open_page(path, color_scheme=scheme)
    assert not page.locator(".legend[data-colour=regime]").is_visible()
    page.locator("input[name=colour]:checked").focus()
    page.keyboard.press("ArrowRight")
    legend = page.locator(".legend[data-colour=regime]")
    assert legend.is_visible() and not page.locator(".legend[data-colour=weight]").is_visible()
    assert legend.locator("span").all_text_contents() == [" lock", " mid", " pivot", " fork"]
    colours = legend.locator("i").evaluate_all("all => all.map(i => getComputedStyle(i).backgroundColor)")
    assert len(set(colours)) == 4

    everything = np.concatenate([r.teacher_entropy for r in scored])
    low, high = np.quantile(everything, [0.5, 0.7])
    found = set()
    for rollout, r in enumerate(scored):
        names = page.locator(".rollout").nth(rollout).locator(".text span").evaluate_all(
            "spans => spans.map(s => (s.className.match(/lock|mid|pivot|fork/) || [''])[0])"
        )  # fmt: skip
        for t, h in enumerate(r.teacher_entropy):
            ahead = r.teacher_entropy[t : t + 4].min()
            lower = "fork" if ahead >= high else "pivot" if ahead <= low else "mid"
            assert names[t] == ("lock" if h <= low else "mid" if h < high else lower)
        found |= set(names)
    assert found == {"lock", "mid", "pivot", "fork"}
    token(page, 2, 3).hover()
    assert shown(page)["regime"] in token(page, 2, 3).get_attribute("class")
    page.locator("input[name=objective]:checked").focus()
    page.keyboard.press("ArrowLeft")  # the regime is a matter of the teacher, not of the objective
    assert shown(page)["regime"] in token(page, 2, 3).get_attribute("class")
    page.locator("input[name=colour]:checked").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".lock, .mid, .pivot, .fork").locator("visible=true").count() == 0


def test_keyboard_and_pin(made, open_page):
    page = open_page(made[1])
    token(page, 2, 0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".inspector .muted").first.text_content() == "token 3 of 9"
    page.keyboard.press("End")
    assert page.locator(".inspector h2").text_content() == "<|im_end|>"
    page.keyboard.press("ArrowRight")  # stays
    assert page.locator(".inspector .muted").first.text_content() == "token 9 of 9"

    token(page, 2, 4).click()
    token(page, 4, 1).hover()
    assert "token 5 of 9" in page.locator(".inspector").text_content()  # pinned
    page.keyboard.press("Escape")  # shows what the pointer is on
    assert "token 2 of 7" in page.locator(".inspector").text_content()


def test_the_lookahead_is_marked(made, open_page):
    scored, path = made
    page = open_page(path)
    for t in range(9):
        token(page, 2, t).hover()
        ahead = page.locator(".text span").evaluate_all("s => s.filter(x => x.classList.contains('ahead')).length")
        assert ahead == min(3, 8 - t)
        offset = int(np.argmin(scored[2].teacher_entropy[t : t + 4]))
        said = shown(page)["Ĥ^CL, W 3"]
        assert ("here" if offset == 0 else f"{offset} ahead") in said


def test_filters(made, open_page):
    page = open_page(made[1])
    visible = page.locator(".rollout:visible")
    assert visible.count() == 6
    page.select_option("select[name=reward]", "right")
    assert visible.count() == 3
    page.select_option("select[name=group]", "1")
    assert visible.count() == 2 and page.locator(".group:visible").count() == 1
    page.select_option("select[name=reward]", "")
    page.fill("input[name=shortest]", "4")
    page.fill("input[name=longest]", "5")
    assert visible.count() == 1
    assert page.locator("output").text_content() == "1 of 6 rollouts, 4 tokens"
    page.fill("input[name=longest]", "")
    assert visible.count() == 2
    page.fill("input[name=shortest]", "5000")
    assert visible.count() == 0 and page.get_by_text("No rollout passes").is_visible()


def test_nothing_breaks_out_of_the_data(made, open_page):
    """The fixture also asserts that the page requested nothing and that no script failed."""
    scored, path = made
    page = open_page(path)
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    spans = page.locator(".rollout").first.locator(".text span").all_text_contents()
    assert spans == scored[0].pieces and "".join(spans) == TEXT
    assert HOSTILE in page.locator(".group header").first.text_content()
    assert "run & <i>" in page.title()
    token(page, 0, TEXT.index("<")).hover()


def test_the_page_runs_no_script_but_its_own(made, browser):
    """If a script got into the page nevertheless, the page's policy would refuse to run it."""
    page = browser.new_page()
    page.goto(made[1].as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.broken = 3'}))")
    assert page.evaluate("window.broken") is None and page.locator("script").count() == 3
    page.close()


def test_a_run_without_a_teacher(tmp_path, open_page):
    save_scores(batch(preset_objective("grpo"), teacher=False), tmp_path / "s.jsonl")
    command.main(["--tokens", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "page.html")])
    page = open_page(tmp_path / "page.html")
    assert page.locator("input[name=objective]:enabled").count() == 1
    token(page, 2, 1).hover()
    assert shown(page)["GRPO"] == "+0.500" and "teacher log p_T" not in shown(page)
    assert page.locator("input[name=colour]:enabled").count() == 1


def test_an_objective_of_ones_own_is_shown_as_recorded(tmp_path, open_page):
    """Its file no longer exists. The members of the family are shown beside it, with their own advantages."""
    objective = ObjectiveConfig(function="gone.py:<b>Mine", options={"<i>": 1})
    recorded = {"objective": objective, "advantage": 7.0}
    scored = [replace(r, weight=2 * r.student_log_prob, **recorded) for r in batch(ObjectiveConfig())]
    save_scores(scored, tmp_path / "s.jsonl")
    command.main(["--tokens", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "page.html")])
    page = open_page(tmp_path / "page.html")
    assert page.locator("input[name=objective]:checked").get_attribute("value") == "run"
    token(page, 2, 3).hover()
    values = shown(page)
    assert number(values["<b>Mine (this run)"]) == pytest.approx(float(scored[2].weight[3]), abs=6e-4)
    assert page.locator(".formula").text_content() == "as the run recorded it"
    facts = page.locator(".rollout").nth(2).locator(".facts").text_content()
    assert "signal of the run +7.000" in facts and "advantage" not in facts
    assert not {"advantage A", "direction D = sign(A)", "exp(D δ)", "clip"} & values.keys()
    page.get_by_text("GRPO", exact=True).first.click()
    assert "= A −0.500 × w 1.000 × ω 1.000" in page.locator(".formula").text_content()
    assert shown(page)["advantage A"] == "−0.500"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 1280, 1920])
def test_both_pages_fit(width, scheme, made, tmp_path, open_page):
    runs = [make_run(tmp_path / name, objective={}) for name in ("one", "two")]
    command.main([*map(str, runs), "--output", str(tmp_path / "report")])
    for path in (made[1], tmp_path / "report" / "report.html"):
        page = open_page(path, width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("h1").is_visible()
        ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        assert (luminance(ink) > luminance(paper)) == (scheme == "dark")
    assert page.locator("svg").count() == 4
    boxes = [page.locator("figure").nth(i).bounding_box() for i in range(4)]
    assert all(box["height"] > 150 for box in boxes)


def luminance(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))


def test_both_pages_print(made, tmp_path, open_page):
    run = make_run(tmp_path / "run")
    command.main([str(run)])
    for path in (made[1], run / "report.html"):
        page = open_page(path, color_scheme="dark")
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("select:visible").count() == 0
        assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize(("rollouts", "length"), [(128, 200), (8, 8000)])
def test_large_dumps_are_shown_whole(rollouts, length, tmp_path, open_page):
    """On two busy cores it took 0.3 s and 1 s to load, 10 and 20 ms to repaint."""
    template, g = batch(ObjectiveConfig())[0], np.random.default_rng(0)
    scored = [
        replace(
            template,
            group=i // 4,
            response_ids=[0] * length,
            pieces=[" word"] * length,
            **{k: g.random(length, np.float32) for k, v in vars(template).items() if isinstance(v, np.ndarray)},
        )
        for i in range(rollouts)
    ]
    save_scores(scored, tmp_path / "s.jsonl")
    command.main(["--tokens", str(tmp_path / "s.jsonl")])
    page = open_page(tmp_path / "s.html")
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    assert page.locator(".text span").count() == rollouts * length
    repaint = page.evaluate("(t => (paint(), document.body.offsetHeight, performance.now() - t))(performance.now())")
    print(f"{rollouts} x {length} tokens: {timing:.0f} ms to load, {repaint:.0f} ms to repaint")
