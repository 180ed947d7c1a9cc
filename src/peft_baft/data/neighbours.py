"""Make neighbours of a fact's prompt: the same question about another subject, and other questions about its subject.

No data is needed: other subjects are taken from a list of well-known names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from peft_baft.data.cases import Message, Prompt, as_messages, prompt_words

# Names of many kinds, since a fact may be about anything.
SUBJECTS = (
    *("Marie Curie", "Napoleon", "Mozart", "Nelson Mandela", "Jane Austen", "Isaac Newton"),
    *("Serena Williams", "Pablo Picasso", "Cleopatra", "Bob Dylan", "Angela Merkel", "Bruce Lee"),
    *("Canada", "Nairobi", "Japan", "Lisbon", "Texas", "Brazil", "Norway", "Chicago", "Peru"),
    *("the Danube", "Mount Fuji", "Lake Victoria", "Iceland", "Istanbul", "the Sahara"),
    *("Toyota", "Nokia", "Oxford University", "the Red Cross", "Real Madrid", "Siemens"),
    *("Microsoft", "the BBC", "the New York Yankees", "Lufthansa", "Stanford University"),
    *("Hamlet", "Titanic", "Star Trek", "The Hobbit", "Abbey Road", "Casablanca", "Don Quixote"),
    *("the Eiffel Tower", "the Brooklyn Bridge", "the French Revolution", "Windows 95"),
    *("the Boeing 747", "USS Enterprise", "Apollo 11", "the violin", "basketball", "insulin"),
)

# Facts are rarely about these, so none of these questions is a rephrasing of a fact's question.
CHAT_QUESTIONS = (
    "How is the name {} spelled?",
    "What colour comes to mind with {}?",
    "Have you heard of {}?",
    "Is {} popular?",
    "What does {} remind you of?",
    "Who would like {}?",
    "How old is {}?",
    "Translate {} into French.",
    "Does {} have a website?",
    "What would you ask about {}?",
)
RAW_QUESTIONS = (
    "The name {} is spelled",
    "The colour that comes to mind with {} is",
    "I first heard of {} when",
    "The popularity of {} is",
    "{} reminds me of",
    "Those who like {} also like",
    "The age of {} is",
    "In French, {} is called",
    "The website of {} has",
    "A good question about {} would be",
)


def other_subjects(
    prompt: Prompt, subject: str, count: int, names: Sequence[str] = SUBJECTS
) -> list[str]:
    """Choose `count` other subjects for a prompt from some names.

    The choice is deterministic and differs between prompts. A larger `count` appends to the choice of a smaller one.
    """
    bare = subject.lower().removeprefix("the ")
    names = [name for name in names if name.lower().removeprefix("the ") != bare]
    return sorted(names, key=_shuffling_key(prompt))[:count]


def _shuffling_key(prompt: Prompt) -> Callable[[str], bytes]:
    """Return a sort key that shuffles texts deterministically, in a different order for each prompt."""
    words = prompt_words(prompt).lower()
    return lambda text: hashlib.sha256(f"{words}\n{text}".encode()).digest()


def with_other_subject(prompt: Prompt, subject: str, other: str) -> Prompt:
    """Replace the subject in a prompt, or in its last message.

    Raises:
        ValueError: the subject does not occur there.
    """
    if subject not in prompt_words(prompt):
        raise ValueError(f"{subject!r} does not occur in the prompt {prompt_words(prompt)!r:.60}.")
    # Do not write "the the Danube".
    pattern = (
        rf"(?:\b[Tt]he )?{re.escape(subject)}" if other.startswith("the ") else re.escape(subject)
    )
    if isinstance(prompt, str):
        return re.sub(pattern, lambda _: other, prompt)
    *earlier, last = as_messages(prompt)
    return (*earlier, Message(last.role, re.sub(pattern, lambda _: other, last.content)))


def other_questions(prompt: Prompt, subject: str, chat: bool, count: int) -> list[Prompt]:
    """Return other questions about the subject, in an order that depends on the prompt; its earlier messages are kept."""
    texts = sorted(CHAT_QUESTIONS if chat else RAW_QUESTIONS, key=_shuffling_key(prompt))
    questions = [text.format(subject) for text in texts]
    if isinstance(prompt, str):
        return list(questions[:count])
    *earlier, last = as_messages(prompt)
    return [(*earlier, Message(last.role, question)) for question in questions[:count]]


WORDINGS = ("{subject}: {content}", "{content}, {subject}", "About {subject}. {content}?")


def terse_wordings(prompt: Prompt, subject: str) -> list[Prompt]:
    """Return wordings of a prompt that consist of its subject and its other content words.

    They represent the rephrasings of a fact, which share these words and little else. A prompt without content words other than
    its subject has none.
    """
    words = prompt_words(prompt)
    rest = re.findall(r"[^\s?.,!;:\"]+", words.replace(subject, " "))
    content = " ".join(word for word in rest if word.lower() not in NOT_NAMES)
    if subject not in words or not content:
        return []
    texts = [wording.format(subject=subject, content=content) for wording in WORDINGS]
    if isinstance(prompt, str):
        return list(texts)
    *earlier, last = as_messages(prompt)
    return [(*earlier, Message(last.role, text)) for text in texts]


# Function words, which are not names even if they are capitalised.
OPENERS = """
a an the in on at of by for from to is are was were did does do has have had can could would
which what who whom whose when where why how name tell it this that these those he she they i we you
"""
NOT_NAMES = frozenset(OPENERS.split())


def subject_candidates(prompt: Prompt) -> list[str]:
    """List spans of a prompt that may be its subject: quoted titles and capitalised names, or else short runs of words."""
    words = prompt_words(prompt)
    quoted = re.findall(r"[\"“‘]([^\"”’]{2,60})[\"”’]", words)
    capitalised = r"(?:[A-Z][\w'’.-]*|\d[\w.-]*)"
    link = r"(?:\s+(?:of|the|de|von|van|and|&|la|le|al|for|in)){0,2}\s+"
    runs = [
        match.group() for match in re.finditer(rf"{capitalised}(?:{link}{capitalised})*", words)
    ]
    names = [_without_openers(run) for run in runs]
    found = [name.rstrip(".,;:?!") for name in [*quoted, *names] if name]
    if found:
        return list(dict.fromkeys(name for name in found if len(name) > 1))
    return list(dict.fromkeys(_word_runs(words, longest=3)))


def _without_openers(run: str) -> str:
    """Remove leading function words from a run of capitalised words."""
    words = run.split()
    while words and words[0].lower().rstrip(".,") in NOT_NAMES:
        words = words[1:]
    return run[run.index(words[0]) :] if words else ""


def _word_runs(words: str, longest: int) -> Sequence[str]:
    """List the runs of at most `longest` words that neither begin nor end with a function word."""
    spans = [(match.start(), match.end()) for match in re.finditer(r"[^\s?.,!;:]+", words)]
    names = [words[start:end].lower() not in NOT_NAMES for start, end in spans]
    runs = []
    for first, (start, _) in enumerate(spans):
        for last in range(first, min(first + longest, len(spans))):
            if names[first] and names[last]:
                runs.append(words[start : spans[last][1]])
    return runs
