"""The card of an adapter's folder: what a page of the Hub shows, and by what the Hub lists it under its base model.

The card has two parts: what this package writes anew each time, between two marks, and whatever a person writes outside of
them, which stays.
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
REPORT = "report.json"  # what `baft edit` measured
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
- An edit holds for the form in which it was taught (raw text or the chat template), in other words less often than in its own,
  and not for everything that follows from it.
- Questions that look like an edited one may have moved: the same question about another subject, another one about its subject.
- Edits depend on the input, so the adapter cannot be merged into the weights.
- Where a prompt ends decides which tokens are edited. `generate()` knows it; whoever scores texts without labels has to say it
  (`peft_baft.prompt_lengths`).
""".strip()


@dataclass(frozen=True)
class Measured:
    """Figures of an adapter, and by which protocol they were found.

    Attributes:
        data: name of the data. rows: which ones, or None. scores: by name of `SCORES`. protocol: one line.
    """

    data: str
    rows: str | None
    scores: Mapping[str, float]
    protocol: str

    @property
    def shown(self) -> str:
        """The data and its rows, for a reader."""
        return self.data if self.rows is None else f"{self.data}, rows {self.rows}"


class AdapterResult(Protocol):
    """What a card reads of a benchmark's result: `peft_baft_bench`'s result lines have it.

    Attributes:
        benchmark: its name. data: file, its hash, and rows, the last excluded. scores: by name of `SCORES`.
        protocol: how questions were asked. settings: of the adapter, with the hash of its weights.
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
    """What a card is made from, besides the files of the adapter's folder.

    Attributes:
        config: of the adapter. base_model, base_revision: the base model's id on the Hub; None for what the config says.
        repo_id: under which the adapter will be found; None for a folder.
        facts: whether the card shows the facts and a picture of them.
        subfolder: of the adapter, where it is not in the folder itself.
        results: lines of `baft bench --adapter`. tags: further ones.
        weights_are_saved: whether the adapter is what the folder holds; a report there may else be about an earlier state.
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
        """The base model's id on the Hub, None if that is not known."""
        return self.base_model or base_model_on_hub(self.config.base_model_name_or_path)

    @property
    def revision(self) -> str | None:
        """The base model's branch, tag or commit; None if that is not known."""
        return self.base_revision or self.config.revision


