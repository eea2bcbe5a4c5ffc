"""A comparison as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from train.comparison.analysis import show_setting
from train.comparison.pictures import draw_png, panels
from train.comparison.report import Report, Table, make_plain

# The policy lets a browser load nothing but what is in the file, and run no script even if one got in.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; --line: #d0d0d0; --note: #fff4d6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6e6e6; --back: #16181c; --line: #43464d; --note: #3d3313; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 8rem; overflow-wrap: anywhere;
  position: sticky; left: 0; background: var(--back); }}
img {{ max-width: 100%; height: auto; }}
.warning {{ background: var(--note); padding: .5rem .8rem; border-radius: .4rem; }}
summary {{ cursor: pointer; margin: .5rem 0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(report: Report) -> str:
    """Return the report as a page: verdict, warnings, tables, pictures, and the settings of each run."""
    body = [f"<h1>{_text(report.title)}</h1>"]
    body += [f'<p class="verdict">{_text(line)}</p>' for line in report.verdict]
    body += [f'<p class="warning">{_text(line)}</p>' for line in report.warnings]
    for table in report.tables:
        body += [f"<h2>{_text(table.title)}</h2>", _table(table)]
    body += [f"<p>{_text(report.same)}</p>", "<h2>Curves</h2>"]
    body += [_picture(report, metric) for metric in panels(report)]
    body.append("<h2>Settings of each run</h2>")
    for run in report.runs:
        values = run.config | run.facts | {"source": run.source}
        table = Table("", ["setting", "value"], [[name, show_setting(value)] for name, value in values.items()])
        body.append(f"<details><summary>{_text(run.name)}</summary>{_table(table)}</details>")
    return PAGE.format(title=_text(report.title), body="\n".join(body))


def _text(text: str) -> str:
    return escape(make_plain(text))


def _table(table: Table) -> str:
    def row(kind: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{_text(cell)}</{kind}>" for cell in cells) + "</tr>"

    rows = "\n".join(row("td", cells) for cells in table.rows)
    return f'<div class="wide"><table>\n{row("th", table.header)}\n{rows}\n</table></div>'


def _picture(report: Report, metric: str) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(draw_png(report, [metric], dark=dark)).decode()}"
        for dark in (False, True)
    )
    words = _text(f"{metric} against the optimizer step")
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img src="{light}" alt="{words}"></picture>'
