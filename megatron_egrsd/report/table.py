"""The table before and after training."""

import math

from megatron_egrsd.report.runs import accuracy_interval, value

_ROWS = [  # key, name, unit of the change
    ("accuracy", "accuracy (avg@{k})", "percent"),
    ("pass", "pass@{k}", "percent"),
    ("length/mean", "response length, mean", "tokens"),
    ("length/median", "response length, median", "tokens"),
    ("length/p95", "response length, 95th percentile", "tokens"),
    ("truncated", "truncated responses", "percent"),
]


def summary_table(before: dict, after: dict) -> str:
    """Tabulate held-out accuracy and length before and after training; shares change in points, lengths in per cent."""
    k = f"{after.get('k', 0):.0f}"
    problems = f"{after['problems']:.0f} problems x " if after.get("problems") else ""
    title = f"held-out ({problems}{k} samples)"
    lines = [f"{title:<36}{'before':>10}{'after':>10}{'change':>13}"]
    for key, name, unit in _ROWS:
        a, b = before.get(key), after.get(key)
        if a is None or b is None:
            continue
        if unit == "percent":
            cells = f"{100 * a:>9.1f}%{100 * b:>9.1f}%{100 * (b - a):>+9.1f} pts"
        else:
            change = f"{100 * (b - a) / a:+.1f} %" if a else "-"
            cells = f"{a:>10.1f}{b:>10.1f}{change:>13}"
        lines.append(f"{name.format(k=k):<36}{cells}")
        if key == "accuracy":
            cells = f"{_interval(before):>10}{_interval(after):>10}{_interval_of_change(after):>13}"
            lines.append(f"{'  its 95 % interval':<36}{cells}")
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def _interval(evaluation: dict) -> str:
    low, high = accuracy_interval(evaluation)
    return f"{100 * low:.0f}-{100 * high:.0f} %" if math.isfinite(low) else "-"


def _interval_of_change(after: dict) -> str:
    low, high = value(after, "accuracy/change/low"), value(after, "accuracy/change/high")
    return f"{100 * low:+.0f} to {100 * high:+.0f}" if math.isfinite(low) else ""
