"""Find the edit that a question asks for, or none.

Questions are compared by their words, and by late interaction of their tokens' keys: each token of one looks for the most similar
token of the other. An edit answers if the question is about the same subject and names nothing else, which names and rare words
tell, and asks the same of it, which the other words tell, and the common relations whose wordings these are like. What an
edit scores depends on no other edit, and on no statistics of texts: how rare a token is follows from its place in the
vocabulary, since byte pair encoding merges the commonest first. docs/memory.md has the figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from peft_baft.memory.relations import ANYTHING, SAME, AskedFor, Relations, largest

INT8 = 127.0
NOWHERE = -1
CANDIDATES = 16  # questions that are compared by keys: those with the most similar words
RARE = 0.95  # a token that begins a word is rare from this part of the vocabulary on, in logarithms
FUNCTION_WEIGHT, FUNCTION_RARITY = (
    0.5,
    0.3,
)  # of function words and signs, in the relation and among words
UNLIKE = 0.5  # a word of the question that is less like any of the edit's, or of what it asks for, is not among these
UNLIKE_KNOWN = 0.7  # the same for the first word that tells what is asked for, if it is one of a common relation
SAME_RELATION = 0.9  # how alike two questions must be to a relation's wordings to ask the same in whatever words
SHORTEST = 3  # tokens of a sentence that may be a question
SHORTEST_LAST = 3  # letters of a word before a full stop that ends a sentence
ENDS = (".", "?", "!", "\n", ":")  # of sentences
# Words that tell neither what a question is about nor what it asks for; the last three lines: parts of contractions, words that
# only narrow an answer, and those of polite requests.
_FUNCTION_WORDS = """
a about also am an and any are as at be been being but by can could did do does for from had has have he her his how i
if in into is it its know may me might must my no not of on or our out please s say shall she should so some t tell
than that the their them then there these they this those to us was we were what when where which who whom whose why
name names will with would you your
d ll re ve
one person exact exactly full official actual
again called curious hello hey hi know like need remind thank thanks think want wonder wondering
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
# Words that, unless the edit's question has them, too, make a question ask for another answer than the edit's.
OTHERWISE = frozenset(("not", "other", "another", "else", "except", "besides"))
ASKING = frozenset(("who", "whom", "whose", "where", "when", "how", "why", "what", "which"))
# Words that tell what kind of answer a question wants: a person, a place, a time, a manner or number, a reason.
KINDS = {
    **dict.fromkeys(("who", "whom", "whose"), 1),
    "where": 2,
    **dict.fromkeys(("when", "year", "date", "day"), 3),
    "how": 4,
    "why": 5,
}


@dataclass(frozen=True)
class Question:
    """A question as a router keeps it. ids: (n,) int32; keys: (n - 1, k) int8, of length 127, without the first token's."""

    ids: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Match:
    """What a router found, by places of edits, -1 where there is none.

    Attributes:
        edit: which answers. best, runner_up: the likeliest two.
        subject, relation: how much the question is about the same as the best edit's, and asks the same, both at most 1.
        asked_for, best_asks_for: the common relations that the question and the best edit's are most like, None where there are
            none, or that was not needed.
        differs: what keeps the best edit from answering, though these are enough, in words.
    """

    edit: int
    best: int = NOWHERE
    runner_up: int = NOWHERE
    subject: float = 0.0
    relation: float = 0.0
    asked_for: str | None = None
    best_asks_for: str | None = None
    differs: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """When an edit answers.

    Attributes:
        subject, strictness: what the likenesses of subject and relation must be above.
        most_unlike: how many words of a question, besides its subject, may be unlike any of the edit's and of what it asks for.
    """

    subject: float
    strictness: float
    most_unlike: int


