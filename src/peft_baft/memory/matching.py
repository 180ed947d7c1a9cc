"""Find the edit that a question asks for, if there is one.

Questions are compared by their words and by late interaction of their tokens' keys: each token is compared with the most similar
token of the other question. An edit answers a question under two conditions. Both have the same subject, and the question names
nothing else; names and rare words decide this. And both ask for the same thing; the other words decide this, together with
wordings of common relations. The score of an edit does not depend on other edits. docs/memory.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_baft.memory.english import ANY_ANSWER, EXCLUDING_WORDS
from peft_baft.memory.question import ParsedQuestion, Question, parse_question, sentences
from peft_baft.memory.relations import SAME_WORD, Relations, RelationScores, group_max

NO_EDIT = -1
CANDIDATES = 16  # questions that are compared by keys: those with the most similar words
UNLIKE = 0.5  # a word is unlike a stored question or relation if its similarity to every token there is lower
UNLIKE_KNOWN = 0.7  # the same for the first word that expresses what is asked, if a common relation contains it
SAME_RELATION = (
    0.9  # two questions with this similarity to one relation ask for the same, whatever their words
)


@dataclass(frozen=True)
class Match:
    """The edit that answers a question. Edits are given by their places, -1 for none.

    Attributes:
        edit: the one that answers.
        best, runner_up: the two with the highest scores.
        subject, relation: the similarity to `best` in what the question is about, and in what it asks. At most 1.
        asks_for, best_asks_for: the common relations that the question and `best` are most similar to; None if there are none, or
            if they were not needed.
        differs: why `best` does not answer although both similarities are sufficient, in words.
    """

    edit: int
    best: int = NO_EDIT
    runner_up: int = NO_EDIT
    subject: float = 0.0
    relation: float = 0.0
    asks_for: str | None = None
    best_asks_for: str | None = None
    differs: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """The conditions under which an edit answers.

    Attributes:
        subject, strictness: lower bounds of the similarities in subject and relation, exclusive.
        most_unlike: how many words outside the subject may be unlike both the edit's question and the relation that it asks for.
    """

    subject: float
    strictness: float
    most_unlike: int


class QuestionIndex:
    """A search index of the questions of all edits.

    Args:
        texts: the text of each token in the vocabulary, including the space before it.
        relations: what questions commonly ask for.
    """

    def __init__(
        self, questions: Sequence[Question], texts: Sequence[str], relations: Relations
    ) -> None:
        self._texts, self._relations = texts, relations
        self._questions: list[Question] = []
        self._parsed: dict[int, ParsedQuestion] = {}
        self._relation_scores: dict[int, RelationScores | None] = {}
        # An inverted index: for each word, the edits that contain it, and its weight in each.
        self._index: dict[str, tuple[list[int], list[float]]] = {}
        self.add(questions)

    def add(self, questions: Sequence[Question]) -> None:
        """Append the questions of further edits."""
        for number, question in enumerate(questions, len(self._questions)):
            for word, weight in parse_question(question, self._texts).weights.items():
                edits, weights = self._index.setdefault(word, ([], []))
                edits.append(number)
                weights.append(weight)
        self._questions += questions

    def match(self, question: Question, thresholds: Thresholds) -> Match:
        """Find the edit that a prompt, or a sentence in it, asks for.

        If several sentences are answered, the match with the highest rank is returned. If none is, the match describes the prompt
        as a whole.
        """
        found = [
            self._match(parse_question(part, self._texts, self._relations), thresholds)
            for part in sentences(question, self._texts)
            if len(part.keys)
        ]
        answered = [(rank, match) for rank, match in found if match.edit != NO_EDIT]
        if answered:
            return max(answered, key=lambda pair: pair[0])[1]
        return found[0][1] if found else Match(NO_EDIT)

    def _match(self, asked: ParsedQuestion, thresholds: Thresholds) -> tuple[float, Match]:
        """Return the highest-ranked edit that answers, and its rank; without one, describe the highest-ranked edit."""
        scored = [(compare(self._parse(n), asked), n) for n in self._candidates(asked)]
        # Later edits take precedence over earlier ones of the same rank.
        scored.sort(key=lambda pair: (-pair[0].rank, -pair[1]))
        numbers = [number for _, number in scored]
        asked_relations = None
        if any(similarity.subject > thresholds.subject for similarity, _ in scored):
            asked_relations = self._relations.score(
                asked.keys[asked.is_relation], asked.answer_kind
            )
        likeliest = (0.0, Match(NO_EDIT))
        for similarity, best in scored:
            runner_up = next((n for n in numbers if n != best), NO_EDIT)
            match = Match(NO_EDIT, best, runner_up, similarity.subject, similarity.relation)
            if similarity.subject > thresholds.subject and (
                similarity.relation > thresholds.strictness
                or self._ask_the_same(asked_relations, self._relations_of(best))
            ):
                match = self._check_differences(match, asked, similarity, thresholds.most_unlike)
            if match.edit != NO_EDIT:
                return similarity.rank, match
            if best == numbers[0]:
                likeliest = (similarity.rank, match)
        return likeliest

    @staticmethod
    def _ask_the_same(asked: RelationScores | None, stored: RelationScores | None) -> bool:
        """Return whether two questions clearly ask for the same common relation."""
        if asked is None or stored is None:
            return False
        both = torch.minimum(asked.per_question, stored.per_question)
        return bool(both.max() > SAME_RELATION)

    def _check_differences(
        self, match: Match, asked: ParsedQuestion, similarity: Similarity, most_unlike: int
    ) -> Match:
        """Accept the best edit unless the question names or asks for something else."""
        stored = self._parse(match.best)
        # Of each word, the similarity to the edit's question: 1 if it contains the word.
        word_similarity = group_max(similarity.per_token[None], asked.word_index, len(asked.words))
        word_similarity = torch.where(_words_in(asked, stored), 1.0, word_similarity[0])
        is_foreign = asked.is_subject & (word_similarity < UNLIKE)[asked.word_index]
        # A rare word that is not a name and not in the edit's subject may express what is asked.
        is_relation = asked.is_relation | (is_foreign & ~asked.is_name)
        asked_relations = self._relations.score(asked.keys[is_relation], asked.answer_kind)
        stored_relations = self._relations_of(match.best)
        if asked_relations is not None:
            match = replace(match, asks_for=self._relations.likeliest(asked_relations))
        if stored_relations is not None:
            match = replace(match, best_asks_for=self._relations.likeliest(stored_relations))
        kinds = {
            self._answer_kind(stored, stored_relations),
            self._answer_kind(asked, asked_relations),
        }
        if len(kinds - {ANY_ANSWER}) > 1:
            differs = "another kind of answer"
        elif EXCLUDING_WORDS.intersection(asked.words) - set(stored.words):
            differs = "another answer than the edit's"
        elif (is_foreign & asked.is_name).any():
            differs = _quoted(asked, asked.word_index[is_foreign & asked.is_name])
        else:
            words = asked.word_index[is_relation]
            unlike = _unlike_words(
                words, word_similarity, asked_relations, stored_relations, most_unlike
            )
            differs = _quoted(asked, unlike)
        return replace(match, differs=differs) if differs else replace(match, edit=match.best)

    def _answer_kind(self, question: ParsedQuestion, scores: RelationScores | None) -> int:
        """Return the kind of answer that a question's words ask for, or else the relations that it asks for."""
        return question.answer_kind or self._relations.answer_kind(scores)

    def _candidates(self, asked: ParsedQuestion) -> list[int]:
        """Return the edits whose words are the most similar."""
        scores = torch.zeros(len(self._questions), dtype=torch.float32)
        for word, weight in asked.weights.items():
            if word in self._index:
                edits, weights = self._index[word]
                products = weight * torch.tensor(weights, dtype=torch.float32)
                scores.index_add_(0, torch.tensor(edits), products)
        top = scores.topk(min(CANDIDATES, len(scores)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [number for number, score in pairs if score > 0]

    def _parse(self, number: int) -> ParsedQuestion:
        if number not in self._parsed:
            question = self._questions[number]
            self._parsed[number] = parse_question(question, self._texts, self._relations)
        return self._parsed[number]

    def _relations_of(self, number: int) -> RelationScores | None:
        """Return how similar an edit's question is to each relation."""
        if number not in self._relation_scores:
            stored = self._parse(number)
            scores = self._relations.score(stored.keys[stored.is_relation], stored.answer_kind)
            self._relation_scores[number] = scores
        return self._relation_scores[number]


@dataclass(frozen=True)
class Similarity:
    """The similarity of a question to an edit's question.

    Attributes:
        rank: the overall score, by which edits are ranked.
        subject, relation: the similarity in what it is about, and in what it asks. At most 1.
        per_token: (n,), the similarity of each token of the question to the most similar one of the edit's.
    """

    rank: float
    subject: float
    relation: float
    per_token: Tensor


def compare(stored: ParsedQuestion, asked: ParsedQuestion) -> Similarity:
    """Compare a question with an edit's question."""
    words = sum(weight * asked.weights.get(word, 0.0) for word, weight in stored.weights.items())
    if not len(stored.keys):  # the edit's question has one token
        return Similarity(words, 0.0, 0.0, torch.zeros(len(asked.keys), dtype=torch.float32))
    similarity = stored.keys @ asked.keys.mT.to(stored.keys.device)
    per_token = similarity.amax(0).cpu()
    to_asked, to_stored = similarity.amax(1).tolist(), per_token.tolist()
    subject = (
        _subject_similarity(stored, asked, to_asked) + _subject_similarity(asked, stored, to_stored)
    ) / 2
    tokens = stored.relation_tokens or [(n, 1.0) for n in range(len(to_asked))]
    weighted = sum(weight * to_asked[n] for n, weight in tokens)
    relation = min(weighted / sum(weight for _, weight in tokens), 1.0)
    rank = words + subject + relation
    if stored.numbers != asked.numbers:  # NGC 6604 is not NGC 634
        subject = 0.0
    return Similarity(rank, subject, relation, per_token)


def _subject_similarity(
    question: ParsedQuestion, other: ParsedQuestion, similarity: Sequence[float]
) -> float:
    """Average the similarities of the tokens of one question's subject to the other question.

    A word that the other question contains counts 1, whatever its capitals.
    """
    tokens = question.subject_tokens
    if not tokens:
        return 0.0
    total = sum(1.0 if word in other.all_words else similarity[n] for n, word in tokens)
    return min(total / len(tokens), 1.0)


def _words_in(question: ParsedQuestion, other: ParsedQuestion) -> Tensor:
    """Return which words (words,) of a question the other one contains."""
    return torch.tensor([word in other.all_words for word in question.words], dtype=torch.bool)


def _unlike_words(
    word_index: Tensor,
    word_similarity: Tensor,
    asked: RelationScores | None,
    stored: RelationScores | None,
    most: int,
) -> Tensor:
    """Return the words of a question that ask for something other than an edit does.

    Args:
        word_index: (n,), the index of the word of each token that expresses what is asked.
        word_similarity: (words,), the similarity of each word to the edit's question.
        asked, stored: the relations that the question and the edit's question ask for. `asked` is of the tokens of `word_index`.
        most: how many words, apart from the first, may be unlike.

    Returns:
        The indices of the words. If the first word is unlike, it is that word, because it expresses what is wanted ("Which
        kingdom was the mother of X from?"). Otherwise all unlike words if there are more than `most`, else none.
    """
    words, word_of_token = word_index.unique_consecutive(return_inverse=True)
    similarity, is_first_known = word_similarity[words], False
    if asked is not None:
        per_relation = group_max(asked.per_token.mT, word_of_token, len(words))
        is_first_known = bool(per_relation[:, 0].max() > SAME_WORD)
        if stored is not None and stored.is_asked.any():
            similarity = torch.maximum(similarity, per_relation[stored.is_asked].amax(0))
    if len(words) and similarity[0] < (UNLIKE_KNOWN if is_first_known else UNLIKE):
        return words[:1]
    unlike = words[similarity < UNLIKE]
    return unlike if len(unlike) > most else unlike[:0]


def _quoted(question: ParsedQuestion, word_index: Tensor) -> str:
    """Quote words of a question."""
    return ", ".join(f'"{question.words[n]}"' for n in word_index.unique_consecutive().tolist())
