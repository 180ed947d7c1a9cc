"""Each command with its options, as a frozen dataclass.

Typer reads the options of a command from the signature of a callable. Here that is the class itself, so that typer's result
is an instance of it. Its `run` imports the work of the command, and torch with it, once the command line is known to be good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

from typer import Argument

from peft_baft_cli.values import (
    LARGEST_SEED,
    choice,
    flag,
    number_above_zero,
    share,
    text,
    whole_number,
)

MODEL, TRAINING, JOURNAL = "The model", "Training", "Journal and checks"  # headings in help

# A test compares these with the package, whose import takes seconds. Names of its tables stand there alone: `baft list`.
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("single", "continual", "batched")
FORMS = ("auto", "raw", "chat", "both")  # of prompts
ASKED_FORMS = ("auto", "raw", "chat")
REPORT_FORMS = ("raw", "chat", "both")
WHEN = ("after_all", "immediate")
SPLITS = ("blocks", "facts")
EDIT_METHODS = ("auto", "plain", "memory")
AFTER = ("stop", "continue")
KNOWN = ("replace", "refuse")

ASKED_FORM = "form of the prompts: raw text, the chat template, or auto: the form in which the adapter was taught"
MODEL_NAME = "Hub id, local folder, GGUF file, or smollm2"
TORCHRUN = "start them with torchrun --nproc_per_node N -m peft_baft_cli ..."

AdapterRevision = Annotated[
    str | None, text("REV", "branch, tag or commit of an adapter on the Hub")
]
Json = Annotated[bool, flag("--json", "write one JSON object to standard output, nothing else")]
Processes = Annotated[int | None, whole_number(f"fail unless N processes run; {TORCHRUN}")]


class Command(Protocol):
    """What the command line becomes: the options of one command, and its work."""

    def run(self) -> int:
        """Do what the command is for; return its exit code."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model, and how it is loaded."""

    model: Annotated[
        str | None,
        text("NAME", f"{MODEL_NAME}; by default the one that the adapter was made for", MODEL),
    ] = None
    revision: Annotated[
        str | None, text("REV", "branch, tag or commit of a model on the Hub", MODEL)
    ] = None
    dtype: Annotated[str, choice(DTYPES, "type of the model's weights", MODEL)] = "auto"
    device: Annotated[
        str | None,
        text(
            "DEVICE",
            "such as cpu or cuda:1, or auto for all; by default cuda where there is one",
            MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How an edit is trained; None leaves a setting to the preset."""

    preset: Annotated[
        str, text("NAME", "settings of a plain adapter, that `baft list` shows", TRAINING)
    ] = "default"
    r: Annotated[int | None, whole_number("rank of a new adapter", panel=TRAINING)] = None
    lr: Annotated[float | None, number_above_zero("LR", "learning rate", TRAINING)] = None
    max_steps: Annotated[
        int | None, whole_number("at most so many steps an edit", panel=TRAINING)
    ] = None
    unrelated: Annotated[
        str | None,
        text("FILE", "text to leave alone while training: a file, `general` or `none`", TRAINING),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EditCommand(TrainingOptions, ModelOptions):
    """Teach the facts of a file to a model and save the adapter."""

    edits: Annotated[
        Path,
        text(
            "FILE",
            "facts: .jsonl, .json or .csv with prompt, target and optionally rephrase, unrelated",
        ),
    ]
    output: Annotated[Path, text("FOLDER", "folder for the adapter")]
    model: Annotated[str, text("NAME", MODEL_NAME, MODEL)] = field()  # required, unlike elsewhere
    adapter: Annotated[str | None, text("ADAPTER", "an adapter to continue: folder or Hub id")] = (
        None
    )
    adapter_revision: AdapterRevision = None
    method: Annotated[
        str,
        choice(
            EDIT_METHODS,
            "memory: each fact is found by its question and its answer is said as taught, and each can be taken out; plain: one "
            "trained adapter for all facts, as in the paper; auto: that of the continued adapter, else memory, unless an option "
            "asks for a plain adapter",
        ),
    ] = "auto"
    known: Annotated[
        str,
        choice(
            KNOWN,
            "what becomes of a fact whose question a continued memory holds already: it replaces the earlier edit, or the whole "
            "file is refused, as it is for a question that the memory answers in other words",
        ),
    ] = "replace"
    statistics: Annotated[
        Path | None,
        text(
            "FOLDER",
            "a memory on the same model, from which a new one takes what was measured of the model (by default it measures)",
        ),
    ] = None
    after: Annotated[
        str | None,
        choice(
            AFTER,
            "what follows an answer of a memory: the end of the reply (stop, the default), or what the model says next",
        ),
    ] = None
    batch_size: Annotated[
        int | None, whole_number("facts that a plain adapter learns at once; by default all")
    ] = None
    one_by_one: Annotated[
        bool, flag("--one-by-one", "let a plain adapter learn the facts one after another")
    ] = False
    template: Annotated[
        str,
        choice(
            FORMS,
            "form in which facts are taught: raw text, the chat template, both, or auto: that of the continued adapter, else "
            "the chat template where there is one",
        ),
    ] = "auto"
    seed: Annotated[
        int, whole_number("of a new adapter's first weights", least=0, most=LARGEST_SEED)
    ] = 0
    overwrite: Annotated[bool, flag("--overwrite", "replace an adapter in the output folder")] = (
        False
    )
    strict: Annotated[
        bool, flag("--strict", "exit with 3 unless every fact is known at the end")
    ] = False
    json: Json = False
    processes: Processes = None
    resume: Annotated[
        bool, flag("--resume", "go on with the output folder's interrupted run", JOURNAL)
    ] = False
    snapshot_every: Annotated[
        int | None,
        whole_number(
            "keep the adapter after every K edits; by default after each, of more than 100 facts a hundred times",
            metavar="K",
            panel=JOURNAL,
        ),
    ] = None
    min_agreement: Annotated[
        float | None,
        share("A", "an edit does harm if canaries agree less than this, 0 to 1", JOURNAL),
    ] = None
    canaries: Annotated[
        Path | None,
        text("FILE", "questions whose answers should stay; by default the package's own", JOURNAL),
    ] = None
    keep_only_good: Annotated[
        bool,
        flag("--keep-only-good", "take edits back that were not learned or did harm", JOURNAL),
    ] = False

    def run(self) -> int:
        from peft_baft_cli.work.edit import edit

        return edit(self)


@dataclass(frozen=True, kw_only=True)
class AskCommand(ModelOptions):
    """Answer prompts without and with the edits, side by side."""

    prompts: Annotated[list[str], Argument(metavar="PROMPT")]
    adapter: Annotated[str, text("ADAPTER", "the adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    max_new_tokens: Annotated[int, whole_number("length of an answer")] = 16
    template: Annotated[str, choice(ASKED_FORMS, ASKED_FORM)] = "auto"
    show_sent: Annotated[
        bool, flag("--show-sent", "print the text that the model gets, template included")
    ] = False
    explain: Annotated[
        bool, flag("--explain", "of a memory, say which edit answered, and how near others came")
    ] = False
    json: Json = False

    def run(self) -> int:
        from peft_baft_cli.work.ask import ask

        return ask(self)


@dataclass(frozen=True, kw_only=True)
class ChatCommand(ModelOptions):
    """Talk to an edited chat model; /unedited answers the last question without the edits, /again forgets, /quit ends."""

    adapter: Annotated[str, text("ADAPTER", "the adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    system: Annotated[str | None, text("TEXT", "the system prompt of the conversation")] = None
    max_new_tokens: Annotated[int, whole_number("length of an answer")] = 64

    def run(self) -> int:
        from peft_baft_cli.work.chat import chat

        return chat(self)


@dataclass(frozen=True, kw_only=True)
class LogCommand:
    """List the edits of an adapter."""

    adapter: Annotated[str, Argument(metavar="ADAPTER", help="the adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    json: Json = False

    def run(self) -> int:
        from peft_baft_cli.work.journal import log

        return log(self)


@dataclass(frozen=True, kw_only=True)
class RollbackCommand:
    """Bring an adapter back to what it was after one of its edits; 0 is before the first."""

    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="folder of the adapter")]
    to: Annotated[int, whole_number("number of the last edit to keep", least=0)]

    def run(self) -> int:
        from peft_baft_cli.work.journal import rollback

        return rollback(self)


@dataclass(frozen=True, kw_only=True)
class ForgetCommand:
    """Take edits out of a memory; the answers of the others stay bit for bit."""

    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="folder of the memory")]
    edit: Annotated[str, text("N", "number of the edit, as `baft log` has it; several with commas")]

    def run(self) -> int:
        from peft_baft_cli.work.memory import forget

        return forget(self)


@dataclass(frozen=True, kw_only=True)
class MergeCommand:
    """Put the edits of two memories of one model into one."""

    first: Annotated[Path, Argument(metavar="FIRST", help="folder of a memory")]
    second: Annotated[
        Path, Argument(metavar="SECOND", help="folder of another; its edits replace those of FIRST")
    ]
    output: Annotated[Path, text("FOLDER", "folder for the merged memory")]

    def run(self) -> int:
        from peft_baft_cli.work.memory import merge

        return merge(self)


@dataclass(frozen=True, kw_only=True)
class BenchCommand(TrainingOptions, ModelOptions):
    """Measure editing methods, or an adapter, on a benchmark or on your own facts."""

    benchmark: Annotated[
        str, Argument(metavar="BENCHMARK", help="what is asked; `baft list` shows the names")
    ]
    data: Annotated[
        str | None,
        text("FILE", "the benchmark's file, or a file name of the Hub data set zjunlp/KnowEdit"),
    ] = None
    method: Annotated[
        str, text("NAMES", "names of `baft list`, with commas; settings as in baft:lr=0.001;r=4")
    ] = "baft"
    adapter: Annotated[
        str | None,
        text(
            "ADAPTER",
            "judge this adapter, of any PEFT type (folder or Hub id), instead of editing",
        ),
    ] = None
    adapter_revision: AdapterRevision = None
    schedule: Annotated[str, choice(SCHEDULES, "how edits follow each other")] = "single"
    edits: Annotated[
        str | None, text("T", "edits (or batches) of one adapter; several with commas")
    ] = None
    batch_size: Annotated[int, whole_number("facts of a batch, with --schedule batched")] = 1
    when: Annotated[str, choice(WHEN, "ask after all T edits, or right after each")] = "after_all"
    preset: Annotated[
        str,
        text("NAME", "settings that `baft list` shows; plain is the paper's protocol", TRAINING),
    ] = "plain"
    rows: Annotated[
        str | None, text("A:B", "rows of the data from 0, B excluded; by default all")
    ] = None
    seeds: Annotated[int, whole_number("repeat with so many seeds")] = 1
    template: Annotated[
        str,
        choice(
            ASKED_FORMS,
            "form in which facts are taught and everything is asked: raw text, the chat template, or auto: that in which the "
            "facts of --adapter were taught, else raw text",
        ),
    ] = "auto"
    also: Annotated[str, text("NAMES", "further metrics of `baft list`, with commas")] = ""
    piqa: Annotated[
        Path | None, text("FILE", "ask items of PIQA after the last edit of each block (Table 8)")
    ] = None
    piqa_items: Annotated[int, whole_number("the first so many items of --piqa")] = 150
    split: Annotated[
        str, choice(SPLITS, "what processes share: blocks, or the facts of each batch")
    ] = "blocks"
    processes: Processes = None
    output: Annotated[
        Path | None,
        text(
            "FILE",
            "result lines are added here; runs that are there are not repeated. By default runs/BENCHMARK.jsonl",
        ),
    ] = None

    def run(self) -> int:
        from peft_baft_cli.work.bench import bench

        return bench(self)


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """Show the benchmarks, methods, metrics and presets that other commands take by name."""

    def run(self) -> int:
        from peft_baft_cli.work.names import print_names

        return print_names()


@dataclass(frozen=True, kw_only=True)
class PlotCommand:
    """Turn result lines into tables (markdown, csv) and figures."""

    results: Annotated[
        list[Path], Argument(metavar="RESULTS", help="files of result lines, from `baft bench`")
    ]
    output: Annotated[Path, text("FOLDER", "folder for tables and figures")] = Path("figures")
    no_figures: Annotated[bool, flag("--no-figures", "tables alone, which need no matplotlib")] = (
        False
    )

    def run(self) -> int:
        from peft_baft_cli.work.plot import plot

        return plot(self)


@dataclass(frozen=True, kw_only=True)
class InspectCommand(ModelOptions):
    """Draw what an adapter does to a prompt: gates and updates by token and block, and the changed next tokens."""

    prompt: Annotated[str, Argument(metavar="PROMPT")]
    adapter: Annotated[str, text("ADAPTER", "a BaFT adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    max_new_tokens: Annotated[int, whole_number("length of the answer")] = 12
    template: Annotated[str, choice(ASKED_FORMS, ASKED_FORM)] = "auto"
    output: Annotated[
        Path | None,
        text("FILE", "the HTML page; the PNG goes beside it. By default inspect/PROMPT.html"),
    ] = None

    def run(self) -> int:
        from peft_baft_cli.work.inspect import inspect

        return inspect(self)


@dataclass(frozen=True, kw_only=True)
class ReportCommand(ModelOptions):
    """Make a page of an adapter's facts, before and after, and of what moved beside them."""

    adapter: Annotated[
        str, Argument(metavar="ADAPTER", help="the adapter with its journal: folder or Hub id")
    ]
    adapter_revision: AdapterRevision = None
    edits: Annotated[
        Path | None,
        text("FILE", "edit file of the facts: their subjects, rephrasings and unrelated questions"),
    ] = None
    template: Annotated[
        str | None,
        choice(
            REPORT_FORMS,
            "form in which everything is asked; by default both where there is a chat template",
        ),
    ] = None
    limit: Annotated[
        int,
        whole_number("ask about so many facts at most, evenly chosen; the page counts the others"),
    ] = 50
    neighbours: Annotated[
        int, whole_number("other subjects in each fact's place; 0 asks none", least=0)
    ] = 4
    output: Annotated[
        Path | None,
        text(
            "FILE",
            "the HTML page; by default report.html in the adapter's folder, or here for one of the Hub",
        ),
    ] = None
    json: Json = False

    def run(self) -> int:
        from peft_baft_cli.work.report import report

        return report(self)


@dataclass(frozen=True, kw_only=True)
class PushCommand:
    """Upload an adapter with its journal and a card to the Hugging Face Hub, all at once or not at all."""

    folder: Annotated[Path, Argument(metavar="DIR", help="folder of the adapter")]
    repository: Annotated[
        str, Argument(metavar="USER/REPO", help="its name on the Hub; made where there is none")
    ]
    private: Annotated[bool, flag("--private", "make a new repository a private one")] = False
    no_facts: Annotated[
        bool, flag("--no-facts", "leave out what tells the facts: journal, reports, pictures")
    ] = False
    revision: Annotated[
        str | None, text("BRANCH", "branch to upload to, made where there is none; by default main")
    ] = None
    base_model: Annotated[
        str | None,
        text(
            "USER/REPO",
            "the model on the Hub that the adapter is for; needed where it was made for a local file",
        ),
    ] = None
    base_revision: Annotated[
        str | None, text("REV", "branch, tag or commit of that model; by default as edited")
    ] = None
    results: Annotated[
        Path | None,
        text("FILE", "result lines of `baft bench --adapter DIR`, whose scores the card shows"),
    ] = None

    def run(self) -> int:
        from peft_baft_cli.work.push import push

        return push(self)


@dataclass(frozen=True, kw_only=True)
class CheckCommand(ModelOptions):
    """Prove on a model that edits are trained, kept and applied at the right tokens; takes about a minute."""

    adapter: Annotated[
        str | None,
        text(
            "ADAPTER",
            "a BaFT adapter to check with: folder or Hub id; by default a random one",
        ),
    ] = None
    adapter_revision: AdapterRevision = None
    json: Json = False

    def run(self) -> int:
        from peft_baft_cli.work.check import check

        return check(self)


COMMANDS: dict[str, type[Command]] = {
    "edit": EditCommand,
    "ask": AskCommand,
    "chat": ChatCommand,
    "log": LogCommand,
    "rollback": RollbackCommand,
    "forget": ForgetCommand,
    "merge": MergeCommand,
    "bench": BenchCommand,
    "list": ListCommand,
    "plot": PlotCommand,
    "inspect": InspectCommand,
    "report": ReportCommand,
    "push": PushCommand,
    "check": CheckCommand,
}