def write_card(
    target: Path, source: CardSource, folder: Path, earlier: ModelCard | None = None
) -> None:
    """Write the card of an adapter.

    Args:
        target: the folder that gets the card. folder: that of the adapter, whose journal, report and pictures are described.
        earlier: a card whose text and metadata of a person's own stay.
    """
    report = _report(folder) if source.weights_are_saved else {}
    measured = [*_of_report(report), *(_of_line(line) for line in source.results)]
    data = _metadata(earlier, source, measured, source.repo_id or folder.resolve().name)
    text = merged(
        "" if earlier is None else earlier.text, _section(folder, source, report, measured)
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(target / CARD)


def card_in(folder: Path) -> ModelCard | None:
    """Read the card of a folder, None where there is none."""
    return ModelCard.load(folder / CARD) if (folder / CARD).is_file() else None


def merged(own: str, section: str) -> str:
    """Put this package's part into a card's text: in the place of its earlier one, else before a person's text."""
    before, mark, rest = own.partition(BEGIN)
    if mark and END in rest:
        after = rest.partition(END)[2]
        return f"{before.rstrip()}\n\n{section}\n{after.rstrip()}".strip() + "\n"
    own = "" if _is_placeholder(own) else own.strip()
    return f"{section}\n\n{own}".strip() + "\n"


def own_text(text: str) -> str:
    """Give what a person wrote into a card's text: all but this package's part and a library's unfilled form."""
    before, mark, rest = text.partition(BEGIN)
    if mark and END in rest:
        text = before + rest.partition(END)[2]
    return "" if _is_placeholder(text) else text.strip()


def _is_placeholder(text: str) -> bool:
    """Tell whether a card's text is a form of huggingface_hub that nobody has filled in."""
    missing = text.count("[More Information Needed]")
    return missing >= 5 and "## Uses" in text


def _metadata(
    earlier: ModelCard | None, source: CardSource, measured: Sequence[Measured], name: str
) -> ModelCardData:
    """Make the head of the card; fields of a person's own stay."""
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
    """Write this package's part of the card."""
    local, base_model, facts = (
        local_name(source.config.base_model_name_or_path),
        source.base,
        source.facts,
    )
    shown = markdown(base_model or local or "a language model")
    linked = f"[{shown}](https://huggingface.co/{base_model})" if base_model else shown
    kind = f"a [BaFT]({PAPER}) adapter"
    try:
        taught, damage = facts_of_journal(Journal(folder)), False
    except ValueError:  # an adapter must be saved all the same
        taught, damage = [], True
    parts = [
        BEGIN,
        f"# Edits of {shown}",
        f"This is {kind} for {linked}, made with `peft_baft`. It changes single facts that the model states, and is meant to "
        "leave everything else as it is; the model's weights stay untouched.",
    ]
    if local is not None and local != base_model:
        parts.append(
            f"The facts were taught to the model in {markdown(local)}. Weights that were quantised differ from "
            "those on the Hub: check the edits there."
        )
    parts += ["## Use it", _snippet(source, folder, base_model or local or "the base model")]
    parts += _about_facts(report, taught, facts)
    if damage:
        parts += [
            "## The edits",
            "They are not listed here: the journal in this folder is damaged.",
        ]
    if measured:
        parts += ["## What was measured", _table_of(measured)]
    pictures = [picture.image for picture in pictures_of(folder) if picture.image] if facts else []
    if pictures:
        parts += [
            "## What an edit does",
            *(f"![gates and next tokens]({name})" for name in pictures[:1]),
        ]
    return "\n\n".join([*parts, "## Limits", LIMITS, END])


def _snippet(source: CardSource, folder: Path, base_model: str) -> str:
    """Show how the adapter is loaded, and asked in the form that its facts were taught in."""
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
        "import peft_baft  # pip install peft-baft; makes PEFT know the type, without it: KeyError: 'BAFT'",
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
    """Say which facts were taught, as far as the folder knows and may tell."""
    inside = [fact for fact in taught if fact.in_adapter]
    if not taught:
        return []
    count = f"{len(inside)} {'fact' if len(inside) == 1 else 'facts'}"
    if not shown:
        return [
            "## The edits",
            f"The adapter was taught {count}. Its makers keep them to themselves.",
        ]
    answers = _answers(report)
    rows = []
    for fact in inside[:SHOWN_FACTS]:
        words = prompt_words(fact.prompt)
        before, after = answers.get((words, fact.target), ("", ""))
        rows.append((words, fact.target, before, after))
    # Answers are known of the run that `baft edit` made last.
    columns = 4 if any(before or after for _, _, before, after in rows) else 2
    head = ("Prompt", "Taught", "Said before", "Says now")[:columns]
    more = len(inside) - len(rows)
    tail = [f"and {more} more, in `journal.jsonl`."] if more else []
    return [
        "## The edits",
        f"The adapter was taught {count}:",
        _table(head, [row[:columns] for row in rows]),
        *tail,
    ]


def _answers(report: Mapping[str, Any]) -> dict[tuple[str, str], tuple[str, str]]:
    """Read what the model said before and after its edits, by prompt and target, where `baft edit` noted it."""
    found = {}
    for answer in report.get("answers") or ():
        if not isinstance(answer, dict):
            continue
        key = (str(answer.get("prompt")), str(answer.get("wanted")))
        found[key] = (str(answer.get("before", "")), str(answer.get("after", "")))
    return found


def _report(folder: Path) -> dict[str, Any]:
    """Read what `baft edit` wrote, if it is about the weights that are in the folder now."""
    try:
        report = json.loads((folder / REPORT).read_text("utf-8"))
        weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and report.get("sha256") == weights else {}


def _of_report(report: Mapping[str, Any]) -> list[Measured]:
    """Give what `baft edit` measured on the edits themselves."""
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
            f"teacher-forced token match, form {form}; locality: as the unedited model, on the records' own questions and on "
            "general ones",
        )
    ]


def _of_line(line: AdapterResult) -> Measured:
    first, last = line.data["rows"]
    scores = {name: line.scores[name] for name in SCORES if name in line.scores}
    form, data = line.protocol.get("template", "raw"), line.data
    protocol = f"baft bench {line.benchmark}, form {form}, {data['file']} ({data['sha256']})"
    return Measured(line.benchmark, f"{first}:{last}", scores, protocol)


def _table_of(measured: Sequence[Measured]) -> str:
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
    """Write a text so that Markdown and HTML show it as it is, on one line, cut where it is very long."""
    line = " ".join(text.split())
    if len(line) > LONGEST_CELL:
        line = line[: LONGEST_CELL - 1] + "…"
    return re.sub(r"([\\`*_\[\]~|@$])", r"\\\1", html.escape(line, quote=False))
