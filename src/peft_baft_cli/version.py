"""`baft --version`: the versions for a bug report, from the packages' metadata, without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("peft-baft", "peft", "transformers", "torch", "accelerate", "safetensors")


def installed_versions() -> str:
    """Return one line per package, and one for Python and the system."""
    lines = [f"{name} {_version(name)}" for name in PACKAGES]
    return "\n".join(
        [*lines, f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
