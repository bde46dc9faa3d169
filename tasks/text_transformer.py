"""A very small transformer on the Python language reference, character by character: no download.

The text is what ``help("if")`` prints: ``pydoc_data.topics``, which comes with Python, some 350,000 characters of
English with a little grammar and code. Topics quote each other, so paragraphs are the documents and each is kept once.
There is no official test split: paragraphs are shuffled once, always alike; 80 % are the training split.

The reference changes from one Python to the next, and so do numbers: compare those of one version only.
"""

import numpy as np
from jaxtyping import UInt8

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data.cache import DataError
from gmn_lopt.tasks.transformer import Transformer, language_task

VOCABULARY = 128  # ASCII, of which 0 ends a paragraph


def make(
    data_dir: str | None = None,
    *,
    length: int = 8,
    width: int = 16,
    heads: int = 2,
    feed_forward: int = 64,
    blocks: int = 2,
    batch_size: int = 8,
    horizon: int = 500,
    test_sequences: int = 500,
) -> Task:
    """Two blocks of width 16, with untied output.

    Settings are the sizes of :class:`gmn_lopt.tasks.transformer.Transformer`, whose tokens are characters here, and
    those of :func:`gmn_lopt.tasks.transformer.language_task`. The text comes with Python: ``data_dir`` is not used.
    """
    model = Transformer(VOCABULARY, length, width, heads, feed_forward, blocks)
    return language_task("text_transformer", model, load, batch_size, horizon, test_sequences, unit="characters")


def load() -> dict[str, UInt8[np.ndarray, "characters"]]:
    """The paragraphs of the ``"train"`` and of the ``"test"`` split, one after the other, as ASCII codes.

    Raises:
        DataError: this Python has no language reference.
    """
    documents = paragraphs()
    order = np.random.RandomState(0).permutation(len(documents))  # the generator whose stream NumPy has frozen
    cut = len(order) * 4 // 5
    parts = {"train": order[:cut], "test": order[cut:]}
    return {split: characters([documents[i] for i in part]) for split, part in parts.items()}


def paragraphs() -> list[str]:
    """The paragraphs of the language reference, each once and on one line, in order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("task 'text_transformer' needs the module pydoc_data, which this Python lacks") from error
    lines = (" ".join(part.split()) for _, text in sorted(topics.items()) for part in text.split("\n\n"))
    return list(dict.fromkeys(line for line in lines if line))


def characters(documents: list[str]) -> UInt8[np.ndarray, "characters"]:
    """The documents as ASCII codes, 0 behind each; other characters become question marks."""
    return np.frombuffer("".join(f"{text}\0" for text in documents).encode("ascii", "replace"), np.uint8)
