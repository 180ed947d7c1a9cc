"""What a check of a model found, as data and as a plain table."""

from __future__ import annotations

import platform
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("peft-baft", "torch", "transformers", "peft", "accelerate")
DETAIL_WIDTH = 96


@dataclass(frozen=True)
class Finding:
    """One thing that a check tried.

    Attributes:
        name: what should hold, in plain words.
        holds: whether it does; None where it does not apply to this model.
        difference: the largest difference that was found, None where nothing was compared.
        tolerance: up to which difference it holds; None where the difference is no error.
        detail: why it does not hold or apply, or what else is worth knowing.
    """

    name: str
    holds: bool | None
    difference: float | None = None
    tolerance: float | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        """The finding in a word: `yes`, `NO`, or `not applicable`."""
        return {True: "yes", False: "NO", None: "not applicable"}[self.holds]


@dataclass(frozen=True)
class CheckReport:
    """The findings of a check of one model.

    Attributes:
        model: the model's class. architecture: its config's `model_type`, or "".
        dtype: of the base model's weights. blocks: names of the edited modules.
        findings: in the order in which they were tried.
        versions: of Python and of the packages that take part.
    """

    model: str
    architecture: str
    dtype: str
    blocks: tuple[str, ...]
    findings: tuple[Finding, ...]
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.holds is not False for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """Get the finding of that name."""
        return next(finding for finding in self.findings if finding.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON takes it."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        head = f"{self.model} ({self.architecture or 'no model_type'}), {self.dtype}"
        lines = [head, f"edited: {', '.join(self.blocks) or 'nothing'}", ""]
        lines.append(f"{'':{width}}  {'holds':14}  {'difference':>10}  tolerance")
        for finding in self.findings:
            numbers = f"{_number(finding.difference):>10}  {_number(finding.tolerance):>9}"
            lines.append(f"{finding.name:{width}}  {finding.verdict:14}  {numbers}".rstrip())
            lines += textwrap.wrap(
                finding.detail, DETAIL_WIDTH, initial_indent="    ", subsequent_indent="    "
            )
        lines += [
            "",
            "Differences of logits are in standard deviations of the logits.",
            self._summary(),
        ]
        lines.append(", ".join(f"{name} {number}" for name, number in self.versions.items()))
        return "\n".join(lines)

    def _summary(self) -> str:
        failed = [finding.name for finding in self.findings if finding.holds is False]
        if failed:
            return f"NOT WHOLE: {'; '.join(failed)}."
        return "Whole: edits of this model are trained, kept and applied at the right tokens."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a model does."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
