"""The options of each command, as frozen dataclasses without any code.

Typer reads the options of a command from the signature of a callable. Here that is the class itself, so typer returns an instance
of it. `work` names the function that runs the command, as "module:function" in `peft_baft_cli.work`. It is imported only once the
command line has been parsed, because it imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

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

MODEL, TRAINING, JOURNAL = "The model", "Training", "Journal and checks"  # headings in the help

# Copies of the package's values, since importing it takes seconds; a test compares them. For longer lists there is `baft list`.
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("single", "continual", "batched")
FORMS = ("auto", "raw", "chat", "both")  # of prompts: raw text or a chat template
ASKED_FORMS = ("auto", "raw", "chat")
REPORT_FORMS = ("raw", "chat", "both")
WHEN = ("after_all", "immediate")
SPLITS = ("blocks", "facts")
EDIT_METHODS = ("auto", "plain", "memory")
AFTER = ("stop", "continue")
KNOWN = ("replace", "refuse")

ASKED_FORM = "form of the prompts: raw text, the chat template, or auto: the form used for editing"
MODEL_NAME = "Hub id, local folder, GGUF file, or smollm2"
TORCHRUN = "start them with torchrun --nproc_per_node N -m peft_baft_cli ..."

AdapterRevision = Annotated[
    str | None, text("REV", "branch, tag or commit of an adapter on the Hub")
]
Json = Annotated[bool, flag("--json", "write one JSON object to standard output, nothing else")]
Processes = Annotated[int | None, whole_number(f"fail unless N processes run; {TORCHRUN}")]


class Command(Protocol):
    """The parsed options of one command. work: the function that runs it, as "module:function"."""

    work: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model, and how it is loaded."""

    model: Annotated[
        str | None,
        text("NAME", f"{MODEL_NAME}; by default the model that the adapter was made for", MODEL),
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
    """How edits are trained. With None, the preset decides."""

    preset: Annotated[
        str, text("NAME", "settings of a plain adapter; `baft list` shows the names", TRAINING)
    ] = "default"
    r: Annotated[int | None, whole_number("rank of a new adapter", panel=TRAINING)] = None
    lr: Annotated[float | None, number_above_zero("LR", "learning rate", TRAINING)] = None
    max_steps: Annotated[
        int | None, whole_number("maximum number of steps per edit", panel=TRAINING)
    ] = None
    unrelated: Annotated[
        str | None,
        text(
            "FILE", "texts that training should not affect: a file, `general` or `none`", TRAINING
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EditCommand(TrainingOptions, ModelOptions):
    """Teach a model the facts in a file, and save the adapter."""

    work: ClassVar[str] = "edit:edit"
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
            "memory: stores each fact as question and answer, and can forget single facts; plain: trains one adapter for all "
            "facts, as in the paper; auto: that of the continued adapter, otherwise memory, unless an option requires a "
            "plain adapter",
        ),
    ] = "auto"
    known: Annotated[
        str,
        choice(
            KNOWN,
            "if a continued memory already contains the question of a fact: replace the earlier edit, or refuse the whole file; "
            "refuse also applies to questions that the memory answers in other words",
        ),
    ] = "replace"
    statistics: Annotated[
        Path | None,
        text(
            "FOLDER",
            "a memory on the same model, whose measurements of the model a new one copies instead of repeating them",
        ),
    ] = None
    after: Annotated[
        str | None,
        choice(
            AFTER,
            "what follows an answer of a memory: the end of the reply (stop, the default), or the model's own continuation",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        whole_number("number of facts that a plain adapter learns together; by default all"),
    ] = None
    one_by_one: Annotated[
        bool, flag("--one-by-one", "train a plain adapter on one fact after another")
    ] = False
    template: Annotated[
        str,
        choice(
            FORMS,
            "form of the prompts: raw text, the chat template, both, or auto: that of the continued adapter, otherwise the chat "
            "template if there is one",
        ),
    ] = "auto"
    seed: Annotated[
        int,
        whole_number("seed for the initial weights of a new adapter", least=0, most=LARGEST_SEED),
    ] = 0
    overwrite: Annotated[bool, flag("--overwrite", "replace an adapter in the output folder")] = (
        False
    )
    strict: Annotated[
        bool, flag("--strict", "exit with code 3 unless every fact is known at the end")
    ] = False
    json: Json = False
    processes: Processes = None
    resume: Annotated[
        bool, flag("--resume", "resume the interrupted run in the output folder", JOURNAL)
    ] = False
    snapshot_every: Annotated[
        int | None,
        whole_number(
            "save a snapshot after every K edits; by default after each, and at most 100 in total",
            metavar="K",
            panel=JOURNAL,
        ),
    ] = None
    min_agreement: Annotated[
        float | None,
        share(
            "A",
            "an edit is harmful if a smaller share (0 to 1) of the canaries' tokens stays the same",
            JOURNAL,
        ),
    ] = None
    canaries: Annotated[
        Path | None,
        text(
            "FILE",
            "questions whose answers should not change; by default the package's own",
            JOURNAL,
        ),
    ] = None
    keep_only_good: Annotated[
        bool,
        flag("--keep-only-good", "revert edits that were not learned or are harmful", JOURNAL),
    ] = False


@dataclass(frozen=True, kw_only=True)
class AskCommand(ModelOptions):
    """Answer prompts with and without the edits, side by side."""

    work: ClassVar[str] = "ask:ask"
    prompts: Annotated[list[str], Argument(metavar="PROMPT")]
    adapter: Annotated[str, text("ADAPTER", "the adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    max_new_tokens: Annotated[int, whole_number("maximum length of an answer, in tokens")] = 16
    template: Annotated[str, choice(ASKED_FORMS, ASKED_FORM)] = "auto"
    show_sent: Annotated[
        bool,
        flag("--show-sent", "print the text that the model receives, including the chat template"),
    ] = False
    explain: Annotated[
        bool, flag("--explain", "for a memory, show which edit answered, and the scores")
    ] = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ChatCommand(ModelOptions):
    """Chat with an edited model. /unedited answers the last question without the edits, /again starts over, /quit ends."""

    work: ClassVar[str] = "chat:chat"
    adapter: Annotated[str, text("ADAPTER", "the adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    system: Annotated[str | None, text("TEXT", "the system prompt of the conversation")] = None
    max_new_tokens: Annotated[int, whole_number("maximum length of an answer, in tokens")] = 64


@dataclass(frozen=True, kw_only=True)
class LogCommand:
    """List the edits of an adapter."""

    work: ClassVar[str] = "journal:log"
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="the adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class RollbackCommand:
    """Restore an adapter to its state after one of its edits; 0 is before the first."""

    work: ClassVar[str] = "journal:rollback"
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="folder of the adapter")]
    to: Annotated[int, whole_number("number of the last edit to keep", least=0)]


@dataclass(frozen=True, kw_only=True)
class ForgetCommand:
    """Remove edits from a memory; the answers of the others are unchanged, bit for bit."""

    work: ClassVar[str] = "memory:forget"
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="folder of the memory")]
    edit: Annotated[str, text("N", "number of the edit in `baft log`; several separated by commas")]


@dataclass(frozen=True, kw_only=True)
class MergeCommand:
    """Merge two memories of the same model."""

    work: ClassVar[str] = "memory:merge"
    first: Annotated[Path, Argument(metavar="FIRST", help="folder of a memory")]
    second: Annotated[
        Path,
        Argument(
            metavar="SECOND",
            help="folder of another; its edits replace those of FIRST with the same question",
        ),
    ]
    output: Annotated[Path, text("FOLDER", "folder for the merged memory")]


@dataclass(frozen=True, kw_only=True)
class BenchCommand(TrainingOptions, ModelOptions):
    """Measure editing methods, or an adapter, on a benchmark or on your own facts."""

    work: ClassVar[str] = "bench:bench"
    benchmark: Annotated[
        str, Argument(metavar="BENCHMARK", help="name of the benchmark; `baft list` shows them")
    ]
    data: Annotated[
        str | None,
        text("FILE", "the benchmark's file, or a file name of the Hub data set zjunlp/KnowEdit"),
    ] = None
    method: Annotated[
        str,
        text(
            "NAMES", "names from `baft list`, separated by commas; settings as in baft:lr=0.001;r=4"
        ),
    ] = "baft"
    adapter: Annotated[
        str | None,
        text(
            "ADAPTER",
            "evaluate this adapter, of any PEFT type (folder or Hub id), instead of editing",
        ),
    ] = None
    adapter_revision: AdapterRevision = None
    schedule: Annotated[str, choice(SCHEDULES, "how edits follow each other")] = "single"
    edits: Annotated[
        str | None,
        text("T", "number of edits (or batches) per adapter; several separated by commas"),
    ] = None
    batch_size: Annotated[int, whole_number("facts per batch, with --schedule batched")] = 1
    when: Annotated[str, choice(WHEN, "evaluate after all T edits, or after each")] = "after_all"
    preset: Annotated[
        str,
        text(
            "NAME", "settings; `baft list` shows the names; plain is the paper's protocol", TRAINING
        ),
    ] = "plain"
    rows: Annotated[
        str | None, text("A:B", "rows of the data from 0, B excluded; by default all")
    ] = None
    seeds: Annotated[int, whole_number("number of seeds; everything is repeated with each")] = 1
    template: Annotated[
        str,
        choice(
            ASKED_FORMS,
            "form of all prompts: raw text, the chat template, or auto: the form used for editing --adapter, otherwise raw text",
        ),
    ] = "auto"
    also: Annotated[str, text("NAMES", "further metrics from `baft list`, separated by commas")] = (
        ""
    )
    piqa: Annotated[
        Path | None, text("FILE", "evaluate PIQA items after the last edit of each block (Table 8)")
    ] = None
    piqa_items: Annotated[
        int, whole_number("number of items of --piqa to use, from the first on")
    ] = 150
    split: Annotated[
        str,
        choice(SPLITS, "what is distributed over processes: blocks, or the facts of each batch"),
    ] = "blocks"
    processes: Processes = None
    output: Annotated[
        Path | None,
        text(
            "FILE",
            "result lines are appended to this file; runs in it are not repeated. By default runs/BENCHMARK.jsonl",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """Show the names of benchmarks, methods, metrics and presets."""

    work: ClassVar[str] = "names:print_names"


@dataclass(frozen=True, kw_only=True)
class PlotCommand:
    """Make tables (markdown, csv) and figures from result lines."""

    work: ClassVar[str] = "plot:plot"
    results: Annotated[
        list[Path], Argument(metavar="RESULTS", help="files of result lines, from `baft bench`")
    ]
    output: Annotated[Path, text("FOLDER", "folder for tables and figures")] = Path("figures")
    no_figures: Annotated[
        bool, flag("--no-figures", "only tables, which do not need matplotlib")
    ] = False


@dataclass(frozen=True, kw_only=True)
class InspectCommand(ModelOptions):
    """Show how an adapter processes a prompt: gates and updates by token and block, and changed next tokens."""

    work: ClassVar[str] = "inspect:inspect"
    prompt: Annotated[str, Argument(metavar="PROMPT")]
    adapter: Annotated[str, text("ADAPTER", "a BaFT adapter: folder or Hub id")]
    adapter_revision: AdapterRevision = None
    max_new_tokens: Annotated[int, whole_number("maximum length of the answer, in tokens")] = 12
    template: Annotated[str, choice(ASKED_FORMS, ASKED_FORM)] = "auto"
    output: Annotated[
        Path | None,
        text(
            "FILE", "the HTML page; the PNG is written next to it. By default inspect/PROMPT.html"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReportCommand(ModelOptions):
    """Make a page with an adapter's facts before and after editing, and its side effects."""

    work: ClassVar[str] = "report:report"
    adapter: Annotated[
        str, Argument(metavar="ADAPTER", help="the adapter with its journal: folder or Hub id")
    ]
    adapter_revision: AdapterRevision = None
    edits: Annotated[
        Path | None,
        text(
            "FILE",
            "edit file of the facts, with their subjects, rephrasings and unrelated questions",
        ),
    ] = None
    template: Annotated[
        str | None,
        choice(
            REPORT_FORMS,
            "form of all prompts; by default both if there is a chat template",
        ),
    ] = None
    limit: Annotated[
        int,
        whole_number(
            "maximum number of facts to ask about, evenly chosen; the page counts the others"
        ),
    ] = 50
    neighbours: Annotated[
        int, whole_number("number of other subjects to ask about for each fact", least=0)
    ] = 4
    output: Annotated[
        Path | None,
        text(
            "FILE",
            "the HTML page; by default report.html in the adapter's folder, or here for an adapter on the Hub",
        ),
    ] = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class PushCommand:
    """Upload an adapter with its journal and a model card to the Hugging Face Hub, in one commit."""

    work: ClassVar[str] = "push:push"
    folder: Annotated[Path, Argument(metavar="DIR", help="folder of the adapter")]
    repository: Annotated[
        str, Argument(metavar="USER/REPO", help="its name on the Hub; created if it does not exist")
    ]
    private: Annotated[bool, flag("--private", "make a new repository private")] = False
    no_facts: Annotated[
        bool,
        flag("--no-facts", "leave out files that contain the facts: journal, reports, pictures"),
    ] = False
    revision: Annotated[
        str | None,
        text("BRANCH", "branch to upload to, created if it does not exist; by default main"),
    ] = None
    base_model: Annotated[
        str | None,
        text(
            "USER/REPO",
            "the base model on the Hub; required if the adapter was made for a local file",
        ),
    ] = None
    base_revision: Annotated[
        str | None,
        text("REV", "branch, tag or commit of that model; by default the one that was edited"),
    ] = None
    results: Annotated[
        Path | None,
        text("FILE", "result lines of `baft bench --adapter DIR`; the card shows their scores"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CheckCommand(ModelOptions):
    """Check on a model that edits are trained, saved and applied at the right tokens; takes about a minute."""

    work: ClassVar[str] = "check:check"
    adapter: Annotated[
        str | None,
        text(
            "ADAPTER",
            "a BaFT adapter to check: folder or Hub id; by default a random one",
        ),
    ] = None
    adapter_revision: AdapterRevision = None
    json: Json = False


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
