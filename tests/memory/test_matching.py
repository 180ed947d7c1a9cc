"""Which edit a question asks for: what tells its subject, what tells its relation, and that no other edit matters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_baft.memory.english import ANSWER_KINDS, ANY_ANSWER
from peft_baft.memory.matching import NO_EDIT, Match, QuestionIndex, Thresholds, compare
from peft_baft.memory.question import Question, parse_question, sentences
from peft_baft.memory.relations import LEAST_SCORE, Relations

WORDS = [
    "", " who", " wrote", " the", " book", " of", " what", " is", " mother", " tongue", " capital", "?", " please", " tell",
    " me", " Lucas", " Maria", " Ober", "hof", " 6", "3", "4", "0", " lucas", ".", " born", " where", " Which", " author",
    " when", " not", " J", " scrib", "er", ",",
]  # fmt: skip
# Made common by their place: the last ones of a vocabulary are the rare ones.
TEXTS = [*WORDS, *(f" filler{n}" for n in range(400))]
THRESHOLDS = Thresholds(0.72, 0.48, 2)
NO_RELATIONS = Relations(torch.zeros(0, 64), torch.zeros(0, 3, dtype=torch.int32), [])


def ids_of(text: str) -> list[int]:
    found, rest = [], f" {text}"
    while rest:
        token = max(
            (i for i, one in enumerate(TEXTS) if one and rest.startswith(one)),
            key=lambda i: len(TEXTS[i]),
        )
        found.append(token)
        rest = rest[len(TEXTS[token]) :]
    return found


def key_of(token: int) -> Tensor:
    """A key that is the token's own: the same token is exactly alike, another one hardly at all."""
    vector = torch.randn(64, generator=torch.Generator().manual_seed(token))
    return (torch.nn.functional.normalize(vector, dim=0) * 127).round().to(torch.int8)


def question(text: str) -> Question:
    """A question with a first token that is left out, as that of a real prompt is."""
    ids = [0, *ids_of(text)]
    return Question(torch.tensor(ids, dtype=torch.int32), torch.stack([key_of(i) for i in ids[1:]]))


def match(
    asked: str,
    *stored: str,
    thresholds: Thresholds = THRESHOLDS,
    relations: Relations = NO_RELATIONS,
) -> Match:
    questions = QuestionIndex([question(text) for text in stored], TEXTS, relations)
    return questions.match(question(asked), thresholds)


def relations_of(wordings: dict[str, tuple[str, ...]]) -> Relations:
    """Relations that are told by words, each in several wordings."""
    words = [text for texts in wordings.values() for text in texts]
    keys = torch.cat([question(text).keys.float() / 127 for text in words])
    numbers = [n for n, texts in enumerate(wordings.values()) for _ in texts]
    lengths = [len(ids_of(text)) for text in words]
    kinds = [parse_question(question(text), TEXTS).answer_kind for text in words]
    return Relations(keys, torch.tensor([lengths, numbers, kinds]).mT, list(wordings))


def test_the_question_itself_is_found_among_others_and_scores_one() -> None:
    found = match(
        "who wrote the book of Maria?",
        "who wrote the book of Lucas?",
        "who wrote the book of Maria?",
    )
    assert (found.edit, found.best, found.runner_up) == (1, 1, 0)
    assert found.subject == pytest.approx(1, abs=0.02) and found.relation == pytest.approx(
        1, abs=0.02
    )


def test_another_subject_and_another_relation_are_told_apart() -> None:
    stored = "who wrote the book of Lucas?"
    other_subject = match("who wrote the book of Maria?", stored)
    assert other_subject.edit == NO_EDIT and other_subject.subject < 0.72 < other_subject.relation
    other_relation = match("what is mother tongue Lucas?", stored)
    assert other_relation.edit == NO_EDIT and other_relation.relation < 0.48
    assert other_relation.subject > 0.72


def test_the_same_name_counts_whatever_its_capitals() -> None:
    assert match("who wrote the book of lucas?", "who wrote the book of Lucas?").subject > 0.9


def test_words_of_several_tokens_and_capitals_tell_the_subject() -> None:
    reading = parse_question(question("what is the capital of Oberhof?"), TEXTS)
    subject = {reading.words[n] for n in reading.word_index[reading.is_subject].tolist()}
    assert subject == {"oberhof"} and "capital" in reading.words
    # Without a name, all words that are no function words do.
    plain = parse_question(question("who wrote the book?"), TEXTS)
    found = {plain.words[n] for n in plain.word_index[plain.is_subject].tolist()}
    assert found == {"wrote", "book"}


