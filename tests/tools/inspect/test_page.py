"""The page and the picture of an inspection show what was measured, whatever the texts are."""

from __future__ import annotations

import json
import re
import sys
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_baft.tools.inspect import page as inspect_page
from peft_baft.tools.inspect.inspect import Adapter, Block, Cell, Change, Inspection, Token
from peft_baft.tools.inspect.page import page, percent, summary
from peft_baft.tools.inspect.token_text import visible

HOSTILE = (
    "</script><!--<script>\"'&amp;<img src=x onerror=alert(1)>${data}$prompt\u2028\u202e\x00\n"
)
SHARES = {
    0: "0%",
    0.00002: "<0.01%",
    0.0077: "0.77%",
    0.031: "3.1%",
    0.77: "77%",
    0.998: "99.8%",
    0.99999: ">99.9%",
}


@pytest.mark.parametrize(("share", "text"), [*SHARES.items(), (1, "100%")])
def test_a_percentage_hides_no_small_change(share: float, text: str) -> None:
    assert percent(share) == text


class Reader(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.open, self.balanced = [""], True
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "i", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("i", "path"):
            self.balanced &= self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1], data))

    def raw_data(self) -> str:
        return next(text for tag, text in self.texts if tag == "script")

    def data(self) -> Any:
        return json.loads(self.raw_data())


def made_up(text: str) -> Inspection:
    """An inspection that holds `text` wherever a text can stand."""
    changes = (Change(1, text, 0.1, 0.9), Change(2, "b", 0.9, 0.1))
    tokens = (Token(0, text, False, False, 0.0, ()), Token(1, text, False, True, 0.8, changes))
    cells = (Cell(0.0, {}), Cell(0.5, {text: (0.25, 1.0)}))
    return Inspection(
        text,
        text,
        text,
        (Adapter("mine", 2, "basis", 1), Adapter(text, 2, "none", 1)),
        tokens,
        (Block(text, cells),),
    )


def measured() -> Inspection:
    """Two blocks, a prompt of two tokens and an answer of one; the first token is not edited."""
    turn = (Change(7, " Rome", 0.0077, 0.9), Change(8, " Paris", 0.8, 0.05))
    tokens = (
        Token(5, "It", False, False, 0.0, ()),
        Token(6, " is", False, True, 0.85, turn),
        Token(7, " Rome", True, True, 0.25, (Change(9, ".", 0.5, 0.75),)),
    )
    first = (Cell(0.0, {}), Cell(0.31, {"mine": (0.25, 0.75)}), Cell(0.021, {"mine": (0.5, 0.125)}))
    second = (Cell(0.0, {}), Cell(0.47, {"mine": (0.0, 1.0)}), Cell(0.11, {"mine": (0.375, 0.625)}))
    blocks = (Block("model.layers.7", first), Block("model.attention", second))
    return Inspection("It is", "Paris", "Rome", (Adapter("mine", 2, "basis", 1),), tokens, blocks)


@settings(max_examples=40, deadline=None)
@given(
    st.text(max_size=12) | st.sampled_from([HOSTILE, "$x", "]]>", "<!--", "</title>", "\\u003c"])
)
def test_foreign_text_stays_text_on_the_page(text: str) -> None:
    tame, hostile = Reader(page(made_up("a"))), Reader(page(made_up(text)))
    elements = [(tag, name) for tag, name, _ in tame.attributes]
    assert [(tag, name) for tag, name, _ in hostile.attributes] == elements and hostile.balanced
    assert [tag for tag, _ in hostile.texts if tag == "script"] == ["script", "script"]
    data = hostile.data()
    assert data["tokens"][0]["label"] == visible(text) and data["adapters"][1]["name"] == text
    assert not {"<", ">", "&"} & set(hostile.raw_data())


def test_hostile_text_would_break_a_careless_page() -> None:
    careless = page(made_up("placeholder")).replace("placeholder", HOSTILE)
    assert ("img", "onerror") in {(tag, name) for tag, name, _ in Reader(careless).attributes}


