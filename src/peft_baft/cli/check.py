"""`baft check`."""

from __future__ import annotations

from json import dumps

from peft_baft.checking.check import check as check_model
from peft_baft.cli.common import adapter_config, chosen_model, default_device, load_base, require_device
from peft_baft_cli.errors import DONE, NOT_SO
from peft_baft_cli.screen import doing


def check(
    *,
    model: str | None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    json: bool = False,
) -> int:
    """Print what holds for a model, and for an adapter on it; the exit code.

    Args:
        adapter: a folder or a Hub id; by default a random adapter is tried. json: print JSON.
    """
    device = default_device(device)
    require_device(device)
    config = None if adapter is None else adapter_config(adapter, adapter_revision)
    name, revision = chosen_model(model, revision, config)
    with doing(f"loading {name}"):
        base, tokenizer = load_base(name, revision, dtype, device)
    with doing("checking, which takes about a minute"):
        report = check_model(base, tokenizer, adapter=adapter, adapter_revision=adapter_revision)
    print(dumps(report.to_dict(), indent=2) if json else report)
    return DONE if report.ok else NOT_SO