def test_different_numbers_are_different_subjects() -> None:
    stored = question("where is Ober 634?")
    reading = parse_question(stored, TEXTS)
    assert reading.numbers == {"634"}
    other = parse_question(question("where is Ober 6340?"), TEXTS)
    assert compare(reading, reading).subject > 0.9 and compare(reading, other).subject == 0.0


def test_a_question_that_asks_more_is_another_one() -> None:
    stored = "who wrote the book of Lucas?"
    longer = "who wrote the author book of Lucas born mother tongue capital?"
    assert match(longer, stored).edit == NO_EDIT
    lenient = Thresholds(0.72, 0.48, 9)
    assert match(longer, stored, thresholds=lenient).edit == 0  # the control


RELATIONS = relations_of(
    {
        "capital": ("capital", "the capital of"),
        "tongue": ("mother tongue",),
        "author": ("author", "wrote"),
    }
)


def test_a_question_whose_first_word_asks_for_something_else_is_another_one() -> None:
    stored, asked = "what is the capital of Lucas?", "what is the author of Lucas?"
    lenient = Thresholds(0.72, 0.3, 9)
    found = match(asked, stored, thresholds=lenient, relations=RELATIONS)
    assert found.edit == NO_EDIT and found.best == 0 and found.differs == '"author"'
    assert (found.asks_for, found.best_asks_for) == ("author", "capital")
    assert match(stored, stored, thresholds=lenient, relations=RELATIONS).edit == 0
    # Behind a word of the edit's, the same word may be unlike.
    behind = "what capital is the author of Lucas?"
    assert match(behind, stored, thresholds=lenient, relations=RELATIONS).edit == 0
    strict = Thresholds(0.72, 0.3, 0)
    found = match(behind, stored, thresholds=strict, relations=RELATIONS)
    assert (found.edit, found.differs) == (NO_EDIT, '"author"')


def test_a_first_word_that_the_list_knows_must_be_more_alike(monkeypatch) -> None:
    # The keys of "author" and "capital" are alike by .6: enough for a word that the list has not.
    author, capital = (key_of(ids_of(one)[0]).float() / 127 for one in ("author", "capital"))
    across = torch.nn.functional.normalize(author - (author @ capital) * capital, dim=0)
    near = ((0.6 * capital + 0.8 * across) * 127).round().to(torch.int8)
    own = key_of
    monkeypatch.setitem(globals(), "key_of", lambda t: near if t == ids_of("author")[0] else own(t))
    stored, asked = "what is the capital of Lucas?", "what is the author of Lucas?"
    lenient = Thresholds(0.72, 0.3, 0)
    unknown = relations_of({"capital": ("capital",)})
    known = relations_of({"capital": ("capital",), "author": ("author",)})
    assert match(asked, stored, thresholds=lenient, relations=unknown).edit == 0  # the control
    assert match(asked, stored, thresholds=lenient, relations=known).differs == '"author"'


def test_a_question_that_names_something_else_as_well_is_another_one() -> None:
    stored = "what is the capital of Lucas Oberhof?"
    alike = Thresholds(0.3, 0.3, 9)
    assert (
        match("what capital is Oberhof Lucas?", stored, thresholds=alike).edit == 0
    )  # the control
    found = match("what is the capital of Lucas Oberhof Maria?", stored, thresholds=alike)
    assert (found.edit, found.differs) == (NO_EDIT, '"maria"')


def test_a_rare_word_that_is_no_name_may_tell_what_is_asked_for() -> None:
    stored, asked = "who is the author of Lucas?", "who is the scriber of Lucas?"
    assert len(ids_of("scriber")) == 2  # a word of two tokens is rare
    lenient = Thresholds(0.3, -1.0, 9)
    knowing = relations_of({"author": ("author", "scriber")})
    assert match(asked, stored, thresholds=lenient, relations=knowing).edit == 0
    assert match(asked, stored, thresholds=lenient, relations=RELATIONS).differs == '"scriber"'


def test_a_word_that_has_no_key_counts_as_a_word() -> None:
    """Raw text of a tokenizer that puts nothing before it begins with a word."""

    def bare(text: str) -> Question:
        ids = ids_of(text)
        return Question(torch.tensor(ids).int(), torch.stack([key_of(i) for i in ids[1:]]))

    # A first token that a word goes on from is a part of that word.
    reading = parse_question(bare("Oberhof is the capital"), TEXTS)
    assert reading.words[0] == "oberhof" and reading.is_subject[0] and reading.first_word == "ober"
    stored = bare("Lucas born Maria is where")
    alike = Thresholds(0.3, -1.0, 9)
    for asked, differs in (
        ("where is Lucas born Maria?", None),
        ("where is Oberhof born Maria?", '"oberhof"'),
    ):
        found = QuestionIndex([stored], TEXTS, NO_RELATIONS).match(question(asked), alike)
        assert (found.best, found.differs) == (0, differs)


