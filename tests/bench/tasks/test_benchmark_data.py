"""Reading the benchmarks' files, and finding them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_baft.data import Case, Edit, Probe, read_cases
from peft_baft_bench.tasks.formats import (
    CONVSENT_QUESTIONS,
    ConvSentCase,
    PiqaItem,
    read_piqa,
)
from peft_baft_bench.tasks.tasks import TASKS, find_benchmark_file, read_benchmark

ZSRE = {
    "src": "Which family is Lepid?",
    "alt": " Lami",
    "rephrase": "Lepid's family?",
    "loc": "who",
    "loc_ans": "I",
}
WIKI = {
    "subject": "Arvia",
    "prompt": " The capital of Arvia is ",
    "target_new": "Kasgrad",
    "ground_truth": "Lumen",
    "portability": {
        "Reasoning": [
            {
                "prompt": "The mayor of Arvia's capital is",
                "ground_truth": [["Ono", "O. Ono"], ["Ulm"]],
            }
        ],
        "Subject_Aliasing": [
            {"prompt": "The capital of Arv is", "ground_truth": ["Kasgrad", "Kas"]}
        ],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The river of Arvia is", "ground_truth": "Dora"},
            {"prompt": "Arvia was founded in", "ground_truth": [[1204]]},
        ],
        "Forgetfulness": [],
    },
}
WIKIBIO: dict[str, Any] = {
    "text": "This is about ann lee. Ann Lee was a painter.",
    "labels": "She was born in Arvia.",
    "concept": "ann lee",
    "locality": {
        "Relation_Specificity": [{"prompt": "ann lee field of work", "ground_truth": ["art"]}]
    },
}
REWRITE: dict[str, Any] = {
    "prompt": "The mother tongue of {} is",
    "subject": "Ann Lee",
    "target_new": {"str": "Arvian", "id": "Q1"},
    "target_true": {"str": "Dutch", "id": "Q2"},
}
ROME = {
    "case_id": 7,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Some words. Ann Lee speaks", "Ann Lee was raised in"],
    "neighborhood_prompts": ["Bo Berg speaks", "The mother tongue of Cy Dahl is"],
    "generation_prompts": ["Ann Lee lives in"],
}
FLAT: dict[str, Any] = {
    "prompt": "The mother tongue of Ann Lee is",
    "target_new": "Arvian",
    "subject": "Ann Lee",
    "rephrase_prompt": "Ann Lee speaks",
    "locality_prompt": "Bo Berg speaks",
    "locality_ground_truth": "Dutch",
}
CONVSENT = {"ent": "Arvia", "pos": [" A fine place. ", "I like it."], "neg": ["Too cold.", "No."]}
PIQA = {"goal": "To open a jar,", "sol1": "turn the lid.", "sol2": "eat the lid."}
GOOD: dict[str, dict[str, Any]] = {
    "zsre": ZSRE,
    **dict.fromkeys(["wiki_recent", "wiki_counterfact", "knowedit_zsre"], WIKI),
    "wikibio": WIKIBIO,
    "convsent": CONVSENT,
    "counterfact": ROME,
    "facts": {"prompt": "The capital of Arvia is", "target": "Kasgrad"},
}
EDITED = [name for name, task in TASKS.items() if task.ask is None]


def written(folder: Path, records: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def read_one(folder: Path, benchmark: str, record: Any) -> Case:
    (case,) = read_benchmark(benchmark, written(folder, [record]))
    return case


# one record a format


def test_zsre_gives_a_probe_of_each_kind(tmp_path: Path) -> None:
    record = {
        **ZSRE,
        "portability": {
            "Recalled Relation": "",
            "New Question": "Which order?",
            "New Answer": "Be",
        },
    }
    case = read_one(tmp_path, "zsre", record)
    assert case.edit == Edit("Which family is Lepid?", "Lami")
    assert case.probes == (
        Probe("generality", "Lepid's family?", "Lami"),
        Probe("locality", "who", "I"),
        Probe("portability", "Which order?", "Be"),
    )
    assert not read_one(tmp_path, "zsre", ZSRE).of_kind("portability")


@pytest.mark.parametrize("benchmark", ["wiki_recent", "wiki_counterfact", "knowedit_zsre"])
def test_knowedit_asks_the_first_alias_of_the_first_answer_under_the_files_topics(
    tmp_path, benchmark: str
) -> None:
    case = read_one(tmp_path, benchmark, WIKI)
    assert case == Case(
        Edit("The capital of Arvia is", "Kasgrad"),
        (
            Probe("portability", "The mayor of Arvia's capital is", "Ono", "Reasoning"),
            Probe("portability", "The capital of Arv is", "Kasgrad", "Subject_Aliasing"),
            Probe("locality", "The river of Arvia is", "Dora", "Relation_Specificity"),
            Probe("locality", "Arvia was founded in", "1204", "Relation_Specificity"),
        ),
        old_answer="Lumen",
    )


@pytest.mark.parametrize(
    "answer", ["", " ", None, [], [[]], [["", "Ono"]], ["", "Ono"], [[" ", "Ono"], ["Ulm"]]]
)
def test_knowedit_passes_over_questions_whose_first_answer_is_empty(
    tmp_path: Path, answer: Any
) -> None:
    items = [{"prompt": "a", "ground_truth": answer}, {"prompt": "b", "ground_truth": "c"}]
    case = read_one(
        tmp_path, "wiki_recent", {**WIKI, "portability": {"Reasoning": items}, "locality": None}
    )
    assert case.probes == (Probe("portability", "b", "c", "Reasoning"),)


@pytest.mark.parametrize("name", ["rephrase", "rephrase_prompt"])
def test_knowedits_rephrasing_is_a_generality_probe(tmp_path: Path, name: str) -> None:
    wanted = Probe("generality", "Arvia's capital is", "Kasgrad")
    assert read_one(tmp_path, "knowedit_zsre", {**WIKI, name: wanted.prompt}).of_kind(
        "generality"
    ) == (wanted,)
    assert not read_one(tmp_path, "knowedit_zsre", {**WIKI, name: ""}).of_kind("generality")


def test_wikibio_continues_a_text(tmp_path: Path) -> None:
    probe = Probe("locality", "ann lee field of work", "art", "Relation_Specificity")
    assert read_one(tmp_path, "wikibio", WIKIBIO) == Case(
        Edit(WIKIBIO["text"], WIKIBIO["labels"]), (probe,)
    )


def test_counterfact_as_rome_wrote_it_asks_neighbours_for_the_old_target(tmp_path: Path) -> None:
    case = read_one(tmp_path, "counterfact", ROME)
    assert case == Case(
        Edit("The mother tongue of Ann Lee is", "Arvian"),
        (
            Probe("generality", "Some words. Ann Lee speaks", "Arvian"),
            Probe("generality", "Ann Lee was raised in", "Arvian"),
            Probe("locality", "Bo Berg speaks", "Dutch"),
            Probe("locality", "The mother tongue of Cy Dahl is", "Dutch"),
        ),
        old_answer="Dutch",
    )


def test_counterfact_is_read_flat_too(tmp_path: Path) -> None:
    probes = (
        Probe("generality", "Ann Lee speaks", "Arvian"),
        Probe("locality", "Bo Berg speaks", "Dutch"),
    )
    assert read_one(tmp_path, "counterfact", FLAT) == Case(
        Edit("The mother tongue of Ann Lee is", "Arvian"), probes
    )
    bare = {name: FLAT[name] for name in ("prompt", "target_new")}
    assert read_one(tmp_path, "counterfact", bare) == Case(
        Edit("The mother tongue of Ann Lee is", "Arvian")
    )


@pytest.mark.parametrize(
    ("benchmark", "record", "old"),
    [
        ("zsre", {**ZSRE, "answers": [" Carabidae ", "Be"], "pred": "Ce"}, "Carabidae"),
        ("zsre", {**ZSRE, "pred": "Ce"}, None),  # what another model said is not what is replaced
        ("zsre", {**ZSRE, "answers": []}, None),
        ("knowedit_zsre", {**WIKI, "ground_truth": [["Lumen", "Lum"]]}, "Lumen"),
        ("wiki_recent", {k: v for k, v in WIKI.items() if k != "ground_truth"}, None),
        ("wiki_counterfact", {**WIKI, "ground_truth": 1204}, "1204"),
        ("counterfact", {**FLAT, "ground_truth": "Dutch"}, "Dutch"),
        ("counterfact", {**ROME, "neighborhood_prompts": []}, "Dutch"),
        ("counterfact", FLAT, None),
        ("wikibio", WIKIBIO, None),
    ],
)
def test_the_old_answer_is_the_first_alias_of_the_one_that_the_record_names(
    tmp_path: Path, benchmark: str, record: Any, old: str | None
) -> None:
    assert read_one(tmp_path, benchmark, record).old_answer == old


def test_every_format_names_the_subject_as_it_stands_in_the_prompt(tmp_path: Path) -> None:
    records = {"zsre": {**ZSRE, "subject": "Lepid"}, "counterfact": FLAT}
    subjects = {
        name: read_one(tmp_path, name, record).edit.subject
        for name, record in (GOOD | records).items()
        if name != "facts"
    }
    assert subjects == {
        "zsre": "Lepid",
        **dict.fromkeys(["wiki_recent", "wiki_counterfact", "knowedit_zsre"], "Arvia"),
        "wikibio": "ann lee",
        "convsent": "Arvia",
        "counterfact": "Ann Lee",
    }


def test_convsent_teaches_the_sides_in_turn_and_asks_all_questions(tmp_path: Path) -> None:
    cases = read_benchmark("convsent", written(tmp_path, [CONVSENT] * 26))
    assert (
        cases[0]
        == ConvSentCase(
            edit=Edit(
                "From the sentiment dataset, answer What do you think of Arvia? postively.",  # the data set's spelling
                "A fine place.",
            ),
            question="What do you think of Arvia?",
            wanted="positive",
            positive=("A fine place.", "I like it."),
            negative=("Too cold.", "No."),
        )
    )
    wanted = Edit(
        "From the sentiment dataset, answer What do you feel about Arvia? negatively.", "Too cold."
    )
    assert cases[1].edit == wanted
    found = [(case.question, case.wanted) for case in cases if isinstance(case, ConvSentCase)]
    assert set(found) == {
        (q.format("Arvia"), side) for q in CONVSENT_QUESTIONS for side in ("positive", "negative")
    }
    assert len(CONVSENT_QUESTIONS) == 13


def test_facts_are_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("prompt,target\na,b\nc,d\n")
    assert (
        read_benchmark("facts", path)
        == read_cases(path)
        == [Case(Edit("a", "b")), Case(Edit("c", "d"))]
    )


# whole files


@pytest.mark.parametrize("benchmark", EDITED)
def test_a_case_has_the_number_of_its_row(tmp_path: Path, benchmark: str) -> None:
    """Rows without probes stay, and so do repeated ones, but for a user's own facts."""
    field = {"zsre": "src", "wikibio": "text", "convsent": "ent"}.get(benchmark, "prompt")
    records: list[dict[str, Any]] = [
        {**GOOD[benchmark], field: f"row {i}", "locality": {}, "portability": None}
        for i in range(3)
    ]
    if benchmark == "counterfact":
        records = [{**FLAT, "prompt": f"row {i}"} for i in range(3)]
    if benchmark == "facts":
        records = [{**GOOD[benchmark], field: f"row {i}"} for i in range(3)]
    cases = read_benchmark(benchmark, written(tmp_path, records))
    assert [f"row {i}" in case.edit.prompt for i, case in enumerate(cases)] == [True] * 3


