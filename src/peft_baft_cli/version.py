"""`baft --version`: what a bug report needs, from the packages' metadata, without importing them."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("peft-baft", "peft", "transformers", "torch", "accelerate", "safetensors")


def installed_versions() -> str:
    """A line for each package, Python and the system."""
    lines = [f"{name} {_version(name)}" for name in PACKAGES]
    return "\n".join([*lines, f"python {platform.python_version()} on {platform.system()} {platform.machine()}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


class ShowVersions(argparse.Action):
    """Print the versions and end; argparse's own action would look them up whenever the parser is built."""

    def __init__(self, option_strings: Any, dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(installed_versions())
        parser.exit()