def test_another_answer_than_the_edits_may_be_asked_for() -> None:
    stored, asked = "who wrote the book of Lucas?", "who wrote not the book of Lucas?"
    assert match(asked, stored).differs == "another answer than the edit's"
    assert match(asked, asked).edit == 0 and match(stored, asked).edit == 0


def test_words_of_known_relations_tell_no_subject_where_others_do() -> None:
    for text, subject in (
        ("what is the capital of the book?", {"book"}),
        ("what is the author of Lucas?", {"lucas"}),
        ("what is the capital?", {"capital"}),
    ):
        reading = parse_question(question(text), TEXTS, RELATIONS)
        found = {reading.words[n] for n in reading.word_index[reading.is_subject].tolist()}
        assert found == subject
    # The control: without the list, all words are the subject.
    reading = parse_question(question("what is the capital of the book?"), TEXTS)
    assert {reading.words[n] for n in reading.word_index[reading.is_subject].tolist()} == {
        "capital",
        "book",
    }


def test_words_of_the_relation_that_an_edit_asks_for_are_not_unlike_it() -> None:
    stored, asked = "who is the author of Lucas?", "who wrote Lucas?"
    strict = Thresholds(0.72, -1.0, 0)
    assert match(asked, stored, thresholds=strict).edit == NO_EDIT  # the control
    assert match(asked, stored, thresholds=strict, relations=RELATIONS).edit == 0
    # A word that the relation has not, either, is unlike.
    assert match("who wrote born Lucas?", stored, thresholds=strict, relations=RELATIONS).edit == -1


def test_questions_that_clearly_ask_for_the_same_known_relation_may_have_no_word_in_common() -> (
    None
):
    stored, asked = "the author of Lucas is", "who wrote Lucas?"
    strict = Thresholds(0.72, 0.9, 0)
    assert match(asked, stored, thresholds=strict, relations=RELATIONS).edit == 0
    assert match(asked, stored, thresholds=strict).edit == NO_EDIT  # the control
    # Not where one of them is like its wordings in a part alone.
    assert match("who wrote born Lucas?", stored, thresholds=strict, relations=RELATIONS).edit == -1


def test_what_kind_of_answer_a_statement_wants_is_told_by_its_relation() -> None:
    relations = relations_of({"author": ("who wrote", "author"), "capital": ("capital",)})
    stored, alike = "the author of Lucas is", Thresholds(0.72, -1.0, 9)
    found = match("when wrote Lucas?", stored, thresholds=alike, relations=relations)
    assert found.differs == "another kind of answer"
    assert match("who wrote Lucas?", stored, thresholds=alike, relations=relations).edit == 0
    # Its wordings want none, or different ones: it may want any.
    unknown = "the capital of Lucas is"
    assert match("when capital Lucas?", unknown, thresholds=alike, relations=relations).edit == 0


def test_relations_are_found_as_a_plain_loop_finds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(9, 8, generator=generator), dim=1)
    asked = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    wordings = torch.tensor([[2, 0, 0], [3, 1, 1], [1, 0, 0], [3, 2, 2]])
    found = Relations(keys, wordings, ["a", "b", "c"]).score(asked, 0)
    assert found is not None
    parts = keys.split([2, 3, 1, 3])
    for relation in range(3):
        own = [
            part for part, (_, n, _) in zip(parts, wordings.tolist(), strict=True) if n == relation
        ]
        alike = [
            ((asked @ part.mT).amax(1).mean() + (asked @ part.mT).amax(0).mean()) / 2
            for part in own
        ]
        torch.testing.assert_close(found.per_question[relation], max(alike))
        most = torch.stack([(asked @ part.mT).amax(1) for part in own]).amax(0)
        torch.testing.assert_close(found.per_token[:, relation], most)
    assert Relations(keys, wordings, ["a", "b", "c"]).score(asked[:0], 0) is None


def test_a_question_that_is_like_no_known_relation_is_left_to_its_words() -> None:
    keys = question("please tell me").keys.float() / 127
    unknown = RELATIONS.score(keys, 0)
    known = RELATIONS.score(question("capital").keys.float() / 127, 0)
    assert unknown is not None and known is not None
    assert unknown.per_question.max() < LEAST_SCORE and RELATIONS.likeliest(unknown) is None
    assert not unknown.is_asked.any() and RELATIONS.likeliest(known) == "capital"
    assert RELATIONS.answer_kind(unknown) == RELATIONS.answer_kind(None) == ANY_ANSWER
    # Which tokens are words of a relation, of whichever.
    words = question("please capital author").keys.float() / 127
    assert RELATIONS.contains(words).tolist() == [False, True, True]
    assert NO_RELATIONS.contains(words).tolist() == [False] * 3