@pytest.mark.parametrize(
    "benchmark", ["wiki_recent", "wiki_counterfact", "knowedit_zsre", "counterfact", "zsre"]
)
def test_an_edit_may_stand_in_a_benchmark_twice(tmp_path: Path, benchmark: str) -> None:
    first, second = read_benchmark(benchmark, written(tmp_path, [GOOD[benchmark]] * 2))
    assert first == second
    with pytest.raises(ValueError, match="already"):
        read_benchmark("facts", written(tmp_path, [GOOD["facts"]] * 2))


def test_every_benchmark_of_the_judge_has_a_reader() -> None:
    assert set(TASKS) == {*GOOD, "piqa"} and set(EDITED) == set(GOOD)
    with pytest.raises(ValueError, match="no benchmark 'zrse'; known are zsre, "):
        read_benchmark("zrse", "data.json")


# damage

BY_SUBJECT = "must contain {} in place of the subject, not 'The tongue is'"
DAMAGED = {
    "no object": ("zsre", ["a"], "a record must be an object"),
    "zsre": ("zsre", {"src": "a"}, "'alt' is missing"),
    "zsre, half a question": (
        "zsre",
        {**ZSRE, "portability": {"New Question": "a"}},
        "'New Answer' is missing",
    ),
    "another benchmark's": ("wiki_recent", ZSRE, "'prompt' is missing"),
    "prompt": ("wiki_recent", {**WIKI, "prompt": 3}, "'prompt' must be a text, not 3"),
    "target": ("wiki_recent", {**WIKI, "target_new": ""}, "target is empty"),
    "no target": ("wiki_recent", {**WIKI, "target_new": []}, "target is empty"),
    "an object as target": (
        "wikibio",
        {**WIKIBIO, "labels": {"a": 1}},
        "'labels' must be a text or .* not {.a.: 1}",
    ),
    "topics": ("wiki_counterfact", {**WIKI, "locality": "a"}, "locality must be an object"),
    "question": (
        "wiki_recent",
        {**WIKI, "locality": {"Near": ["a"]}},
        "locality: Near: a question must be an object",
    ),
    "no answer": (
        "wiki_recent",
        {**WIKI, "portability": {"Far": {"prompt": "a"}}},
        "Far: .*'ground_truth' is missing",
    ),
    "answer": (
        "wiki_recent",
        {**WIKI, "locality": {"Near": {"prompt": "a", "ground_truth": [True]}}},
        "not true",
    ),
    "no prompt": (
        "wiki_recent",
        {**WIKI, "locality": {"Near": {"ground_truth": "a"}}},
        "Near: .*'prompt' is missing",
    ),
    "rephrasing": (
        "knowedit_zsre",
        {**WIKI, "rephrase": ["a", 1]},
        "'rephrase' must be a text, not 1",
    ),
    "rewrite": ("counterfact", {"requested_rewrite": 1}, "requested_rewrite must be an object"),
    "no subject": (
        "counterfact",
        {"requested_rewrite": {**REWRITE, "prompt": "The tongue is"}},
        BY_SUBJECT,
    ),
    "bare target": (
        "counterfact",
        {"requested_rewrite": {**REWRITE, "target_new": "a"}},
        "target_new must be an object",
    ),
    "neighbour": (
        "counterfact",
        {**FLAT, "locality_ground_truth": None},
        "'locality_ground_truth' must be a text",
    ),
    "one side": ("convsent", {**CONVSENT, "neg": []}, "'neg' must contain at least one answer"),
    "the other side": (
        "convsent",
        {"ent": "Arvia", "neg": ["a"]},
        "'pos' must contain at least one answer",
    ),
    "no topic": ("convsent", {"pos": ["a"], "neg": ["b"]}, "'ent' is missing"),
    "facts": ("facts", {"prompt": "a"}, "'target' is missing"),
}