@dataclass(frozen=True)
class Reading:
    """A question in words, without its first token.

    Attributes:
        keys: (n, k) of its tokens, of length 1. word: (n,), the number of each token's word. words: in lower case.
        first: the token that has no key, in lower case.
        subject, content: (n,) bool, whether the token's word tells the subject, and whether it is no function word or sign.
        named: (n,) bool, whether the token's word is a name or a number.
        weights: of each different word, a vector of length 1. numbers: those that it names.
        kind: of answer that it wants, one of `KINDS`, `ANYTHING` where its words tell none or several.
    """

    keys: Tensor
    word: Tensor
    words: list[str]
    first: str
    subject: Tensor
    content: Tensor
    named: Tensor
    weights: dict[str, float]
    numbers: frozenset[str]
    kind: int

    @property
    def telling(self) -> Tensor:
        """(n,) bool, the tokens that tell the relation: of words that are neither the subject's nor function words."""
        return self.content & ~self.subject

    # In lists, which are faster to walk through than tensors of so few tokens.
    @cached_property
    def said(self) -> frozenset[str]:
        """All words, with the first token."""
        return frozenset((*self.words, self.first))

    @cached_property
    def subject_tokens(self) -> list[tuple[int, str]]:
        """The places of the subject's tokens, each with its word."""
        word = self.word.tolist()
        return [(n, self.words[word[n]]) for n, told in enumerate(self.subject.tolist()) if told]

    @cached_property
    def relation_tokens(self) -> list[tuple[int, float]]:
        """The places of the other tokens, each with its weight."""
        told = zip(self.subject.tolist(), self.content.tolist(), strict=True)
        return [
            (n, 1.0 if content else FUNCTION_WEIGHT)
            for n, (subject, content) in enumerate(told)
            if not subject
        ]


def read(question: Question, texts: Sequence[str], relations: Relations | None = None) -> Reading:
    """Read a question.

    Args:
        texts: of each token, what it stands for, with the space before it.
        relations: whose words tell no subject, where there are others.
    """
    words, of_token, named, rarity = _words(question, texts)
    in_letters = [any(map(str.isalnum, one)) for one in words]
    content = [
        a and _plain(one) not in FUNCTION_WORDS for a, one in zip(in_letters, words, strict=True)
    ]
    keys = question.keys.float() / INT8
    known = set(of_token[relations.knows(keys)].tolist()) if relations else set()
    subject = _of_subject(content, named, rarity, known)
    first = _text(int(question.ids[0]), texts).strip() if len(question.ids) else ""
    # Its words, but for names; the first one may be the word that asks.
    spoken = [first, *(one for one, name in zip(words, named, strict=True) if not name)]
    kinds = {KINDS[one] for one in map(_plain, spoken) if one in KINDS}
    weights: Counter[str] = Counter()
    for one, a, c, rare in zip(words, in_letters, content, rarity, strict=True):
        weights[one] += (rare if c else FUNCTION_RARITY) ** 2 if a else 0.0  # type: ignore[assignment]
    length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
    return Reading(
        keys=keys,
        word=of_token,
        words=words,
        first=first.casefold(),
        subject=torch.tensor(subject, dtype=torch.bool)[of_token],
        content=torch.tensor(content, dtype=torch.bool)[of_token],
        named=torch.tensor(named, dtype=torch.bool)[of_token],
        weights={one: weight / length for one, weight in weights.items() if weight},
        numbers=frozenset(n for one in words for n in _digits(one)),
        kind=kinds.pop() if len(kinds) == 1 else ANYTHING,
    )


def _words(
    question: Question, texts: Sequence[str]
) -> tuple[list[str], Tensor, list[bool], list[float]]:
    """Put a question's tokens but the first together to words.

    Returns:
        The words in lower case; the number of each token's word; and of each word, whether it is a name or a number, and how rare
        it is, at most 1.
    """
    words: list[str] = []
    word, sizes, named, rarity = [], [], [], []
    begun = _begun(question, texts)
    for place, token in enumerate(question.ids[1:].tolist()):
        text = _text(token, texts)
        stripped = text.strip()
        if place == 0 or text[:1] == " " or not text[:1].isalnum():
            words.append(begun.casefold() if place == 0 else "")
            sizes.append(int(place == 0 and bool(begun)))
            named.append(place > 0 and (stripped[:1].isupper() or stripped[:1].isdigit()))
            rarity.append(math.log(max(token, 1)) / math.log(max(len(texts), 2)))
        words[-1] += stripped.casefold()
        sizes[-1] += 1
        word.append(len(words) - 1)
    # A word of several tokens is rare.
    rarity = [1.0 if size > 1 else rare for size, rare in zip(sizes, rarity, strict=True)]
    return words, torch.tensor(word, dtype=torch.long), named, rarity


