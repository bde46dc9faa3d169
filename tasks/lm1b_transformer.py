"""A small transformer on sentences of the One Billion Word benchmark (LM1B), as subword tokens.

The default vocabulary of 1,000 tokens fits a corpus of some ten thousand sentences: each token occurs 600 times on
average, and a run of 5,000 steps takes less text than there is. The paper-sized one is ``vocabulary=32000``, with the
whole data set.
"""

from functools import partial

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data.text import load_tokens
from gmn_lopt.tasks.transformer import Transformer, language_task


def make(
    data_dir: str | None = None,
    *,
    vocabulary: int = 1000,
    length: int = 8,
    width: int = 32,
    heads: int = 4,
    feed_forward: int = 128,
    blocks: int = 2,
    batch_size: int = 8,
    horizon: int = 5000,
    sentences: int = 200_000,
    test_sequences: int = 1000,
) -> Task:
    """Two blocks of width 32, with untied output.

    Settings, besides the sizes of :class:`gmn_lopt.tasks.transformer.Transformer` and those of
    :func:`gmn_lopt.tasks.transformer.language_task`:

    Args:
        data_dir: TensorFlow Datasets directory that holds ``lm1b``; see :func:`gmn_lopt.tasks.data.text.load_tokens`.
        sentences: number of sentences taken of each split, from its beginning: the whole data set has 30 million, of
            which these many steps see few.
    """
    model = Transformer(vocabulary, length, width, heads, feed_forward, blocks)
    if sentences < 1:
        raise ValueError("sentences must be at least 1")
    if vocabulary > 2**16:
        raise ValueError(f"vocabulary must be at most 65536, is {vocabulary}: tokens are kept in two bytes")
    load = partial(load_tokens, "lm1b", vocabulary, sentences, data_dir)
    return language_task("lm1b_transformer", model, load, batch_size, horizon, test_sequences)
