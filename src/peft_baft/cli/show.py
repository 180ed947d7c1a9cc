"""`baft plot` and `baft inspect`: result lines and adapters as pictures."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_baft.bench.results import read_results
from peft_baft.cli.common import command, model_name
from peft_baft.evaluation.inspection import inspect as inspected
from peft_baft.models import load_model
from peft_baft.show import inspect_figure, inspect_page, plots
from peft_baft.show.tables import tables


def plot(args: argparse.Namespace) -> int:
    """Turn result lines into tables (markdown, csv) and figures."""
    made = tables(read_results(args.results))
    args.output.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(made, start=1):
        print(f"\n{table.markdown()}")
        (args.output / f"table{number}.csv").write_text(table.csv(), encoding="utf-8")
    (args.output / "tables.md").write_text("\n\n".join(table.markdown() for table in made) + "\n", encoding="utf-8")
    figures = [] if args.no_figures else plots.draw_all(read_results(args.results), args.output)
    print(f"\nIn {args.output}: tables.md, {len(made)} csv" + "".join(f", {figure.name}" for figure in figures))
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Draw what an adapter does to a prompt: gates and updates by token and block, and the changed next tokens."""
    base, tokenizer = load_model(model_name(args), args.dtype, device_map=args.device)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    found = inspected(model, tokenizer, args.prompt, args.max_new_tokens)
    page = (
        args.output
        or Path("inspect") / f"{re.sub(r'[^a-z0-9]+', '-', args.prompt.lower()).strip('-')[:60] or 'prompt'}.html"
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(inspect_page.page(found), encoding="utf-8")
    print(f"{page}: open it in a browser")
    try:
        inspect_figure.draw(found, page.with_suffix(".png"))
        print(page.with_suffix(".png"))
    except ImportError as error:  # the page needs nothing
        print(f"no PNG: {error}")
    return 0


def add_commands(commands: Any) -> None:
    """Put `plot` and `inspect` among the commands."""
    parser = commands.add_parser("plot", help=plot.__doc__, description=plot.__doc__)
    parser.set_defaults(run=plot)
    parser.add_argument("results", nargs="+", type=Path, help="files of result lines, from `baft bench`")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="a folder; by default figures/")
    parser.add_argument("--no-figures", action="store_true", help="tables alone, which need no matplotlib")
    parser = command(commands, "inspect", inspect, model_required=False)
    parser.add_argument("--adapter", required=True, help="a BaFT adapter: folder or Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument(
        "--output", type=Path, help="the HTML page; the PNG goes beside it. By default inspect/PROMPT.html"
    )
