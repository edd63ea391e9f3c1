"""An impact as pages that people read: Markdown, and one HTML file with a picture, which needs nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from keybroker.cli.output import visible
from keybroker.clock import from_rfc3339
from keybroker.model.impact import Hour, Impact, Tally

_TITLE = "What was done"
_DAY_S = 86_400
_MAX_HOURS = 24 * 14  # beyond that, the picture has a bar a day
_WIDTH, _HEIGHT = 960, 160

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; width: 100%; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #d8dee4; vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
.signed { fill: #2f6fde; } .other { fill: #b8860b; } .refused { fill: #c0392b; }
"""


def markdown(impact: Impact) -> str:
    """The report in Markdown (CommonMark with tables)."""
    lines = [f"# {_TITLE}", ""]
    lines += [f"- {name}: {_markdown_text(value)}" for name, value in facts(impact)]
    for title, header, rows in tables(impact):
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(_markdown_text(cell) for cell in row)} |" for row in rows]
    return "\n".join([*lines, ""])


def page(impact: Impact) -> str:
    """The report in HTML, whole in one file; no script, nothing fetched."""
    known = "".join(f"<tr><th>{html.escape(name)}</th><td>{_html_text(value)}</td></tr>" for name, value in facts(impact))
    parts = [f"<h1>{_TITLE}</h1>", f"<table>{known}</table>", _picture(impact.timeline)]
    for title, header, rows in tables(impact):
        numeric = [name in _NUMBERS for name in header]
        head = "".join(_cell("th", name, is_number) for name, is_number in zip(header, numeric, strict=True))
        body = "".join(f"<tr>{''.join(_cell('td', *pair) for pair in zip(row, numeric, strict=True))}</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_TITLE}</title><style>{_STYLE}</style>{"".join(parts)}</html>\n'


_NUMBERS = {"signed", "other", "refused"}
_COUNTS = ("signed", "other", "refused", "first", "last")


def facts(impact: Impact) -> Iterable[tuple[str, str]]:
    """What was asked, and the answer in a few numbers: names and values."""
    asked = impact.question
    names = {"workload": asked.workload, "key": asked.key, "certificate": asked.svid, "approved by": asked.person}
    yield from ((name, value) for name, value in {**names, "since": asked.since, "until": asked.until}.items() if value)
    total = impact.total
    yield "signed", str(total.signed)
    yield "ended otherwise", str(total.other)
    yield "refused", str(total.refused)
    if total.first >= 0:
        yield "first", f"{total.first_time} (record {total.first})"
        yield "last", f"{total.last_time} (record {total.last})"
    yield "log", f"{impact.log}, {impact.records} records" + (f" up to {impact.time}" if impact.time else "")
    for name, count in impact.more.items():
        yield f"not shown of {name}", str(count)


def tables(impact: Impact) -> Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of each table that has rows."""
    keys = [(row.key, row.version, row.operation, row.algorithm, *_counts(row.tally)) for row in impact.keys]
    certificates = [(row.serial, row.workload, *_counts(row.tally)) for row in impact.svids if row.serial]
    elsewhere = [(row.serial, row.workload, row.key, *_counts(row.tally)) for row in impact.elsewhere]
    endings: list[tuple[str, ...]] = [(name, str(count)) for name, count in impact.endings.items()]
    found: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        ("Keys", ("key", "version", "operation", "algorithm", *_COUNTS), keys),
        ("How it ended", ("ending", "times"), endings),
    ]
    simple = (
        ("Workloads", impact.workloads),
        ("Media types", impact.contents),
        ("Content fields", impact.fields),
        ("Grants that let it", impact.grants),
        ("Approved by", impact.people),
        ("Addresses", impact.addresses),
    )
    found += [(title, ("", *_COUNTS), [(row.value or "(none)", *_counts(row.tally)) for row in rows]) for title, rows in simple if rows]
    found += [
        ("Certificates", ("serial", "workload", *_COUNTS), certificates),
        ("What else these certificates did", ("serial", "workload", "key", *_COUNTS), elsewhere),
    ]
    return [each for each in found if each[2]]


def _counts(tally: Tally) -> tuple[str, ...]:
    return str(tally.signed), str(tally.other), str(tally.refused), tally.first_time, tally.last_time


def _cell(tag: str, text: str, is_number: bool) -> str:
    return f"<{tag}{' class=n' if is_number else ''}>{_html_text(text)}</{tag}>"


def _html_text(text: str) -> str:
    return html.escape(visible(text))


def _markdown_text(text: str) -> str:
    """Text from elsewhere: no markup, no second cell, no second line."""
    return "".join(f"\\{each}" if each in r"\`*_{}[]<>()#+!|~&" else each for each in visible(text))


def _picture(timeline: Sequence[Hour]) -> str:
    """Bars over time: signed from below, others and refused on top. Each has its numbers as a tooltip."""
    if not timeline:
        return ""
    first, last = (from_rfc3339(hour.start) // 1_000_000 for hour in (timeline[0], timeline[-1]))
    step = 3_600 if (last - first) // 3_600 < _MAX_HOURS else _DAY_S
    begin = first - first % step
    bars: dict[int, list[int]] = {}
    for hour in timeline:
        bar = bars.setdefault((from_rfc3339(hour.start) // 1_000_000 - begin) // step, [0, 0, 0])
        for place, count in enumerate((hour.signed, hour.other, hour.refused)):
            bar[place] += count
    places = (last - begin) // step + 1
    width, scale = _WIDTH / places, _HEIGHT / max(sum(bar) for bar in bars.values())
    shapes = "".join(_bar(bar, place * width, max(width - 1, 0.5), scale) for place, bar in sorted(bars.items()))
    unit = "hour" if step == 3_600 else "day"
    caption = f"{timeline[0].start[:16]} to {timeline[-1].start[:16]} UTC, a bar a {unit}: signed (blue), otherwise ended, refused (red)"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="uses over time" width="100%">{shapes}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _bar(bar: Sequence[int], left: float, width: float, scale: float) -> str:
    top = float(_HEIGHT)
    parts = [f"<title>signed {bar[0]}, otherwise ended {bar[1]}, refused {bar[2]}</title>"]
    for name, count in zip(("signed", "other", "refused"), bar, strict=True):
        height = count * scale
        top -= height
        if count:
            parts.append(f'<rect class="{name}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
    return f"<g>{''.join(parts)}</g>"
