"""Text for the language tasks: tokens, packed into sequences of one length."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt16

from gmn_lopt.meta.task import evenly_spaced
from gmn_lopt.tasks.data import Split, train_valid
from gmn_lopt.tasks.data.cache import Arrays, DataError, cache_path, cached
from gmn_lopt.tasks.data.tfds import read_splits, resolved

VERSION = 1  # of the cached arrays: raise it whenever what `_build` makes changes
UNKNOWN, END_OF_TEXT = 0, 1  # tokens of every subword vocabulary


def load_tokens(name: str, vocabulary: int, documents: int, data_dir: str | None = None) -> Mapping[str, np.ndarray]:
    """The splits of a TensorFlow Datasets text data set, tokenised with a subword vocabulary made for it.

    The vocabulary is SentencePiece's byte-pair encoding of the training documents: the same documents give the same
    vocabulary, byte for byte. It is kept beside the tokens, so a cached data set needs no package and never changes.

    Args:
        name: the data set's name in TensorFlow Datasets; its examples hold a ``"text"``.
        vocabulary: number of tokens, at most 65,536.
        documents: number of documents read of each split, from its beginning; all, if it has fewer.
        data_dir: TensorFlow Datasets directory to read from; None for the cached arrays, wherever they came from, or
            else TensorFlow Datasets' default directory.

    Returns:
        ``"train"`` and ``"test"``: all documents of the split one after the other, each with an end-of-text token
        behind it, uint16 ``[tokens]``. ``"tokenizer"``: the vocabulary, uint8, as in
        ``sentencepiece.SentencePieceProcessor(model_proto=tokenizer.tobytes())``.

    Raises:
        DataError: the data set is neither cached nor prepared, and could not be brought, or sentencepiece is missing.
        ValueError: the documents cannot fill such a vocabulary, or not even spell out their characters with it.
    """
    source = resolved(data_dir)
    kept = f"{name}-{documents}-bpe{vocabulary}"
    return cached(
        kept,
        VERSION,
        build=lambda: _build(name, vocabulary, documents, source, cache_path(kept)),
        check=lambda arrays: _check(arrays, vocabulary),
        source=source,
    )


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> bytes:
    """A subword vocabulary for some documents, as SentencePiece stores it.

    Raises:
        ValueError: see :func:`load_tokens`.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            unk_id=UNKNOWN,
            eos_id=END_OF_TEXT,
            bos_id=-1,  # none: the end of one text is the beginning of the next
            pad_id=-1,  # none: sequences are packed
            num_threads=1,  # their number would be part of what is stored
            minloglevel=2,  # quiet
        )
    except RuntimeError as error:
        what = f"no vocabulary of {vocabulary} tokens for these {len(documents)} documents"
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from None
    return model.getvalue()


def tokenize(documents: Sequence[str], tokenizer: bytes) -> UInt16[np.ndarray, "tokens"]:
    """The documents one after the other, each with an end-of-text token behind it."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    return np.concatenate([np.asarray(ids, np.uint16) for ids in processor.encode(list(documents), add_eos=True)])


def language_data(
    training: Integer[np.ndarray, "tokens"], test: Integer[np.ndarray, "others"], length: int, test_sequences: int
) -> dict[str, Split]:
    """Pack the token streams of both splits into ``"train"``, ``"valid"`` and ``"test"``, as :func:`pack` does.

    Args:
        training: tokens of the training split, of whose sequences 80 % are for training.
        test: tokens of the test split.
        length: tokens that a sequence predicts.
        test_sequences: number of sequences that evaluation looks at, evenly spaced over the test split; all, if it has
            fewer.

    Raises:
        ValueError: a stream is too short.
    """
    splits, others = train_valid(pack(training, length)), pack(test, length)
    if not len(splits["train"]["input"]) or not len(others["input"]):
        raise ValueError(f"too little text for sequences of {length} tokens: {len(training)} and {len(test)} tokens")
    return {**splits, "test": evenly_spaced(others, test_sequences)}


def pack(tokens: Integer[np.ndarray, "tokens"], length: int) -> Split:
    """Cut a stream into sequences that predict each token but the first exactly once, in pieces of ``length``.

    Documents run on from one sequence to the next and several may share one; what is left over at the end is dropped.

    Returns:
        ``{"input": int32 [sequences, length], "target": int32 [sequences, length]}``, the target of each token being
        the next one.
    """
    count = (len(tokens) - 1) // length
    tokens = tokens[: count * length + 1].astype(np.int32)
    return {"input": tokens[:-1].reshape(count, length), "target": tokens[1:].reshape(count, length)}


def _build(name: str, vocabulary: int, documents: int, data_dir: str | None, kept: Path) -> Arrays:
    """Read the text, make the vocabulary and tokenise."""
    try:
        import sentencepiece  # noqa: F401  # before the data set is brought, which may take long
    except ImportError as error:
        raise DataError(f"tokenising {name!r} needs sentencepiece: pip install 'gmn_lopt[datasets]'") from error
    text = read_splits(name, data_dir, kept, lambda source: _read(source, documents))
    tokenizer = train_tokenizer(text["train"], vocabulary)
    tokens = {split: tokenize(text[split], tokenizer) for split in ("train", "test")}
    return {**tokens, "tokenizer": np.frombuffer(tokenizer, np.uint8)}


def _read(source, documents: int, chunk: int = 1000) -> list[str]:
    """The text of the first documents of a ``tfds.data_source``, read as in :func:`gmn_lopt.tasks.data.images.read`."""
    count = min(len(source), documents)
    chunks = (list(range(start, min(start + chunk, count))) for start in range(0, count, chunk))
    return [example["text"].decode() for numbers in chunks for example in source.__getitems__(numbers)]


def _check(arrays: Arrays, vocabulary: int) -> None:
    """Raise ValueError where arrays are not what `_build` makes."""
    if set(arrays) != {"train", "test", "tokenizer"}:
        raise ValueError(f"it holds {sorted(arrays)}, expected test, tokenizer and train")
    for key, array in arrays.items():
        dtype = np.uint8 if key == "tokenizer" else np.uint16
        if array.dtype != dtype or array.ndim != 1 or not len(array):
            raise ValueError(f"{key}: {array.dtype} {array.shape}, expected some {np.dtype(dtype)} (n,)")
    for split in ("train", "test"):
        if arrays[split].max() >= vocabulary:
            raise ValueError(f"{split}: tokens are not in 0..{vocabulary - 1}")