@pytest.mark.parametrize(("benchmark", "record", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_named(
    tmp_path: Path, benchmark: str, record: Any, message: str
) -> None:
    assert len(read_benchmark(benchmark, written(tmp_path, [GOOD[benchmark]]))) == 1
    path = written(tmp_path, [GOOD[benchmark], record])
    with pytest.raises(ValueError, match=message) as raised:
        read_benchmark(benchmark, path)
    assert str(raised.value).startswith(f"{path}: record 2: ")


def test_only_facts_may_be_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,target\na,b\n")
    with pytest.raises(ValueError, match=r"\.jsonl or \.json, not \.csv"):
        read_benchmark("wiki_recent", tmp_path / "a.csv")


FIELDS = st.sampled_from(
    sorted({name for record in (*GOOD.values(), FLAT, REWRITE) for name in record})
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.just("\ud83d"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2) | FIELDS, inner, max_size=3)
    ),
    max_leaves=5,
)


def spoilt(record: Any, draw: Callable[[Any], Any]) -> Any:
    """`record` with a value somewhere in it replaced."""
    if not isinstance(record, dict | list) or not record or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    place = draw(
        st.sampled_from(sorted(record) if isinstance(record, dict) else range(len(record)))
    )
    copy: Any = record.copy()
    copy[place] = spoilt(record[place], draw)
    return copy


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_record_is_read_or_complained_about_by_name(data: st.DataObject) -> None:
    benchmark = data.draw(st.sampled_from(list(TASKS)))
    good = {**GOOD, "piqa": PIQA}[benchmark]
    record = (
        data.draw(JSON | st.dictionaries(FIELDS, JSON))
        if data.draw(st.booleans())
        else spoilt(good, data.draw)
    )
    with TemporaryDirectory() as folder:
        path = written(Path(folder), [good, record])
        Path(folder, "data-labels.lst").write_text("0\n1\n")
        try:
            found = read_benchmark(benchmark, path)
            assert len(found) == 2
        except (ValueError, TypeError) as error:
            assert str(error).startswith(f"{path}: record 2: ")


