"""A report in words, in the terminal, as JSON and as one page that stands alone. Nothing is measured here."""

from __future__ import annotations

import json

from hasten.core.report import Report
from hasten.report.html import page
from hasten.report.sentence import verdict_sentence
from hasten.report.terminal import show

__all__ = ["json_text", "page", "show", "verdict_sentence"]


def json_text(report: Report) -> str:
    """The report as an indented JSON document that `Report.from_json` reads back.

    Half characters (lone surrogates, as in the names of files that are not UTF-8) become question marks: no file can hold them.
    """
    return (json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n").encode(errors="replace").decode()
