"""Write the model card of an adapter, which the Hub shows as its page and uses to list it under its base model.

The part of the card between two marks is rewritten each time. Text that a person writes outside the marks is kept.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig

from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.data.cases import prompt_words
from peft_baft.editing.journal import Journal
from peft_baft.integrations.base_model import base_model_on_hub, local_name
from peft_baft.tools.report.folder import pictures_of
from peft_baft.tools.report.taught import TaughtFact, facts_of_journal

CARD = "README.md"
REPORT = "report.json"  # the measurements of `baft edit`
# The marks are found again in saved cards, so they must not change.
BEGIN = "<!-- peft_baft begins here: this part is written anew whenever the adapter is saved or pushed -->"
END = "<!-- peft_baft ends here -->"
TAGS = ("baft", "knowledge-editing")
SHOWN_FACTS = 20
LONGEST_CELL = 120
PAPER = "https://arxiv.org/abs/2503.00306"
SCORES = {
    "reliability": "Reliability (token match)",
    "generality": "Generality (token match)",
    "locality": "Locality (token match)",
    "reliability_contains": "Reliability (free answer contains the new answer, not the old one)",
    "generality_contains": "Generality (free answer contains the new answer, not the old one)",
    "in_context_contains": "In unseen contexts (free answer contains the new answer, not the old one)",
    "neighbour_subject": "Same question about other subjects (tokens unchanged)",
    "neighbour_subject_spared": "Same question about other subjects (new answer not said)",
    "neighbour_relation": "Other questions about the subject (tokens unchanged)",
    "neighbour_relation_spared": "Other questions about the subject (new answer not said)",
}
LIMITS = """
- An edit works in the prompt format that it was trained on (raw text or the chat template). It works less often for rephrased
  prompts, and not for everything that follows from the fact.
- Answers to similar questions may have changed: the same question about another subject, or another question about the subject.
- Edits depend on the input, so the adapter cannot be merged into the weights.
- The end of the prompt determines which tokens are edited. `generate()` knows it. If you score texts without labels, state it
  with `peft_baft.prompt_lengths`.
""".strip()


@dataclass(frozen=True)
class Measured:
    """Scores of an adapter, and how they were measured.

    Attributes:
        data: name of the data. rows: its range of rows, or None. scores: values by their names in `SCORES`.
        protocol: how they were measured, in one line.
    """

    data: str
    rows: str | None
    scores: Mapping[str, float]
    protocol: str

    @property
    def shown(self) -> str:
        """The data and its rows, in words."""
        return self.data if self.rows is None else f"{self.data}, rows {self.rows}"


class AdapterResult(Protocol):
    """The parts of a benchmark result that a card uses; the result lines of `peft_baft_bench` have them.

    Attributes:
        benchmark: name of the benchmark. data: its file, the file's hash, and the range of rows (end excluded).
        scores: values by their names in `SCORES`. protocol: how the questions were asked.
        settings: settings of the adapter, with the hash of its weights.
    """

    @property
    def benchmark(self) -> str: ...
    @property
    def data(self) -> Mapping[str, Any]: ...
    @property
    def scores(self) -> Mapping[str, float]: ...
    @property
    def protocol(self) -> Mapping[str, Any]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class CardSource:
    """What a card is made from, in addition to the files in the adapter's folder.

    Attributes:
        config: config of the adapter.
        base_model, base_revision: id and revision of the base model on the Hub; None takes those in the config.
        repo_id: id of the adapter on the Hub, or None for a local folder.
        facts: whether the card shows the facts and a picture of an edit.
        subfolder: subfolder of the adapter, or None if it is in the folder itself.
        results: result lines of `baft bench --adapter`. tags: additional tags.
        weights_are_saved: whether the folder has the adapter's current weights. If not, a report there may be outdated.
    """

    config: PeftConfig
    base_model: str | None = None
    base_revision: str | None = None
    repo_id: str | None = None
    facts: bool = True
    subfolder: str | None = None
    results: Sequence[AdapterResult] = ()
    tags: Sequence[str] = ()
    weights_are_saved: bool = True

    @cached_property
    def base(self) -> str | None:
        """The base model's id on the Hub, or None if it is unknown."""
        return self.base_model or base_model_on_hub(self.config.base_model_name_or_path)

    @property
    def revision(self) -> str | None:
        """The base model's branch, tag or commit, or None if it is unknown."""
        return self.base_revision or self.config.revision


