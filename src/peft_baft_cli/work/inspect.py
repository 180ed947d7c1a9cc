"""`baft inspect`."""

from __future__ import annotations

import re
from pathlib import Path

from peft_baft.adapter.registration import BAFT
from peft_baft.tools.inspect import figure, page
from peft_baft.tools.inspect.inspect import inspect as inspect_prompt
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import InspectCommand
from peft_baft_cli.screen import doing
from peft_baft_cli.work.common import attach_adapter, chosen_form, chosen_model


def inspect(options: InspectCommand) -> int:
    """Write a page, and a PNG if matplotlib is installed, on how an adapter processes a prompt; return the exit code."""
    choice = chosen_model(options)
    kind = getattr(choice.adapter, "peft_type", None)
    if kind != BAFT:
        raise ValueError(
            f"baft inspect shows the gates of a BaFT adapter, but {options.adapter} is of type {kind}."
        )
    base, tokenizer = choice.load_base()
    template = chosen_form(options.template, tokenizer, choice.adapter)
    edited = attach_adapter(base, options.adapter, options.adapter_revision)
    with doing("inspecting"):
        inspection = inspect_prompt(
            edited, tokenizer, options.prompt, options.max_new_tokens, template=template
        )
    output = options.output or _default_page(options.prompt)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page.page(inspection), encoding="utf-8")
    print(f"{output}: open it in a browser")
    try:
        figure.draw(inspection, output.with_suffix(".png"))
        print(output.with_suffix(".png"))
    except ImportError as error:  # the page does not need matplotlib
        print(f"no PNG: {error}")
    return DONE


def _default_page(prompt: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return Path("inspect") / f"{name or 'prompt'}.html"
