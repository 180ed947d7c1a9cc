"""The benchmarks by name: what makes up their average, and what is asked besides the file's own probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_baft.data.cases import Case, Probe
from peft_baft.data.unrelated import CANARIES

CANARY_TOPIC = "general knowledge"


@dataclass(frozen=True)
class Benchmark:
    """How a data set is judged.

    Args:
        averaged: the measures whose mean is the paper's `Avg` column.
        unrelated: what is trained beside by default: `general`, or `none` as in the paper's single editing (Table 1).
        canaries: ask general questions too, for data that brings no locality probes of its own choice.
    """

    averaged: tuple[str, ...]
    unrelated: str = "none"
    canaries: bool = False

    def prepared(self, cases: Sequence[Case]) -> list[Case]:
        """The cases with what else is to be asked."""
        if not self.canaries:
            return list(cases)
        general = tuple(Probe("locality", p.prompt, p.answer, CANARY_TOPIC) for p in CANARIES)
        return [replace(case, probes=(*case.probes, *general)) for case in cases]


_ZSRE = ("reliability", "generality", "locality")
_KNOWEDIT = ("reliability", "portability", "locality")
BENCHMARKS = {
    "zsre": Benchmark(_ZSRE, "general"),
    "counterfact": Benchmark(_ZSRE, "general"),
    "facts": Benchmark(_ZSRE, "general", canaries=True),
    "wiki_recent": Benchmark(_KNOWEDIT),
    "wiki_counterfact": Benchmark(_KNOWEDIT),
    "wikibio": Benchmark(_KNOWEDIT),
    "knowedit_zsre": Benchmark(_KNOWEDIT),
    "convsent": Benchmark(("reliability",)),
}
PIQA = "piqa"  # asked of a model as it is
