"""The picture of a run in a terminal: progress, step lines, curves, warnings, and a sample with coloured tokens."""

import math
import time

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from megatron_egrsd.report.panels import GATE, TRAINING
from megatron_egrsd.report.runs import value
from megatron_egrsd.run.step_line import StepLine, duration, show
from megatron_egrsd.watch.braille import curve
from megatron_egrsd.watch.state import SHADES, ShownResponse, State

# The palette of the report: blue and vermilion of Okabe and Ito, and its green, sky blue and orange.
_BLUE, _VERMILION, _ACCENT, _GREEN, _ORANGE = (0, 114, 178), (213, 94, 0), "#56b4e9", "#009e73", "#e69f00"
_STAGE = {"running": _GREEN, "finished": _ACCENT, "silent": _ORANGE, "waiting": _ORANGE}
_CURVES = (
    "accuracy", "response/length", "response/truncated", "student/entropy", "gate/mean", "optimizer/grad_norm",
)  # fmt: skip
_PANEL = 38  # characters of a panel, at least
_MARGIN = 6  # characters of the labels of an axis, at least
_LINES = 6  # step lines
_TAIL = 24  # lines below which a picture is not squeezed


class Picture:
    """The picture of `state`, for any width and, if the console has one, height of the terminal."""

    def __init__(self, state: State, live: bool):
        self.state, self.live = state, live

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        height = max(_TAIL, options.size.height - 1) if self.live else None
        parts = [_header(self.state, width), Text()]
        if self.state.run.steps or self.state.run.evaluations:
            lines = _LINES if height is None or height >= 36 else 2
            parts += [_curves(self.state, width, 4 if height is None or height >= 36 else 3), Text()]
            parts += [*_step_lines(self.state, width, lines, console), Text()]
        parts += [Text(f"▲ {sentence}", style=_ORANGE) for sentence in self.state.warnings]
        used = len(console.render_lines(Group(*parts), options.update(height=None)))
        left = None if height is None else height - used
        yield Group(*parts)
        if left is None or left >= 4:
            yield _sample(self.state.sample, width, left, console)


def _header(state: State, width: int) -> RenderableType:
    run, total, step = state.run, state.total_steps, state.step
    title = Text.assemble((f"● {state.stage}", f"bold {_STAGE[state.stage]}"), "  ", (run.name, "bold"))
    if run.objective:
        title.append(f"  {run.objective}", style="dim")
    title.truncate(width, overflow="ellipsis")
    return Group(title, _bar(step, total, width), _facts(state))


def _bar(step: int, total: int, width: int) -> Text:
    share = min(1.0, step / total) if total else 0.0
    done = round(share * width)
    return Text.assemble(("━" * done, _ACCENT), ("─" * (width - done), "dim"))


def _facts(state: State) -> Text:
    """Return the line below the bar: step, time left, speed, held-out accuracy, and the last sign of life."""
    step, total, seconds = state.step, state.total_steps, state.seconds
    facts = [f"step {step}/{total}" if total else f"step {step}" if step else "no step yet"]
    if state.stage == "running" and seconds and step < total:
        facts.append(f"{duration(StepLine(total).seconds_left(step, seconds))} left")
    if seconds:
        facts.append(f"{seconds[-1]:.1f} s a step")
    if evaluations := state.run.evaluations:
        first, last = evaluations[0], evaluations[-1]
        change = f" from {show(first, 'accuracy', '.1%')}" if len(evaluations) > 1 else ""
        facts.append(f"held-out {show(last, 'accuracy', '.1%')}{change}")
    if state.stage != "finished" and state.written:
        facts.append(f"last written {duration(max(0.0, time.time() - state.written))} ago")
    return Text("  ·  ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")


