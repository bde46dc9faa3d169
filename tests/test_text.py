"""The language tasks: tokens, packing, the model, and the tasks themselves."""

import functools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gmn_lopt
from gmn_lopt.factors.value_and_grad import value_grad_and_extra
from gmn_lopt.meta.task import task_structure
from gmn_lopt.tasks import load_task, text_transformer
from gmn_lopt.tasks.data import text as reading
from gmn_lopt.tasks.data.cache import DataError
from gmn_lopt.tasks.data.text import END_OF_TEXT, UNKNOWN, language_data, load_tokens, pack, tokenize, train_tokenizer
from gmn_lopt.tasks.transformer import Transformer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
SMALL = {"width": 8, "heads": 2, "feed_forward": 12, "blocks": 1, "batch_size": 4, "length": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GMN_LOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@functools.cache
def sentences() -> list[str]:
    return [text for text in text_transformer.paragraphs() if text.isascii()][:300]


# Packing


@pytest.mark.parametrize("tokens, length", [(41, 5), (40, 5), (44, 5), (9, 8), (8, 8), (1, 3), (0, 3), (7, 1)])
def test_every_token_but_the_first_is_predicted_once(tokens, length):
    stream = np.arange(100, 100 + tokens, dtype=np.uint16)
    packed = pack(stream, length)
    count = max(0, tokens - 1) // length
    assert packed["input"].shape == packed["target"].shape == (count, length)
    np.testing.assert_array_equal(packed["target"].ravel(), stream[1 : 1 + count * length])
    np.testing.assert_array_equal(packed["target"], packed["input"] + 1)
    assert packed["input"].dtype == np.int32


def test_splits_of_a_stream():
    data = language_data(np.arange(1001, dtype=np.uint16), np.arange(2000, 2301, dtype=np.uint16), 10, 7)
    assert {key: len(split["input"]) for key, split in data.items()} == {"train": 80, "valid": 20, "test": 7}
    np.testing.assert_array_equal(data["train"]["input"][:, 0], np.arange(0, 800, 10))
    np.testing.assert_array_equal(data["valid"]["input"][:, 0], np.arange(800, 1000, 10))
    first = data["test"]["input"][:, 0] - 2000  # of 30 sequences, the same seven every time
    np.testing.assert_array_equal(first, [0, 40, 80, 120, 170, 210, 250])
    everything = language_data(np.arange(1001, dtype=np.uint16), np.arange(301, dtype=np.uint16), 10, 10**6)
    assert len(everything["test"]["input"]) == 30
    for streams in ((5, 301), (301, 5)):
        with pytest.raises(ValueError, match="too little text for sequences of 10 tokens"):
            language_data(*(np.arange(n, dtype=np.uint16) for n in streams), 10, 7)


# Subwords


def test_the_vocabulary_is_the_same_byte_for_byte():
    pytest.importorskip("sentencepiece")
    here = train_tokenizer(sentences(), 200)
    code = (
        "import sys; from gmn_lopt.tasks.data.text import train_tokenizer; from tests.test_text import sentences; "
        "sys.stdout.buffer.write(train_tokenizer(sentences(), 200))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parents[1]
    ).stdout
    assert here == elsewhere
    assert here != train_tokenizer(sentences()[:-1], 200)


def test_tokens_give_back_the_text():
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = train_tokenizer(sentences(), 200)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    assert processor.get_piece_size() == 200
    tokens = tokenize(sentences(), tokenizer)
    assert tokens.dtype == np.uint16 and tokens.max() < 200
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    documents = np.split(tokens, ends + 1)
    assert len(ends) == len(sentences()) and not len(documents[-1])
    spelt = [(text, document) for text, document in zip(sentences(), documents) if UNKNOWN not in document]
    assert len(spelt) > 0.9 * len(sentences())  # the rarest characters are left out
    assert [processor.decode(document[:-1].tolist()) for _, document in spelt] == [text for text, _ in spelt]
    assert len(tokens) < 0.7 * sum(map(len, sentences()))  # subwords, not characters
    assert (tokenize(["\N{SNOWMAN}"], tokenizer) == UNKNOWN).any()


def test_impossible_vocabularies_are_refused_in_one_line():
    pytest.importorskip("sentencepiece")
    for vocabulary in (10, 60_000):
        with pytest.raises(ValueError, match=f"no vocabulary of {vocabulary} tokens for these 300 documents") as error:
            train_tokenizer(sentences(), vocabulary)
        assert "\n" not in str(error.value)


# The data set


class Source(list):
    """Behaves like a ``tfds.data_source``."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def tfds(monkeypatch):
    """A module in place of ``tensorflow_datasets``, with 250 + 50 documents."""
    splits = {"train": sentences()[:250], "test": sentences()[250:]}
    builder = SimpleNamespace(
        is_prepared=lambda: True,
        as_data_source=lambda split: Source({"text": text.encode()} for text in splits[split]),
    )
    module = SimpleNamespace(builder=lambda name, data_dir=None: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_text_is_read_tokenised_and_cached(tfds, cache, tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    tokens = load_tokens("lm1b", 200, 10**6, str(tmp_path))
    assert tokens["tokenizer"].tobytes() == train_tokenizer(sentences()[:250], 200)
    for split, documents in (("train", sentences()[:250]), ("test", sentences()[250:])):
        np.testing.assert_array_equal(tokens[split], tokenize(documents, tokens["tokenizer"].tobytes()))
    fewer = load_tokens("lm1b", 200, 100)
    assert (fewer["train"] == END_OF_TEXT).sum() == 100 and (fewer["test"] == END_OF_TEXT).sum() == 50
    assert len(list(cache.iterdir())) == 2

    # A cached task needs neither package; sequences of any length are cut from the same file.
    monkeypatch.setattr(reading, "train_tokenizer", None)
    for name in ("tensorflow_datasets", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    for length in (8, 20):
        task = load_task("lm1b_transformer", str(tmp_path), vocabulary=200, sentences=10**6, length=length)
        inputs = np.concatenate([task.data[split]["input"] for split in ("train", "valid")])
        np.testing.assert_array_equal(inputs, pack(tokens["train"], length)["input"])
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["range", "dtype", "keys", "empty"])
def test_damaged_tokens_are_made_anew(tfds, cache, damage):
    pytest.importorskip("sentencepiece")
    good = dict(load_tokens("lm1b", 200, 100))
    (path,) = cache.iterdir()
    bad = {
        "range": {"train": np.full(9, 200, np.uint16)},
        "dtype": {"test": good["test"].astype(np.int32)},
        "keys": {"valid": good["test"]},
        "empty": {"test": good["test"][:0]},
    }[damage]
    np.savez(path, **{**good, **bad}, version=reading.VERSION, source="")
    with pytest.warns(UserWarning, match="is not used but made anew"):
        again = load_tokens("lm1b", 200, 100)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(again), good))


def test_what_is_missing_is_named_in_one_line(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(DataError, match=r"needs sentencepiece: pip install 'gmn_lopt\[datasets\]'$"):
            load_task("lm1b_transformer")
    monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"tfds\.builder\('lm1b'.*--data-dir") as error:
        load_task("lm1b_transformer", str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="pydoc_data, which this Python lacks"):
        load_task("text_transformer")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no prepared TensorFlow Datasets directory {REAL}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_sentences():
    sentencepiece = pytest.importorskip("sentencepiece", reason="tokenising needs the extra [datasets]")
    pytest.importorskip("tensorflow_datasets", reason="reading real data needs the extra [datasets]")
    tokens = load_tokens("lm1b", 1000, 1500, str(REAL))
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokens["tokenizer"].tobytes())
    for split in ("train", "test"):
        assert (tokens[split] == END_OF_TEXT).sum() == 1500
        assert (tokens[split] == UNKNOWN).mean() < 0.002
        assert 30 < len(tokens[split]) / 1500 < 60  # per sentence
    text = processor.decode(tokens["test"][:5000].tolist())
    assert sum(text.split().count(word) for word in ("the", "of", "and", "to")) > 0.08 * len(text.split())


# The model


def attention_in_numpy(query, key, value):
    """One head of one sequence, position by position."""
    out = np.zeros_like(value)
    for t in range(len(query)):
        scores = np.array([query[t] @ key[s] for s in range(t + 1)]) / math.sqrt(query.shape[1])
        weights = np.exp(scores - scores.max())
        out[t] = (weights / weights.sum()) @ value[: t + 1]
    return out


def logits_in_numpy(params, tokens, heads):
    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * layer["scale"] + layer["shift"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = params["token"][tokens] + params["position"]
    for i in range(sum(name.startswith("block_") for name in params)):
        block = params[f"block_{i}"]
        y = norm(block["norm_1"], x)
        parts = [np.split(dense(block[name], y), heads, axis=1) for name in ("query", "key", "value")]
        x = x + dense(block["attended"], np.concatenate([attention_in_numpy(*head) for head in zip(*parts)], axis=1))
        x = x + dense(block["down"], gelu(dense(block["up"], norm(block["norm_2"], x))))
    return dense(params["output"], norm(params["norm"], x))


def test_model_against_the_definition():
    model = Transformer(vocabulary=11, length=5, width=6, heads=2, feed_forward=7, blocks=2)
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)  # zeros and ones of biases and norms would hide mistakes
    leaves = [np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(tree, leaves)
    batch = {"input": rng.integers(0, 11, (3, 5)), "target": rng.integers(0, 11, (3, 5))}
    expected = np.stack([logits_in_numpy(params, tokens, 2) for tokens in batch["input"]])
    np.testing.assert_allclose(jax.jit(model.logits)(params, batch["input"]), expected, atol=1e-4)
    logged = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    loss = -np.take_along_axis(logged, batch["target"][..., None], -1).mean()
    np.testing.assert_allclose(jax.jit(model.loss)(params, batch), loss, rtol=1e-4)


def test_no_position_sees_the_future():
    model = Transformer(vocabulary=11, length=5, width=6, heads=2, feed_forward=7, blocks=2)
    params = model.init(jax.random.key(0))
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    logits, changed = (jax.jit(model.logits)(params, each) for each in (tokens, tokens.at[0, 3].set(9)))
    np.testing.assert_allclose(changed[0, :3], logits[0, :3], atol=1e-6)
    assert (jnp.abs(changed - logits)[0, 3:].max(axis=1) > 1e-3).all()


def test_initialisation():
    model = Transformer(vocabulary=500, length=300, width=64, heads=4, feed_forward=256, blocks=1)
    params = jax.jit(model.init)(jax.random.key(0))
    for name in ("token", "position"):
        np.testing.assert_allclose(np.std(params[name]), 1 / 8, rtol=0.03)
    for name, fan_in in (("query", 64), ("attended", 64), ("up", 64), ("down", 256)):
        np.testing.assert_allclose(np.std(params["block_0"][name]["kernel"]), fan_in**-0.5, rtol=0.05)
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if jax.tree_util.keystr(path[-1:]) == "['bias']"]
    assert len(biases) == 7 and not any(map(np.any, biases))


# The tasks


def test_paper_sizes(tfds):
    pytest.importorskip("sentencepiece")
    task = load_task("lm1b_transformer", vocabulary=200)
    assert (task.horizon, task.batch_size, task.loss_cap) == (5000, 8, pytest.approx(1.5 * math.log(200)))
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert params["token"].shape == (200, 32) and params["position"].shape == (8, 32)
    assert params["output"]["kernel"].shape == (32, 200)  # untied
    assert [name for name in params if name.startswith("block")] == ["block_0", "block_1"]
    assert params["block_1"]["up"]["kernel"].shape == (32, 128)
    assert jax.eval_shape(task.sample, jax.random.key(0), task.data["train"])["input"].shape == (8, 8)


def test_settings_reach_the_model():
    task = load_task("text_transformer", **SMALL, horizon=7, test_sequences=30)
    assert (task.horizon, task.batch_size, task.test_subset) == (7, 4, "30 sequences of 5 characters")
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert params["block_0"]["up"]["kernel"].shape == (8, 12) and "block_1" not in params
    assert task.data["test"]["input"].shape == (30, 5)


@pytest.mark.parametrize("name", ["lm1b_transformer", "text_transformer"])
def test_refused_settings(name):
    wrong = ["length", "width", "heads", "feed_forward", "blocks", "batch_size", "horizon", "test_sequences"]
    if name == "lm1b_transformer":
        wrong += ["vocabulary", "sentences"]
        with pytest.raises(ValueError, match="at most 65536"):
            load_task(name, vocabulary=2**17)
    for setting in wrong:
        with pytest.raises(ValueError, match="must be at least 1"):
            load_task(name, **{setting: 0})
    with pytest.raises(ValueError, match="heads must divide the width: 3 heads"):
        load_task(name, heads=3)


def test_documents_of_the_embedded_text():
    documents = text_transformer.paragraphs()
    assert len(set(documents)) == len(documents) > 1000
    words = " ".join(documents).lower().split()
    assert words.count("the") > 2000  # English
    codes = text_transformer.characters(["if a", "“b”"])
    assert codes.tobytes() == b"if a\0?b?\0"


def test_text_transformer_learns():
    """From the loss of guessing to below that of the characters' frequencies, on text it has not seen."""
    task = load_task("text_transformer")
    share = np.bincount(task.data["train"]["target"].ravel(), minlength=128) / task.data["train"]["target"].size
    entropy = -sum(p * math.log(p) for p in share if p)
    tx = optax.adam(5e-3)

    @jax.jit
    def train(params):
        def step(carry, t):
            params, state = carry
            batch = task.sample(jax.random.fold_in(jax.random.key(1), t), task.data["train"])
            updates, state = tx.update(jax.grad(task.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(300))[0][0]

    loss = jax.jit(task.loss)
    params = jax.jit(task.init)(jax.random.key(0))
    assert abs(loss(params, task.data["test"]) - math.log(128)) < 1
    assert loss(train(params), task.data["test"]) < entropy - 0.2


@pytest.mark.parametrize("optimizer", ["ds", "ds+gmn"])
def test_learned_optimizers_train_it(optimizer):
    task = load_task("text_transformer", **SMALL)
    small = gmn_lopt.GradMetaNetConfig(width=4, set_layers=1, product_width=4)
    residual = gmn_lopt.Residual(gradmetanet=gmn_lopt.SetReader(small) if optimizer == "ds+gmn" else None)
    lopt = gmn_lopt.LearnedOptimizer(task_structure(task), residual=residual)
    tx = lopt.optimizer(jax.jit(lopt.init)(jax.random.key(0)))
    params = jax.jit(task.init)(jax.random.key(0))
    batch = jax.tree.map(lambda array: array[:4], task.data["train"])

    def step(carry, _):
        params, state = carry
        loss, grads, extra = value_grad_and_extra(task.loss, lopt.needs_factors)(params, batch)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    losses = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=10)[1])(params)
    assert jnp.isfinite(losses).all() and losses[-1] < losses[0] - 0.1