def _of_subject(
    content: Sequence[bool], named: Sequence[bool], rarity: Sequence[float], known: Collection[int]
) -> list[bool]:
    """Tell which words tell the subject: names and rare words, or else all that are no function words.

    Of either, those that are not `known`, as words of a common relation, where there are such.
    """
    rare = [c and (name or of >= RARE) for c, name, of in zip(content, named, rarity, strict=True)]
    for among in (rare, content):
        told = [of and n not in known for n, of in enumerate(among)]
        if any(told):
            return told
    return rare if any(rare) else list(content)


def _begun(question: Question, texts: Sequence[str]) -> str:
    """Give what of the second token's word stands in the first one, which has no key; "" if a word begins with the second."""
    if len(question.ids) < 2:
        return ""
    begun, second = (_text(token, texts) for token in question.ids[:2].tolist())
    return begun.strip() if begun[-1:].isalnum() and second[:1].isalnum() else ""


def _plain(word: str) -> str:
    return word.casefold().strip("'’")


def _text(token: int, texts: Sequence[str]) -> str:
    """Give what a token stands for; one that was added to the vocabulary later is a word that no edit has."""
    return texts[token] if token < len(texts) else f" <{token}>"


def _digits(word: str) -> list[str]:
    return "".join(sign if sign.isdigit() else " " for sign in word).split()


def sentences(question: Question, texts: Sequence[str]) -> Iterator[Question]:
    """Give a prompt as a whole, and each part of it that may be a question among words that ask for nothing.

    These are its sentences, and what stands behind a preface ("As far as Kurt Moor knows, where …").
    """
    yield question
    spoken = [_text(token, texts) for token in question.ids.tolist()]
    ends = [n + 1 for n in range(1, len(spoken)) if _ends_sentence(spoken, n)]
    bounds = sorted({0, *ends, len(spoken)})
    for start, end in pairwise(bounds):
        preface = _behind_preface(spoken[start:end])
        for first in sorted({start, start + preface}):
            is_a_part = (first, end) != (0, len(spoken))
            if is_a_part and end - first >= SHORTEST:
                before = max(first - 1, 0)  # the token before, which has no key
                yield Question(question.ids[before:end], question.keys[before : end - 1])


def _behind_preface(spoken: Sequence[str]) -> int:
    """Find where a sentence goes on behind the last comma before its first asking word; 0 where there is none."""
    words = [text.strip().casefold() for text in spoken]
    asking = next((n for n, word in enumerate(words) if word in ASKING), 0)
    return max((n + 1 for n in range(asking) if words[n] == ","), default=0)


def _ends_sentence(spoken: Sequence[str], place: int) -> bool:
    """Tell whether a token ends a sentence; a full stop does not within a word, nor behind an initial or a short abbreviation."""
    text = spoken[place].rstrip(" ")
    if not text.endswith("."):
        return text.endswith(ENDS)
    within_a_word = place + 1 < len(spoken) and not spoken[place + 1][:1].isspace()
    # The last tokens are enough to see whether the word is short.
    last_word = "".join(spoken[max(0, place - 2) : place + 1]).split()[-1]
    return not within_a_word and len(last_word.strip(".")) >= SHORTEST_LAST