def _curves(state: State, width: int, height: int) -> RenderableType:
    run, titles = state.run, dict([*TRAINING, *GATE])
    there = [k for k in _CURVES if any(math.isfinite(value(row, k)) for row in run.steps)]
    if not there:
        return Text("no step yet: the model is loaded, or evaluated before training", style="dim")
    columns = max(1, min(3, len(there), width // _PANEL))
    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in range(columns):
        grid.add_column(ratio=1)
    room = (width - 2 * (columns - 1)) // columns - 1
    cells = [_panel(titles[key], [value(row, key) for row in run.steps], room, height) for key in there]
    cells += [Text()] * (-len(cells) % columns)
    for row in range(0, len(cells), columns):
        grid.add_row(*cells[row : row + columns])
    return grid


def _panel(title: str, values: list[float], width: int, height: int) -> Text:
    finite = [v for v in values if math.isfinite(v)]
    low, high, last = min(finite), max(finite), finite[-1]
    labels = [_short(high), _short(low) if low < high else ""]
    margin = max(_MARGIN, *map(len, labels)) + 1
    lines = curve(values, max(8, width - margin), height, low, high)
    text, newest = Text(no_wrap=True), _short(last)
    name = title if len(title) <= width - len(newest) - 1 else title[: width - len(newest) - 2] + "…"
    text.append(name.ljust(width - len(newest)), "bold").append(newest + "\n", _ACCENT)
    for number, line in enumerate(lines):
        label = labels[0] if number == 0 else labels[1] if number == height - 1 else ""
        text.append(label.rjust(margin - 1), "dim").append("│" if label else " ", "dim").append(line, _ACCENT)
        text.append("\n")
    return text


def _short(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def _step_lines(state: State, width: int, count: int, console: Console) -> list[RenderableType]:
    if not state.run.steps:
        return []
    blocks = console.encoding.lower().startswith("utf")
    lines = StepLine(state.total_steps or state.step, width, blocks=blocks)
    shown: list[RenderableType] = [Text(lines.header(), "dim", no_wrap=True)]
    rows, times = state.run.steps, state.seconds
    for back in range(min(count, len(rows)), 0, -1):
        row = rows[-back]
        until = times[: len(times) - back + 1]
        style = "bold" if back == 1 else ""
        shown.append(Text(lines.line(row["step"], row, until), style, no_wrap=True))
    return shown


def _sample(sample: ShownResponse | None, width: int, height: int | None, console: Console) -> RenderableType:
    """Return the sample in `height` lines, the rule above it included; the text is cut, not scrolled."""
    if sample is None:
        return Text("no sample: train with dump_scores true (coloured tokens) or dump_rollouts true", style="dim")
    facts = [f"sample of step {sample.step}", "right" if sample.right else "wrong", f"{sample.tokens} tokens"]
    facts += ["cut off"] if sample.cut_off else []
    facts += [] if sample.advantage is None else [f"advantage {sample.advantage:+.3f}".replace("-", "−")]
    legend = Text()
    if sample.weights is not None:
        for step in range(-SHADES, SHADES + 1, 2):
            legend.append("  ", _style(step))
        legend = Text.assemble(
            (f"−{sample.scale:.2g} suppressed ", "dim"), legend, (f" reinforced +{sample.scale:.2g}", "dim")
        )
    question = Text(" ".join(sample.problem.split()), style="italic dim", no_wrap=True, overflow="ellipsis")
    body = Text()
    for piece, step in zip(sample.pieces, sample.shades, strict=True):
        body.append(_printable(piece), _style(step))
    lines = body.wrap(console, width)
    most = 12 if height is None else max(1, height - 4)
    cut = len(lines) > most
    shown = lines[: most - 1] if cut and most > 1 else lines[:most]
    parts: list[RenderableType] = [Rule(Text("  ·  ".join(facts)), style="dim", align="left")]
    parts += [legend] if sample.weights is not None else []
    parts += [question, *shown]
    return Group(*parts, *([Text(f"… {len(lines) - len(shown)} more lines", style="dim")] if cut else []))


def _style(step: int) -> Style:
    """Return white on blue or vermilion, the darker the smaller the weight."""
    if step == 0:
        return Style.null()
    share = 0.25 + 0.75 * abs(step) / SHADES
    red, green, blue = (round(share * part) for part in (_BLUE if step > 0 else _VERMILION))
    return Style.parse(f"#ffffff on #{red:02x}{green:02x}{blue:02x}")


def _printable(piece: str) -> str:
    """Replace what would move the cursor: a response may hold any character."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in piece.replace("\t", "    "))
