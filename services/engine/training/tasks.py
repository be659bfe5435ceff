"""What self-play asks of the target besides its own instructions: first words of requests, and work on earlier output.

Owns: the wordings and how often each is used. Must not know: tokens, models. They are general kinds of work (say,
summarise, answer from a text, edit); what is worked on is always the target's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

OPENERS = (
    "Translate this sentence into English:",
    "Translate into German:",
    "Translate from French to English:",
    "Who",
    "What is",
    "When",
    "Where",
    "Why",
    "How many",
    "How do I",
    "Which",
    "Solve this problem step by step:",
    "If a",
    "Write a",
    "Write a Python function that",
    "Write a short story about",
    "Write an email to",
    "Explain",
    "Describe",
    "Compare",
    "List",
    "Give me",
    "Imagine you are",
    "Correct the grammar:",
    "Classify",
    "Extract",
    "Is it true that",
    "Suggest",
    "Calculate",
    "Name",
)

_FOLLOW_UPS = (
    "Summarize that in one sentence.",
    "Rewrite your answer for a ten-year-old.",
    "Make it shorter.",
    "Can you give an example?",
    "Now write it as a list of bullet points.",
    "Rewrite it in a more formal style.",
    "What is the most important point, and why?",
    "Continue.",
    "Explain the second point in more detail.",
    "Rewrite the same text, but change the ending.",
)

_ON_TEXT = (
    "Summarize the following text:\n\n{text}",
    "{text}\n\nSummarize the text above in three sentences.",
    "What is the main idea of this text?\n\n{text}",
    "Correct any mistakes in this text and return it otherwise unchanged:\n\n{text}",
    "Rewrite this text in simpler words:\n\n{text}",
    "Give this text a title and list its key points.\n\n{text}",
    "Repeat this text, replacing every name by another one:\n\n{text}",
    "Translate this text into French:\n\n{text}",
)

_QUESTION_ON_TEXT = (
    "Answer the question from these texts.\n\n{text}\n\nQuestion: {question}",
    "{text}\n\nBased on the text above, answer this: {question}",
    "Context:\n{text}\n\nQuestion: {question}\nAnswer:",
)


class Kind(Enum):
    """How a conversation starts; while there is little to quote, those that quote are FREE instead."""

    FREE = "free"
    OPENED = "opened"
    ON_TEXT = "on text"
    QUESTION = "question"


KIND_SHARES = {Kind.FREE: 0.45, Kind.OPENED: 0.25, Kind.ON_TEXT: 0.15, Kind.QUESTION: 0.15}


def draw_kind(rng: np.random.Generator) -> Kind:
    return list(KIND_SHARES)[rng.choice(len(KIND_SHARES), p=list(KIND_SHARES.values()))]


def opener(rng: np.random.Generator) -> str:
    return str(rng.choice(OPENERS))


def follow_up(rng: np.random.Generator) -> str:
    return str(rng.choice(_FOLLOW_UPS))


def on_text(rng: np.random.Generator, text: str) -> str:
    """A request to work on `text`."""
    return str(rng.choice(_ON_TEXT)).format_map({"text": text})


def question_on(rng: np.random.Generator, texts: Sequence[str], question: str) -> str:
    """A question to be answered from `texts`, in an order of chance."""
    shuffled = [texts[i] for i in rng.permutation(len(texts))]
    return str(rng.choice(_QUESTION_ON_TEXT)).format_map({"text": "\n\n".join(shuffled), "question": question})
