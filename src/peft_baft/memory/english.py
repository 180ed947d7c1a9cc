"""What the router knows about English: function words, words that ask, and where sentences begin and end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Words that identify neither the subject of a question nor what it asks for. The last three lines are parts of contractions,
# words that only narrow an answer, and words of polite requests.
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
# If one of these is not in the edit's question, the prompt asks for something other than the edit's answer.
EXCLUDING_WORDS = frozenset(("not", "other", "another", "else", "except", "besides"))
QUESTION_WORDS = frozenset(("who", "whom", "whose", "where", "when", "how", "why", "what", "which"))
ANY_ANSWER = 0  # the kind of answer of a question whose words do not determine one
# The kind of answer that a word asks for: a person, a place, a time, a manner or number, a reason.
ANSWER_KINDS = {
    **dict.fromkeys(("who", "whom", "whose"), 1),
    "where": 2,
    **dict.fromkeys(("when", "year", "date", "day"), 3),
    "how": 4,
    "why": 5,
}
SENTENCE_ENDS = (".", "?", "!", "\n", ":")
SHORTEST_LAST = 3  # a full stop after a word with fewer letters does not end a sentence


def is_function_word(word: str) -> bool:
    """Return whether a word identifies neither a subject nor what is asked."""
    return _normalized(word) in FUNCTION_WORDS


def answer_kind(words: Iterable[str]) -> int:
    """Return the kind of answer that words ask for; `ANY_ANSWER` if they ask for none or for several."""
    normalized = map(_normalized, words)
    kinds = {ANSWER_KINDS[word] for word in normalized if word in ANSWER_KINDS}
    return kinds.pop() if len(kinds) == 1 else ANY_ANSWER


def numbers_in(word: str) -> list[str]:
    """Return the runs of digits in a word."""
    return "".join(sign if sign.isdigit() else " " for sign in word).split()


def preface_length(texts: Sequence[str]) -> int:
    """Return how many tokens of a sentence are a preface, such as "As far as Kurt Moor knows," in front of "where …".

    A preface ends at the last comma before the first question word. Without such a comma, the length is 0.

    Args:
        texts: the sentence's tokens.
    """
    words = [text.strip().casefold() for text in texts]
    asking = next((place for place, word in enumerate(words) if word in QUESTION_WORDS), 0)
    return max((place + 1 for place in range(asking) if words[place] == ","), default=0)


def ends_sentence(texts: Sequence[str], place: int) -> bool:
    """Return whether a token ends a sentence.

    A full stop does not if it is within a word or follows an initial or a short abbreviation.

    Args:
        texts: the tokens of the whole text.
    """
    text = texts[place].rstrip(" ")
    if not text.endswith("."):
        return text.endswith(SENTENCE_ENDS)
    is_within_word = place + 1 < len(texts) and not texts[place + 1][:1].isspace()
    # The last three tokens suffice to see whether the word is short.
    last_word = "".join(texts[max(0, place - 2) : place + 1]).split()[-1]
    return not is_within_word and len(last_word.strip(".")) >= SHORTEST_LAST


def _normalized(word: str) -> str:
    return word.casefold().strip("'’")
