"""Writes what a run leaves to look at: `report.html`, `plots/*.png` and `model_card.md`.

The page is one file that needs no network and runs no script. Everything comes from the dictionary of `report.json`
and from `ReportExtras`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from fusion.files import write_atomically
from recsys import plots
from recsys import report_words as say
from recsys.compression_page import section
from recsys.report_content import Example, Mistake, Pictured, Recommended, ReportExtras
from recsys.report_view import charts_of, view_of


def write_report(folder: str | Path, report: Mapping[str, Any], extras: ReportExtras) -> list[Path]:
    """Writes `report.html`, `model_card.md` and `plots/*.png` into `folder` and returns their paths.

    Args:
        folder: the run's folder; made when missing.
        report: the dictionary of `report.json`.
        extras: everything else that is shown.

    Raises:
        MachineError: the folder cannot be written.
    """
    folder = Path(folder)
    written: dict[Path, str | bytes] = {}
    charts = {}
    for name, figure in charts_of(report, extras).items():
        written[folder / "plots" / f"{name}.png"] = plots.as_png(figure)
        charts[name] = data_address("image/svg+xml", plots.as_svg(figure))
    view = view_of(report, extras) | {"charts": charts, "compression": section(folder, extras.metric)}
    written[folder / "report.html"] = environment(html=True).get_template("report.html.j2").render(view)
    written[folder / "model_card.md"] = environment(html=False).get_template("model_card.md.j2").render(view)
    for path, content in written.items():
        write_atomically(path, content)
    return list(written)


def environment(*, html: bool) -> jinja2.Environment:
    """Where the templates are, and how they write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=html,
        finalize=say.printable if html else say.markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": say.number,
        "signed": say.signed,
        "bytes": say.bytes_of,
        "count": say.count_of,
        "seconds": say.seconds_of,
        "words": say.words,
        "shorten": say.shorten,
        "listed": say.listed,
    }
    return environment


def data_address(kind: str, content: bytes) -> str:
    """Content as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


__all__ = ["Example", "Mistake", "Pictured", "Recommended", "ReportExtras", "write_report"]
