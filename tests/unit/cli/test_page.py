"""The HTML report: well formed, self-contained, escaped, and with the report's figures in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from services.cli.bench import page
from services.cli.bench.document import Document, as_object
from services.cli.bench.peers import PeerReport, failed_peers
from services.cli.bench.report import Percentiles
from services.cli.bench.show import grids, number
from tests.unit.cli.bench_samples import a_round, both, case_report, document

VOID = {"meta", "br", "hr", "img", "link", "input"}
BLOCKS = [
    *both(0, [a_round(1, 4, 3), a_round(5, 4, 1), a_round(7, 4, 4)], "writing"),
    *both(1, [a_round(1, 4, 0), a_round(2, 4, 2)], "coding"),
]


class Parser(HTMLParser):
    """Checks nesting, and gathers text, elements and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.references += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        self.references += [url for _, v in attributes for url in re.findall(r"url\(([^)]*)\)", v or "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def a_document() -> Document:
    cases = [case_report(BLOCKS, k) for k in (2, 4)]
    cases.append(case_report(BLOCKS, 4, drafter="model", temperature=1.0))
    peer = PeerReport("assisted", "5.0", 2, 20, 17.25, 50.0, *[Percentiles(1.0, 2.0)] * 2, 2.75, 1)
    return document(*cases, peers=(peer,))


def parsed(text: str) -> Parser:
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_page_refers_to_nothing_outside_itself():
    text = page.render(a_document())
    parser = parsed(text)
    assert all(reference.startswith("#") for reference in parser.references), parser.references
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img"} & set(parser.elements)


def test_page_shows_every_table_and_the_plots():
    whole = a_document()
    parser = parsed(page.render(whole))
    cells = {text.strip() for text in parser.text}
    for grid in grids(whole):
        assert grid.rows
        for row in grid.rows:
            assert set(row) - {""} <= cells
    assert number(whole.first.report.speedup) in cells
    assert parser.elements.count("svg") == 8
    assert "Acceptance by draft length K" in cells


def test_texts_are_escaped():
    parser = parsed(page.render(a_document()))
    text = "".join(parser.text)
    assert "<script>alert(1)</script>" in text
    assert "outrider bench <b>&" in text


def test_page_of_a_run_without_drafts_has_what_there_is():
    parser = parsed(page.render(document(case_report(BLOCKS[:1]))))
    assert parser.elements.count("svg") == 3
    assert "what limits the speed-up" not in "".join(parser.text)


def test_json_holds_every_case_peer_and_request():
    fields = as_object(a_document())
    assert [case["case"]["num_draft_tokens"] for case in fields["cases"]] == [2, 4, 4]
    assert fields["cases"][2]["case"]["drafter"] == "model"
    assert fields["peers"][0]["tokens_per_s"] == 17.25
    assert len(fields["requests"]) == 4
    assert fields["limits"]["shares"].keys() == {"draft", "verify", "overhead"}
    assert fields["categories"]["coding"]["acceptance_before_repetition"]["num_drafts"] == 2
    assert fields["groups"]["multi-turn"]["num_requests"] == 2
    assert fields["overall"]["plain_tokens_per_s"] == 100.0


def test_the_template_is_packaged():
    settings = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert '"services.cli.bench" = ["page.html"]' in settings


def test_a_failed_peer_stands_in_page_table_and_json():
    peers = (*a_document().peers, *failed_peers(("prompt-lookup",), "ValueError: <no> such thing"))
    whole = document(case_report(BLOCKS), peers=peers, notes=("compare latencies",))
    parser = parsed(page.render(whole))
    text = "".join(parser.text)
    assert "prompt-lookup failed: ValueError: <no> such thing" in text
    assert "compare latencies" in text
    *_, grid = grids(whole)
    assert grid.rows[-1] == ("prompt-lookup", "failed", "-", "-", "-", "-")
    fields = as_object(whole)
    assert [peer["failure"] for peer in fields["peers"]] == [None, "ValueError: <no> such thing"]
    assert fields["notes"] == ["compare latencies"]