class Questions:
    """The questions of all edits, ready to be searched.

    Args:
        texts: of each token of the vocabulary, what it stands for, with the space before it.
        relations: what questions commonly ask for.
    """

    def __init__(
        self, questions: Sequence[Question], texts: Sequence[str], relations: Relations
    ) -> None:
        self._texts, self._relations = texts, relations
        self._questions: list[Question] = []
        self._readings: dict[int, Reading] = {}
        self._asked_for: dict[int, AskedFor | None] = {}
        # By word, in which edits it is, and with which weight: an inverted index.
        self._index: dict[str, tuple[list[int], list[float]]] = {}
        self.add(questions)

    def add(self, questions: Sequence[Question]) -> None:
        """Take in the questions of further edits."""
        for number, question in enumerate(questions, len(self._questions)):
            for word, weight in read(question, self._texts).weights.items():
                edits, weights = self._index.setdefault(word, ([], []))
                edits.append(number)
                weights.append(weight)
        self._questions += questions

    def match(self, question: Question, thresholds: Thresholds) -> Match:
        """Find the edit that a prompt, or a sentence in it, asks for: the likeliest one, if it is alike enough."""
        found = [
            self._match(read(part, self._texts, self._relations), thresholds)
            for part in sentences(question, self._texts)
            if len(part.keys)
        ]
        answering = [one for one in found if one[1].edit != NOWHERE]
        if answering:
            return max(answering, key=lambda one: one[0])[1]
        return found[0][1] if found else Match(NOWHERE)

    def _match(self, asked: Reading, thresholds: Thresholds) -> tuple[float, Match]:
        """Find the likeliest edit that answers, with its rank; where none does, tell of the likeliest one."""
        scored = [(compare(self._reading(n), asked), n) for n in self._likely(asked)]
        # Of equal ones the latest edit.
        scored.sort(key=lambda one: (-one[0].rank, -one[1]))
        numbers = [number for _, number in scored]
        own = None
        if any(alike.subject > thresholds.subject for alike, _ in scored):
            own = self._relations.asked_for(asked.keys[asked.telling], asked.kind)
        likeliest: tuple[float, Match] = (0.0, Match(NOWHERE))
        for alike, best in scored:
            runner_up = next((n for n in numbers if n != best), NOWHERE)
            match = Match(NOWHERE, best, runner_up, alike.subject, alike.relation)
            if alike.subject > thresholds.subject and (
                alike.relation > thresholds.strictness or self._asks_the_same(own, best)
            ):
                match = self._unless_it_differs(match, asked, alike, thresholds.most_unlike)
            if match.edit != NOWHERE:
                return alike.rank, match
            if best == numbers[0]:
                likeliest = (alike.rank, match)
        return likeliest

    def _asks_the_same(self, own: AskedFor | None, number: int) -> bool:
        """Tell whether a question, which asks for `own`, and an edit's clearly ask for the same common relation."""
        best = self._asked_for_by(number)
        if own is None or best is None:
            return False
        return bool(torch.minimum(own.of_question, best.of_question).max() > SAME_RELATION)

    def _unless_it_differs(
        self, match: Match, asked: Reading, alike: Likeness, most_unlike: int
    ) -> Match:
        """Let the best edit answer unless the question, which is alike, names or asks for something else."""
        stored = self._reading(match.best)
        # How alike each word is to any of the edit's: 1 if it is one of these.
        of_words = largest(alike.of_asked[None], asked.word, len(asked.words))[0]
        of_words = torch.where(_in_both(asked, stored), 1.0, of_words)
        strange = asked.subject & (of_words < UNLIKE)[asked.word]
        # A rare word that is no name and not of the edit's subject may tell what is asked for.
        telling = asked.telling | (strange & ~asked.named)
        own = self._relations.asked_for(asked.keys[telling], asked.kind)
        best = self._asked_for_by(match.best)
        if own is not None:
            match = replace(match, asked_for=self._relations.likeliest(own))
        if best is not None:
            match = replace(match, best_asks_for=self._relations.likeliest(best))
        # What kind of answer each wants: words say, or else the relations that it asks for.
        kinds = {one.kind or self._relations.kind(of) for one, of in ((stored, best), (asked, own))}
        if len(kinds - {ANYTHING}) > 1:
            differs = "another kind of answer"
        elif OTHERWISE.intersection(asked.words) - set(stored.words):
            differs = "another answer than the edit's"
        elif (strange & asked.named).any():
            differs = _quoted(asked, asked.word[strange & asked.named])
        else:
            unlike = _unlike(asked.word[telling], of_words, own, best, most_unlike)
            differs = _quoted(asked, unlike)
        return replace(match, differs=differs) if differs else replace(match, edit=match.best)

    def _asked_for_by(self, number: int) -> AskedFor | None:
        """Tell which relations an edit's question asks for."""
        if number not in self._asked_for:
            reading = self._reading(number)
            keys = reading.keys[reading.telling]
            self._asked_for[number] = self._relations.asked_for(keys, reading.kind)
        return self._asked_for[number]

    def _likely(self, asked: Reading) -> list[int]:
        """List the edits with the most similar words."""
        scores = torch.zeros(len(self._questions), dtype=torch.float32)
        for word, weight in asked.weights.items():
            if word in self._index:
                edits, weights = self._index[word]
                scores.index_add_(
                    0, torch.tensor(edits), weight * torch.tensor(weights, dtype=torch.float32)
                )
        top = scores.topk(min(CANDIDATES, len(scores)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [number for number, score in pairs if score > 0]

    def _reading(self, number: int) -> Reading:
        if number not in self._readings:
            self._readings[number] = read(self._questions[number], self._texts, self._relations)
        return self._readings[number]


@dataclass(frozen=True)
class Likeness:
    """How alike an edit's question and another one are.

    Attributes:
        rank: altogether, by which edits are ranked. subject, relation: in these, at most 1.
        of_asked: (n,), how alike each token of the other question is to any of the edit's.
    """

    rank: float
    subject: float
    relation: float
    of_asked: Tensor


def compare(stored: Reading, asked: Reading) -> Likeness:
    """Compare an edit's question with another one."""
    same_words = sum(w * asked.weights.get(word, 0.0) for word, w in stored.weights.items())
    if not len(stored.keys):  # a question of one token
        return Likeness(same_words, 0.0, 0.0, torch.zeros(len(asked.keys), dtype=torch.float32))
    similar = stored.keys @ asked.keys.mT.to(stored.keys.device)
    of_asked = similar.amax(0).cpu()
    to_stored, to_asked = similar.amax(1).tolist(), of_asked.tolist()
    subject = (_about(stored, asked, to_stored) + _about(asked, stored, to_asked)) / 2
    others = stored.relation_tokens or [(n, 1.0) for n in range(len(to_stored))]
    of_relation = sum(weight * to_stored[n] for n, weight in others)
    relation = min(of_relation / sum(weight for _, weight in others), 1.0)
    rank = same_words + subject + relation
    if stored.numbers != asked.numbers:  # NGC 6604 is not NGC 634
        subject = 0.0
    return Likeness(rank, subject, relation, of_asked)


def _about(own: Reading, other: Reading, similar: Sequence[float]) -> float:
    """Average how similar the tokens of one question's subject are to the other's; the same word is, whatever its capitals."""
    tokens = own.subject_tokens
    if not tokens:
        return 0.0
    alike = sum(1.0 if word in other.said else similar[n] for n, word in tokens)
    return min(alike / len(tokens), 1.0)


def _in_both(own: Reading, other: Reading) -> Tensor:
    """Tell which words (words,) of a question are words of another one, whose first may have no key."""
    return torch.tensor([word in other.said for word in own.words], dtype=torch.bool)


def _unlike(
    word: Tensor, of_words: Tensor, own: AskedFor | None, best: AskedFor | None, most: int
) -> Tensor:
    """Find the words of a question that ask for something else than an edit does.

    Args:
        word: (n,), the number of each token's word, of the tokens that tell what is asked for.
        of_words: (words,), how alike each word is to any of the edit's.
        own, best: what the question and the edit's ask for. most: how many words may be unlike, but for the first.

    Returns:
        The numbers of words: the first, if it is unlike, since it tells what is wanted ("Which kingdom was the mother of X
        from?"); or all unlike ones, if there are more than `most`.
    """
    words, of_token = word.unique_consecutive(return_inverse=True)
    likeness, first_known = of_words[words], False
    if own is not None:
        of_relations = largest(own.of_tokens.mT, of_token, len(words))
        first_known = bool(of_relations[:, 0].max() > SAME)
        if best is not None and best.own.any():
            likeness = torch.maximum(likeness, of_relations[best.own].amax(0))
    unlike = words[likeness < UNLIKE]
    if len(words) and likeness[0] < (UNLIKE_KNOWN if first_known else UNLIKE):
        unlike, most = words[:1], 0
    return unlike if len(unlike) > most else unlike[:0]


def _quoted(reading: Reading, word: Tensor) -> str:
    """Quote some words of a question."""
    return ", ".join(f'"{reading.words[n]}"' for n in word.unique_consecutive().tolist())