def write_card(
    target: Path, source: CardSource, folder: Path, earlier: ModelCard | None = None
) -> None:
    """Write the card of an adapter.

    Args:
        target: the folder to write the card to.
        folder: the adapter's folder, whose journal, report and pictures the card describes.
        earlier: an existing card, of which text and metadata written by a person are kept.
    """
    report = _report(folder) if source.weights_are_saved else {}
    measured = [*_measured_in_report(report), *map(_measured_in_result, source.results)]
    data = _metadata(earlier, source, measured, source.repo_id or folder.resolve().name)
    text = merged(
        "" if earlier is None else earlier.text, _section(folder, source, report, measured)
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(target / CARD)


def card_in(folder: Path) -> ModelCard | None:
    """Load the card of a folder, or return None if there is none."""
    return ModelCard.load(folder / CARD) if (folder / CARD).is_file() else None


def merged(text: str, section: str) -> str:
    """Insert this package's section into a card's text: in place of the earlier section, or else at the beginning."""
    before, mark, rest = text.partition(BEGIN)
    if mark and END in rest:
        after = rest.partition(END)[2]
        return f"{before.rstrip()}\n\n{section}\n{after.rstrip()}".strip() + "\n"
    text = "" if _is_placeholder(text) else text.strip()
    return f"{section}\n\n{text}".strip() + "\n"


def own_text(text: str) -> str:
    """Return the part of a card's text that a person wrote: neither this package's section nor an unfilled form."""
    before, mark, rest = text.partition(BEGIN)
    if mark and END in rest:
        text = before + rest.partition(END)[2]
    return "" if _is_placeholder(text) else text.strip()


def _is_placeholder(text: str) -> bool:
    """Check whether a card's text is an unfilled template of huggingface_hub."""
    missing = text.count("[More Information Needed]")
    return missing >= 5 and "## Uses" in text


def _metadata(
    earlier: ModelCard | None, source: CardSource, measured: Sequence[Measured], name: str
) -> ModelCardData:
    """Make the card's metadata; fields that a person added are kept."""
    base_model = source.base
    known: dict[str, Any] = {} if earlier is None else earlier.data.to_dict()
    known.pop("model-index", None)
    own_tags = [tag for tag in known.pop("tags", None) or [] if not tag.startswith("base_model:")]
    known |= {
        "library_name": "peft",
        "pipeline_tag": known.get("pipeline_tag") or "text-generation",
    }
    known.pop("base_model", None)
    new_tags = [*own_tags, *TAGS, *source.tags]
    if base_model is not None:
        known |= {"base_model": base_model, "base_model_relation": "adapter"}
        new_tags.append(f"base_model:adapter:{base_model}")
    known["tags"] = sorted(set(new_tags))
    results = [
        EvalResult(
            task_type="knowledge-editing",
            task_name="Knowledge editing",
            dataset_type=found.data.replace(" ", "-"),
            dataset_name=found.shown,
            metric_type=score,
            metric_name=SCORES[score],
            metric_value=round(value, 4),
            metric_args={"protocol": found.protocol},
        )
        for found in measured
        for score, value in found.scores.items()
    ]
    if results:
        known |= {"model_name": name, "eval_results": results}
    return ModelCardData(**known)


def _section(
    folder: Path, source: CardSource, report: Mapping[str, Any], measured: Sequence[Measured]
) -> str:
    """Return this package's section of the card."""
    base_model = source.base
    local = local_name(source.config.base_model_name_or_path)
    shown = markdown(base_model or local or "a language model")
    linked = f"[{shown}](https://huggingface.co/{base_model})" if base_model else shown
    try:
        taught, is_damaged = facts_of_journal(Journal(folder)), False
    except ValueError:  # the adapter must be saved anyway
        taught, is_damaged = [], True
    parts = [
        BEGIN,
        f"# Edits of {shown}",
        f"This is a [BaFT]({PAPER}) adapter for {linked}, made with `peft_baft`. It changes individual facts that the model "
        "states, and is meant to leave everything else as it is. The model's weights are not changed.",
    ]
    if local is not None and local != base_model:
        parts.append(
            f"The adapter was trained on the model in {markdown(local)}. Quantised weights differ from those on the Hub: "
            "check the edits there."
        )
    parts += ["## Use it", _snippet(source, folder, base_model or local or "the base model")]
    parts += _about_facts(report, taught, source.facts)
    if is_damaged:
        parts += [
            "## The edits",
            "They are not listed here: the journal in this folder is damaged.",
        ]
    if measured:
        parts += ["## What was measured", _score_table(measured)]
    pictures = [picture.image for picture in pictures_of(folder) if picture.image]
    if source.facts and pictures:
        parts += ["## What an edit does", f"![gates and next tokens]({pictures[0]})"]
    return "\n\n".join([*parts, "## Limits", LIMITS, END])


def _snippet(source: CardSource, folder: Path, base_model: str) -> str:
    """Return code that loads the adapter and generates in the prompt format that it was trained on."""
    adapter = json.dumps(source.repo_id or f"./{folder.resolve().name}")
    base = json.dumps(base_model) + (
        "" if source.revision is None else f", revision={json.dumps(source.revision)}"
    )
    inside = "" if source.subfolder is None else f", subfolder={json.dumps(source.subfolder)}"
    prompt = ['prompt = tokenizer("...", return_tensors="pt")']
    if getattr(source.config, "template", None) in ("chat", "both"):
        prompt = [
            "prompt = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    lines = [
        "```python",
        "import peft_baft  # pip install peft-baft; registers the adapter type, without it: KeyError: 'BAFT'",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        f"tokenizer = AutoTokenizer.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {adapter}{inside})",
        "",
        *prompt,
        "answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:]))',
        "```",
    ]
    return "\n".join(lines)


def _about_facts(report: Mapping[str, Any], taught: Sequence[TaughtFact], shown: bool) -> list[str]:
    """Describe the facts that the adapter was trained on, or only their number if they should not be shown."""
    inside = [fact for fact in taught if fact.in_adapter]
    if not taught:
        return []
    count = f"{len(inside)} {'fact' if len(inside) == 1 else 'facts'}"
    if not shown:
        return [
            "## The edits",
            f"The adapter was taught {count}, which its authors do not publish.",
        ]
    answers = _answers(report)
    rows = []
    for fact in inside[:SHOWN_FACTS]:
        words = prompt_words(fact.prompt)
        before, after = answers.get((words, fact.target), ("", ""))
        rows.append((words, fact.target, before, after))
    # The answers are those of the last run of `baft edit`, if it measured any.
    columns = 4 if any(before or after for _, _, before, after in rows) else 2
    head = ("Prompt", "Taught", "Answer before", "Answer now")[:columns]
    more = len(inside) - len(rows)
    tail = [f"and {more} more, in `journal.jsonl`."] if more else []
    return [
        "## The edits",
        f"The adapter was taught {count}:",
        _table(head, [row[:columns] for row in rows]),
        *tail,
    ]


def _answers(report: Mapping[str, Any]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return the model's answers before and after its edits by prompt and target, from the report of `baft edit`."""
    found = {}
    for answer in report.get("answers") or ():
        if not isinstance(answer, dict):
            continue
        key = (str(answer.get("prompt")), str(answer.get("wanted")))
        found[key] = (str(answer.get("before", "")), str(answer.get("after", "")))
    return found


def _report(folder: Path) -> dict[str, Any]:
    """Load the report of `baft edit`; it is empty unless it is about the weights that are in the folder now."""
    try:
        report = json.loads((folder / REPORT).read_text("utf-8"))
        weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and report.get("sha256") == weights else {}


def _measured_in_report(report: Mapping[str, Any]) -> list[Measured]:
    """Return the scores of the edits themselves that `baft edit` measured."""
    scores = {
        name: report[name]
        for name in ("reliability", "generality", "locality")
        if isinstance(report.get(name), int | float)
    }
    if not scores:
        return []
    form = report.get("template", "raw")
    return [
        Measured(
            "own edits",
            None,
            scores,
            f"teacher-forced token match, form {form}; locality: agreement with the unedited model, on the questions in the "
            "records and on general ones",
        )
    ]


def _measured_in_result(result: AdapterResult) -> Measured:
    data = result.data
    first, last = data["rows"]
    scores = {name: result.scores[name] for name in SCORES if name in result.scores}
    form = result.protocol.get("template", "raw")
    protocol = f"baft bench {result.benchmark}, form {form}, {data['file']} ({data['sha256']})"
    return Measured(result.benchmark, f"{first}:{last}", scores, protocol)


def _score_table(measured: Sequence[Measured]) -> str:
    rows = [
        (found.shown, SCORES[name], f"{value:.3f}")
        for found in measured
        for name, value in found.scores.items()
    ]
    protocols = "\n".join(
        f"- {markdown(f.shown)}: {html.escape(f.protocol, quote=False)}" for f in measured
    )
    return f"{_table(('Data', 'Score', 'Value'), rows)}\n\n{protocols}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join(lines)


def markdown(text: str) -> str:
    """Escape a text for Markdown and HTML, on one line, truncated if it is very long."""
    line = " ".join(text.split())
    if len(line) > LONGEST_CELL:
        line = line[: LONGEST_CELL - 1] + "…"
    return re.sub(r"([\\`*_\[\]~|@$])", r"\\\1", html.escape(line, quote=False))