def test_the_page_refers_to_nothing_outside_itself() -> None:
    html = page(measured())
    names = {name for _, name, _ in Reader(html).attributes}
    assert not names & {"src", "href", "srcset", "action", "style"} and not re.search(
        r"@import|url\(|fetch\(", html
    )
    # A name, never fetched.
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_a_browser_may_run_the_pages_own_script_and_no_other() -> None:
    html = page(measured())
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in html


def test_the_page_shows_what_was_measured() -> None:
    seen, reader = measured(), Reader(page(measured()))
    text = unescape(" ".join(text for _, text in reader.texts))
    assert {"It is", "Paris", "Rome"} <= {
        text for tag, text in reader.texts if tag in ("h1", "blockquote")
    }
    assert (
        all(sentence in text for sentence in summary(seen))
        and "the last prompt token and every" in text
    )
    data = reader.data()
    assert [block["label"] for block in data["blocks"]] == ["block 7", "model.attention"]
    for shown, block in zip(data["blocks"], seen.blocks, strict=True):
        assert [(cell["size"], cell["gates"]) for cell in shown["cells"]] == [
            (cell.size, {name: list(w) for name, w in cell.gates.items()}) for cell in block.cells
        ]
    assert data["tokens"][1]["changes"][0] == {
        "id": 7,
        "label": "·Rome",
        "before": 0.0077,
        "after": 0.9,
    }


def test_the_summary_says_where_how_strongly_and_what_turned() -> None:
    seen = measured()
    assert summary(seen) == [
        "The edits act in 2 blocks, on 1 of the prompt's 2 tokens and on every token of the answer.",
        "The first token of the answer changes: “Paris” 80% → 5.0%, “Rome” 0.77% → 90%.",
        "They are strongest at “is” in model.attention: the norm of the update is 47% of the hidden vector's.",
    ]
    still = replace(seen.tokens[1], changes=(Change(1, " a", 0.8, 0.9),))
    stays = summary(replace(seen, tokens=(seen.tokens[0], still), blocks=seen.blocks[:1]))
    assert stays[0] == "The edits act in 1 block, on 1 of the prompt's 2 tokens."
    assert (
        stays[1]
        == "The most probable first token of the answer stays “a”: 80% without the edits, 90% with them."
    )


def test_the_page_says_that_reft_has_no_gates() -> None:
    reft = replace(measured(), adapters=(Adapter("mine", 2, "none", 1),))
    assert "This adapter has no gates" in page(reft) and "has no gates" not in page(measured())


@pytest.mark.parametrize("text", [HOSTILE, "日本語 🤗 $\\nothing$", "x" * 300])
def test_the_picture_is_written_whatever_the_text(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from peft_baft.tools.inspect.figure import draw

    draw(made_up(text), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_every_gate_and_size() -> None:
    pytest.importorskip("matplotlib")
    from peft_baft.tools.inspect.figure import EDIT, GATE, _figure

    seen = measured()
    axes = _figure(seen).axes[0]
    texts = [text.get_text() for text in axes.texts]
    cells = [cell for block in seen.blocks for cell in block.cells if cell.gates]
    assert {percent(cell.size) for cell in cells} | {
        "block 7",
        "·Rome",
        "It is",
        "Paris",
        "Rome",
    } <= set(texts)
    heights = [
        p.get_height() / 0.54
        for p in axes.patches
        if p.get_alpha() is None and p.get_facecolor() == _rgba(GATE)
    ]
    assert heights == pytest.approx([w for cell in cells for w in cell.gates["mine"]])
    assert any(p.get_facecolor() == _rgba(EDIT) for p in axes.patches)


def _rgba(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return to_rgba(color)


def test_without_matplotlib_the_picture_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from peft_baft.tools.inspect.figure import draw

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-baft\[plot\]'"):
        draw(made_up("a"), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_the_page_and_the_commands_need_no_matplotlib() -> None:
    source = Path(inspect_page.__file__).parent
    assert not [
        p
        for p in source.glob("*.py")
        if re.search("^(import|from) matplotlib", p.read_text(), re.M)
    ]