# PIQA


def piqa(folder: Path, labels: str | None, count: int = 2) -> Path:
    path = folder / "valid.jsonl"
    path.write_text("".join(f"{json.dumps({**PIQA, 'goal': f'goal {i}'})}\n" for i in range(count)))
    if labels is not None:
        (folder / "valid-labels.lst").write_text(labels)
    return path


@pytest.mark.parametrize("labels", ["0\n1\n", "0\n1", "0\r\n1\r\n", " 0\n1 \n\n"])
def test_piqa_items_get_the_labels_beside_them(tmp_path: Path, labels: str) -> None:
    first = PiqaItem("goal 0", "turn the lid.", "eat the lid.", 0)
    assert read_piqa(piqa(tmp_path, labels)) == [first, replace(first, goal="goal 1", label=1)]


def test_missing_labels_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"valid-labels\.lst; it must contain the labels of .*valid\.jsonl"
    ):
        read_piqa(piqa(tmp_path, None))
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_piqa(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0\n", ": 1 labels, but .* has 2 records"),
        ("0\n1\n0\n", ": 3 labels, but .* has 2 records"),
        ("0\n2\n", ":2: expected the label 0 or 1, not '2'"),
        ("0\n\n1\n", ":2: expected the label 0 or 1, not ''"),
        ("", ":1: expected the label 0 or 1, not ''"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"valid-labels\.lst{message}"):
        read_piqa(piqa(tmp_path, labels))


def test_a_damaged_piqa_item_is_named(tmp_path: Path) -> None:
    path = piqa(tmp_path, "0\n1\n1\n")
    path.write_text(path.read_text() + json.dumps({"goal": "a", "sol1": "b"}))
    with pytest.raises(ValueError, match=r"valid\.jsonl:3: the field 'sol2' is missing"):
        read_piqa(path)


# where a file comes from


class Hub:
    """A stand-in for the Hub's download, which keeps what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []  # type: ignore[var-annotated]

    def __call__(self, repo_id: str, filename: str, repo_type: str) -> str:
        self.asked.append((repo_id, filename, repo_type))
        return str(self.folder / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
    return found


def test_a_file_that_exists_is_taken_as_it_is(tmp_path: Path, hub: Hub) -> None:
    path = written(tmp_path, [WIKI], "recent_test.json")
    assert (
        find_benchmark_file("wiki_recent", path)
        == find_benchmark_file("wiki_recent", str(path))
        == find_benchmark_file("piqa", path)
        == path
    )
    assert not hub.asked


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (None, "benchmark/wiki_recent/recent_test.json"),
        ("recent_train.json", "benchmark/wiki_recent/recent_train.json"),
        ("benchmark/ZsRE/ZsRE-test-all.json", "benchmark/ZsRE/ZsRE-test-all.json"),
    ],
)
def test_other_names_are_files_of_knowedit_on_the_hub(
    hub: Hub, data: str | None, wanted: str
) -> None:
    assert find_benchmark_file("wiki_recent", data) == hub.folder / wanted
    assert hub.asked == [("zjunlp/KnowEdit", wanted, "dataset")]


def test_each_of_knowedits_benchmarks_has_a_file_of_its_own(hub: Hub) -> None:
    names = [name for name, task in TASKS.items() if task.hub_file]
    assert len({find_benchmark_file(name) for name in names}) == len(names) == 5


@pytest.mark.parametrize("name", ["zsre", "counterfact", "facts", "piqa"])
def test_without_a_file_the_other_benchmarks_ask_for_one(hub: Hub, name: str) -> None:
    with pytest.raises(ValueError, match=f"--data which file {name} "):
        find_benchmark_file(name)
    with pytest.raises(FileNotFoundError, match=r"no file absent\.json, and no such name"):
        find_benchmark_file(name, "absent.json")
    assert not hub.asked


@pytest.mark.parametrize(
    "path", ["data/recent_test.json", r"data\recent_test.json", "/tmp/absent/recent_test.json"]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(hub: Hub, path: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such name in the Hub's data set"):
        find_benchmark_file("wiki_recent", path)
    assert not hub.asked


@pytest.mark.parametrize(
    ("data", "start"), [(None, "benchmark/"), ("mine.json", "There is no file mine.json, and ")]
)
def test_without_a_network_the_error_says_what_to_do(
    monkeypatch, data: str | None, start: str
) -> None:
    def unreachable(*_args: Any, **_options: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(FileNotFoundError) as raised:
        find_benchmark_file("wikibio", data)
    message = str(raised.value)
    assert (
        message.startswith(start)
        and "ConnectionError: no route" in message
        and "give the path of a local file" in message
    )
