"""`baft plot` and `baft inspect`: result lines and adapters as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from peft_baft.adapter.registration import BAFT
from peft_baft.benchmark.report import plots
from peft_baft.benchmark.report.tables import tables
from peft_baft.benchmark.results import read_results
from peft_baft.cli.common import adapter_config, attach_adapter, chosen_model, default_device, load_base, require_device
from peft_baft.inspection import figure
from peft_baft.inspection import page as inspection_page
from peft_baft.inspection.inspect import inspect as inspected
from peft_baft_cli.screen import doing


def plot(results: Sequence[Path], output: Path, no_figures: bool = False) -> int:
    """Turn files of result lines into tables and figures in the folder `output`; the exit code."""
    lines = read_results(results)
    made = tables(lines)
    output.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(made, start=1):
        print(f"\n{table.markdown()}")
        (output / f"table{number}.csv").write_text(table.csv(), encoding="utf-8")
    (output / "tables.md").write_text("\n\n".join(table.markdown() for table in made) + "\n", encoding="utf-8")
    figures = [] if no_figures else plots.draw_all(lines, output)
    print(f"\nIn {output}: tables.md, {len(made)} csv" + "".join(f", {figure.name}" for figure in figures))
    return 0


def inspect(
    prompt: str,
    adapter: str,
    *,
    adapter_revision: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_new_tokens: int = 12,
    output: Path | None = None,
) -> int:
    """Write a page, and a PNG where matplotlib is installed, of what an adapter does to a prompt; the exit code.

    Args:
        adapter: a BaFT adapter, as a folder or a Hub id. output: the page; by default it is named after the prompt.
    """
    device = default_device(device)
    require_device(device)
    config = adapter_config(adapter, adapter_revision)
    if config.peft_type != BAFT:
        raise ValueError(
            f"baft inspect shows the gates of a BaFT adapter, but {adapter} is of type {config.peft_type}."
        )
    name, revision = chosen_model(model, revision, config)
    with doing(f"loading {name}"):
        base, tokenizer = load_base(name, revision, dtype, device)
        edited = attach_adapter(base, adapter, adapter_revision)
    with doing("looking"):
        found = inspected(edited, tokenizer, prompt, max_new_tokens)
    page = output or _default_page(prompt)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(inspection_page.page(found), encoding="utf-8")
    print(f"{page}: open it in a browser")
    try:
        figure.draw(found, page.with_suffix(".png"))
        print(page.with_suffix(".png"))
    except ImportError as error:  # the page needs nothing
        print(f"no PNG: {error}")
    return 0


def _default_page(prompt: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return Path("inspect") / f"{name or 'prompt'}.html"