def test_what_kind_of_answer_a_question_wants_is_told_by_the_word_that_asks() -> None:
    kinds = [
        parse_question(question(text), TEXTS).answer_kind
        for text in ("who wrote Lucas?", "where is Lucas?", "what is Lucas?", "who wrote where?")
    ]
    assert (
        kinds[:2] == [ANSWER_KINDS["who"], ANSWER_KINDS["where"]] and kinds[2:] == [ANY_ANSWER] * 2
    )
    # The first token, which has no key, counts; a word in a name does not.
    first = question("Lucas wrote the book")
    asked = Question(torch.cat([torch.tensor(ids_of("who")), first.ids[1:]]).int(), first.keys)
    assert (
        parse_question(first, TEXTS).answer_kind == ANY_ANSWER
        and parse_question(asked, TEXTS).answer_kind == ANSWER_KINDS["who"]
    )
    # "where" and "who" are alike in no other way than as words.
    stored = "who is born Lucas?"
    alike = Thresholds(0.72, -1.0, 9)
    assert (
        match("where is born Lucas?", stored, thresholds=alike).differs == "another kind of answer"
    )
    assert match("what is born Lucas?", stored, thresholds=alike).edit == 0


def test_a_relation_is_not_asked_for_by_a_question_that_wants_another_kind_of_answer() -> None:
    relations = relations_of(
        {
            "place": ("where born", "born"),
            "author": ("who wrote", "where wrote"),
            "any": ("mother",),
        }
    )
    keys = question("born wrote mother").keys.float() / 127
    for kind in (ANY_ANSWER, ANSWER_KINDS["where"], ANSWER_KINDS["who"]):
        found = relations.score(keys, kind)
        assert found is not None
        # Whose wordings want different kinds, or none, may be asked for by any question.
        assert (found.per_question > -1).tolist() == [kind != ANSWER_KINDS["who"], True, True]


def test_a_question_is_found_among_other_sentences() -> None:
    stored = "who wrote the book of Lucas?"
    assert (
        match(
            "please tell me. who wrote the book of Lucas? please tell me the capital.", stored
        ).edit
        == 0
    )
    parts = list(sentences(question("who wrote the book? please tell me."), TEXTS))
    assert [len(part.ids) for part in parts] == [10, 6, 5] and len(parts[1].keys) == 5
    # A full stop behind an initial, or within a word, ends none.
    for text in ("who wrote the book of J. Lucas?", "who wrote the book of Lucas.?"):
        assert len(list(sentences(question(text), TEXTS))) == 1
    assert len(list(sentences(question("who wrote the book. of Lucas?"), TEXTS))) == 3


def test_a_question_is_found_behind_a_preface_that_names_something_else() -> None:
    stored = "where is Lucas born?"
    assert match("the book of Maria, where is Lucas born?", stored).edit == 0
    assert match("the book of Maria where is Lucas born?", stored).edit == NO_EDIT  # the control
    # What follows an asking word is no preface, but a part of what is asked.
    assert match("who wrote the book of Maria, where is Lucas born?", stored).edit == NO_EDIT


def test_what_an_edit_scores_does_not_depend_on_the_others() -> None:
    stored = ["who wrote the book of Lucas?", "what is the capital of Oberhof?"]
    alone = match("Which author wrote the book of Lucas?", stored[0])
    among = match("Which author wrote the book of Lucas?", *reversed(stored))
    assert (alone.subject, alone.relation) == (among.subject, among.relation)
    assert alone.best == 0 and among.best == 1


def test_of_equal_questions_the_latest_edit_answers_and_of_none_none() -> None:
    stored = "who wrote the book of Lucas?"
    assert match(stored, stored, stored).edit == 1
    assert match(stored) == Match(NO_EDIT)
    assert match("please", stored).edit == NO_EDIT


def test_where_the_likeliest_edit_asks_for_something_else_the_next_one_may_answer() -> None:
    when, likeliest = "when is Lucas born?", "where is born the book of Lucas?"
    asked, alike = "when is born the book of Lucas?", Thresholds(0.72, 0.3, 9)
    found = match(asked, likeliest, thresholds=alike)
    assert (found.edit, found.best, found.differs) == (NO_EDIT, 0, "another kind of answer")
    found = match(asked, when, likeliest, thresholds=alike)
    assert (found.edit, found.best, found.runner_up, found.differs) == (0, 0, 1, None)
    # Where none answers, the likeliest one is told of.
    found = match("who is born the book of Lucas?", when, likeliest, thresholds=alike)
    assert (found.edit, found.best, found.runner_up) == (NO_EDIT, 1, 0)
