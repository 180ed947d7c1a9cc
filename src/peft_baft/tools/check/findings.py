"""The results of a check of a model, as data and as a plain text table."""

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
    """The result of one trial of a check.

    Attributes:
        name: what should hold, in words.
        holds: whether it does; None if it does not apply to this model.
        difference: the largest difference, or None if nothing was compared.
        tolerance: the largest difference that is accepted, or None if a difference is not an error.
        detail: why it does not hold or apply, or other information.
    """

    name: str
    holds: bool | None
    difference: float | None = None
    tolerance: float | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        """The result in words: `yes`, `NO`, or `not applicable`."""
        return {True: "yes", False: "NO", None: "not applicable"}[self.holds]


@dataclass(frozen=True)
class CheckReport:
    """The results of a check of one model.

    Attributes:
        model: name of the model's class. architecture: its config's `model_type`, or "".
        dtype: dtype of the base model's weights. blocks: names of the edited modules.
        findings: the results, in the order of the trials.
        versions: versions of Python and of the packages that affect results.
    """

    model: str
    architecture: str
    dtype: str
    blocks: tuple[str, ...]
    findings: tuple[Finding, ...]
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether no trial failed."""
        return all(finding.holds is not False for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """Return the finding with this name."""
        return next(finding for finding in self.findings if finding.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serialisable dict."""
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
            return f"FAILED: {'; '.join(failed)}."
        return "Passed: edits of this model are trained, saved and applied at the right tokens."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect what a model does."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
