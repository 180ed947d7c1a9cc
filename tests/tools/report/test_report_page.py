"""The page shows the report, whatever its texts are, however many its facts, and fits its window in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from peft_baft.data.cases import Message
from peft_baft.tools.report.folder import AdapterFolder, Picture
from peft_baft.tools.report.page import MOVED_SHOWN, address, counted, later_words, page, summary
from peft_baft.tools.report.report import AdapterReport, Answer, Comparison, FactReport, Neighbour
from peft_baft.tools.report.taught import TaughtFact

HOSTILE = (
    "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}\u202e"
)
LONG = "pneumonoultramicroscopicsilicovolcanoconiosis" * 4
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = ("meta", "link", "img", "br")


def made_up(text: str = "text", facts: int = 1) -> AdapterReport:
    """A report that holds `text` wherever a foreign text can stand; one neighbour of each fact moved, one says the new answer."""
    shown = []
    for number in range(1, facts + 1):
        taught = TaughtFact(
            f"{number}.1", text, text, text, ("raw",), batch=2, steps=5, seconds=1.0
        )
        taught = replace(taught, loss=0.01, learned=False, problem=text)
        stays = Neighbour("raw", text, text, text, None, text, "fact", False, None)
        moved = replace(stays, before="old words", after=f"old {text}", taught_by="7")
        new = replace(moved, after=f"new {text}", says_new=True, source="name")
        shown.append(
            FactReport(
                taught,
                text,
                True,
                (
                    Answer("raw", text, "was", text, None, "question", True),
                    Answer("chat", text, "", "", None, "question", False),
                ),
                (Answer("raw", text, text, text, None, "rephrasing", False),),
                (
                    Answer(
                        "chat",
                        (Message("system", text), Message("user", text)),
                        "",
                        "",
                        text,
                        text,
                        None,
                    ),
                ),
                (stays, moved, new),
            )
        )
    folder = AdapterFolder(
        text,
        "5a" * 32,
        1,
        {text: text, "r": 4},
        {"lr": text},
        True,
        (Picture(text, "inspect/a b.html", "x.png"),),
    )
    absent = TaughtFact("9", text, text, kept=False, problem=text)
    canaries = (Comparison("raw", text, text, "b", None), Comparison("raw", text, text, text, None))
    versions = {"torch": text}
    return AdapterReport(
        folder,
        text,
        ("raw", "chat"),
        tuple(shown),
        (absent,),
        3,
        canaries,
        (text,),
        versions,
        "2026-01-02T03:04:05+00:00",
    )


class Reader(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.balanced, self.text = True, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements += [(tag, name) for name, _ in attrs] or [(tag, "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.mark.parametrize(
    "text", [HOSTILE, "<b>", "&lt;", "<!--", "]]>", "{% raw %}", '" onclick="x']
)
def test_foreign_text_stays_text(text: str) -> None:
    tame, hostile = Reader(page(made_up())), Reader(page(made_up(text)))
    assert hostile.elements == tame.elements and hostile.balanced and not hostile.open
    assert text in hostile.text and not {tag for tag, _ in tame.elements} & {"script", "img"}


def test_hostile_text_would_break_a_careless_page() -> None:
    careless = Reader(page(made_up("placeholder")).replace("placeholder", HOSTILE))
    assert ("img", "onerror") in careless.elements


def test_the_page_refers_to_nothing_outside_but_the_pictures() -> None:
    html = page(made_up(), "../the adapter")
    assert not re.search(r"https?://|@import|url\(|<script", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html
    links = {unescape(link) for link in re.findall(r'href="([^"]*)"', html)}
    assert {link for link in links if not link.startswith("#")} == {
        "../the%20adapter/inspect/a%20b.html",
        "../the%20adapter/x.png",
    }
    assert {link[1:] for link in links if link.startswith("#")} <= set(
        re.findall(r'id="([^"]*)"', html)
    )
    assert address("", "a b") == "a%20b"


def test_what_moved_stands_before_everything_else_and_all_parts_in_their_order() -> None:
    text = Reader(page(made_up())).text
    places = [
        text.index(part)
        for part in ("facts hold", "Neighbours that moved", "Every fact", "Canaries", "versions")
    ]
    assert places == sorted(places)
    first = text[text.index("Neighbours that moved") : text.index("Every fact")]
    assert first.index("says the new answer") < first.index("moved", 30)
    assert (
        "says the answer of edit 7 about text" in first
        and "new text" in first
        and "old text" in first
    )


def test_nothing_is_left_out_in_silence() -> None:
    text = " ".join(Reader(page(made_up(facts=2))).text.split())
    assert "3 facts of this adapter were not asked, and are not on this page" in text
    assert "--limit 5 asks all of them" in text and "1 fact that is not in the adapter" in text
    assert "undone: text" in text and "Kept although it was rejected: text" in text
    assert "Not asked: text" in text and "(3 more not asked)" in summary(made_up())
    whole = page(replace(made_up(), left_out=0))
    assert "not asked</b>" not in whole


def test_a_thousand_facts_are_folded_and_more_than_some_moved_ones_are_counted() -> None:
    html = page(made_up(facts=1000))
    assert len(re.findall(r'<details class="fact"', html)) == 1000 and len(html) < 8_000_000
    assert not re.search(r'<details class="fact"[^>]* open', html)
    assert f"{2000 - MOVED_SHOWN:,} more neighbours that moved" in html
    assert "open>" in page(made_up(facts=1))  # the control: few facts stand open


def test_the_marked_words_are_those_that_differ() -> None:
    comparison = Comparison("raw", "p", "a b c", "a x c", None)
    assert later_words(comparison) == "x c" and "a <mark>x c</mark>" in page(
        replace(made_up(), canaries=(comparison,))
    )
    ended = replace(comparison, after="a b")
    assert "a b <mark>(ends here)</mark>" in page(replace(made_up(), canaries=(ended,)))


def test_a_fact_is_blamed_only_in_the_form_that_it_was_taught_in() -> None:
    text = Reader(page(made_up())).text
    assert "does not hold; not trained in this format" in text  # as chat, which was not taught
    report = made_up()
    both = replace(report.facts[0], fact=replace(report.facts[0].fact, forms=("raw", "chat")))
    assert "not trained in this format" not in page(replace(report, facts=(both,)))
    assert both.holds is False and report.facts[0].holds is True


def test_a_report_without_facts_or_neighbours_says_so() -> None:
    html = page(replace(made_up(), facts=()))
    assert "The adapter has no facts." in html and "No neighbour was asked" in html
    assert counted(1, "fact") == "1 fact" and counted(1200, "fact") == "1,200 facts"


# in a browser


MEASURE = """
addEventListener("load", () => {
  const page = document.querySelector("iframe"), root = page.contentDocument.documentElement
  page.contentDocument.querySelectorAll("details").forEach(each => each.open = true)
  const seen = [page.contentWindow.innerWidth, root.scrollWidth, getComputedStyle(root).backgroundColor]
  document.body.dataset.seen = seen.join("|")
})"""


def in_browser(html: str, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """What a browser measures of a page in a frame of a width, with every fact unfolded."""
    # A window of a browser without a screen is never narrower than 500 pixels; a frame in it is. The page itself stays as it is.
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(html)}"></iframe>'
    file = folder / "page.html"
    file.write_text(f"<!doctype html><body>{frame}<script>{MEASURE}</script></body>", "utf-8")
    assert BROWSER is not None
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
    words += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", *flags]
    words += ["--dump-dom", file.as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = re.search(r'data-seen="([^"]*)"', dom)
    assert seen is not None
    inner, scroll, background = seen.group(1).split("|")
    return {"width": int(inner), "content": int(scroll), "background": background}


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_is_no_wider_than_its_window(tmp_path: Path, width: int) -> None:
    seen = in_browser(page(made_up(LONG)), tmp_path, width)
    assert seen["width"] == width >= seen["content"]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_measure_of_the_width_would_notice_a_long_word_that_does_not_wrap(
    tmp_path: Path,
) -> None:
    html = page(made_up(LONG)).replace("overflow-wrap: anywhere", "overflow-wrap: normal")
    seen = in_browser(html, tmp_path, 380)
    assert seen["content"] > seen["width"]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_page_is_dark_where_the_reader_wants_that(tmp_path: Path) -> None:
    light, dark = (
        in_browser(
            page(made_up()), tmp_path, 800, f"--blink-settings=preferredColorScheme={scheme}"
        )
        for scheme in (1, 0)
    )
    assert (light["background"], dark["background"]) == ("rgb(246, 245, 241)", "rgb(16, 19, 23)")
