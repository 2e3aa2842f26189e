"""Pieces of HTML, and the page around them.

A page loads nothing: plotly.js is inside it, compressed, and its content security policy forbids the network.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from puzzle_nas.report.style import POLICY, SCRIPT, STYLE


@functools.cache
def packed_plotly() -> str:
    """plotly.js as gzip in base64: 1.9 MB instead of 4.8 MB. Equal versions give equal text."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def document(title: str, content: str) -> str:
    """A self-contained page."""
    title = escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{STYLE}</style>
<script>{SCRIPT}</script>
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p>The figures of this page need JavaScript; its tables do not.</p></noscript>
{content}</main>
<script type="text/plain" id="plotly">{packed_plotly()}</script>
</body>
</html>
"""


def section(name: str, title: str, content: str, opened: bool) -> str:
    """A section that folds; `name` is its id."""
    state = " open" if opened else ""
    return (
        f'<section id="{name}"><details{state}><summary><h2>{escape(title)}</h2></summary>\n'
        f"{content}</details></section>\n"
    )


def folded(title: str, content: str) -> str:
    """Something that only some readers want."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>\n"


def paragraph(text: str, style: str = "") -> str:
    """A paragraph; `style` is `lead` or `note`."""
    attribute = f' class="{style}"' if style else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def commands(text: str) -> str:
    """Lines to copy into a terminal."""
    return f"<pre>{escape(text)}</pre>\n"


def pair(content: str) -> str:
    """Figures beside each other where there is room."""
    return f'<div class="pair">{content}</div>'


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] = (), strong: str | None = None
) -> str:
    """A table; columns named in `text` are aligned left, the row whose first cell is `strong` is bold."""
    classes = [' class="text"' if name in text else "" for name in columns]
    head = "".join(f'<th{c} scope="col">{escape(name)}</th>' for name, c in zip(columns, classes, strict=True))
    lines = "".join(
        ('<tr class="strong">' if row[0] == strong else "<tr>")
        + "".join(f"<td{c}>{escape(cell)}</td>" for cell, c in zip(row, classes, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return _scrolling(f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>")


def facts_table(facts: dict[str, str]) -> str:
    """Names and what they are, without a head."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text wide">{escape(value)}</td></tr>\n'
        for name, value in facts.items()
    )
    return _scrolling(f"<tbody>\n{rows}</tbody>")


def _scrolling(content: str) -> str:
    return f'<div class="scroll" tabindex="0"><table>{content}</table></div>\n'


def figure(name: str, drawn: go.Figure, title: str, caption: str = "") -> str:
    """A figure, drawn once it can be seen. No `<` stands in the script, so no label can end it."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    label, content = escape(title), drawn.to_plotly_json()
    height = content["layout"]["height"]
    return (
        f"<figure><h3>{label}</h3>\n"
        f'<div id="{name}" class="plot" role="img" aria-label="{label}" style="height:{height}px"></div>'
        f'<script type="application/json">{_script_json(content)}</script>\n'
        f"{below}</figure>\n"
    )


def _script_json(value: Any) -> str:
    return json.dumps(value, cls=PlotlyJSONEncoder, sort_keys=True).replace("<", "\\u003c")


def listed(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
