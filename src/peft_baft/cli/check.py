"""`baft check`: whether edits of a model are trained, kept and applied at the right tokens."""

from __future__ import annotations

import argparse
import json
from typing import Any


def check(args: argparse.Namespace) -> int:
    """Prove on your own model that edits reach the right tokens and that nothing else changes; takes about a minute."""
    from peft_baft.evaluation.check import check as check_model
    from peft_baft.models import load_model

    model, tokenizer = load_model(args.model, args.dtype, device_map=args.device)
    report = check_model(model, tokenizer, adapter=args.adapter)
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)
    return 0 if report.ok else 1


def add_commands(commands: Any) -> None:
    """Put `check` among the commands."""
    from peft_baft.cli.common import command

    parser = command(commands, "check", check)
    parser.add_argument("--adapter", help="a BaFT adapter to check with: folder or Hub id; by default a random one")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
