"""MLPs on tables that come with scikit-learn: tasks that no shipped optimizer has been meta-trained on.

``breast_cancer`` (569 tumours, 30 measurements, 2 classes), ``wine`` (178 wines, 13 measurements, 3 classes) and
``diabetes`` (442 patients, 10 measurements, a progression score: regression). Columns, and the score, are standardised
by the training split. A fifth is the test split, the rows shuffled once, always alike.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta.task import Task
from tasks._cache import DataError
from tasks._images import train_valid

CLASSES = {"breast_cancer": 2, "wine": 3, "diabetes": None}  # None: regression


def make(
    data_dir: str | None = None,
    *,
    data: str = "breast_cancer",
    hidden: tuple[int, ...] = (32, 32),
    batch_size: int = 64,
    horizon: int = 500,
) -> Task:
    """A network with tanh units.

    Args:
        data_dir: not used, the tables come with scikit-learn.
        data: ``"breast_cancer"``, ``"wine"`` or ``"diabetes"``.
        hidden: widths of the hidden layers.
        batch_size: rows per batch, drawn with replacement.
        horizon: number of training steps.
    """
    del data_dir
    if data not in CLASSES:
        raise ValueError(f"unknown data {data!r}; choose one of {', '.join(CLASSES)}")
    if min(*hidden, batch_size, horizon) < 1:
        raise ValueError("hidden, batch_size and horizon must be at least 1")
    splits, classes = load(data), CLASSES[data]
    widths = (splits["train"]["row"].shape[1], *hidden, classes or 1)

    def init(key: jax.Array) -> PyTree:
        params = {}
        for i, layer_key in enumerate(jax.random.split(key, len(widths) - 1)):
            kernel = jax.nn.initializers.lecun_normal()(layer_key, widths[i : i + 2])
            params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(widths[i + 1])}
        return params

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        x = batch["row"]
        for i in range(len(params)):
            x = jnp.tanh(x) if i > 0 else x
            x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        if classes is None:
            return jnp.mean((x[:, 0] - batch["target"]) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["target"]).mean()

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index = jax.random.randint(key, (batch_size,), 0, len(split["target"]))
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0, mode="clip"), split)

    # A regression that knows nothing has the score's variance, 1, for its loss.
    cap = 1.5 * (1.0 if classes is None else math.log(classes))
    return Task("tabular_mlp", horizon, batch_size, cap, splits, init, loss, sample)


def load(data: str) -> dict[str, dict[str, np.ndarray]]:
    """The splits, ``{"row": float32 [rows, columns], "target": int32 or float32 [rows]}`` each."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("task 'tabular_mlp' needs scikit-learn: pip install 'gmn_lopt[train]'") from error
    rows, targets = getattr(datasets, f"load_{data}")(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(targets))  # the generator whose stream NumPy has frozen
    rows, targets = rows[order], targets[order]
    count = len(targets) // 5
    known = {"row": rows[count:], "target": targets[count:]}
    train = train_valid(known)["train"]
    rows = ((rows - train["row"].mean(0)) / train["row"].std(0)).astype(np.float32)
    if CLASSES[data] is None:
        targets = ((targets - train["target"].mean()) / train["target"].std()).astype(np.float32)
    targets = targets.astype(np.float32 if CLASSES[data] is None else np.int32)
    splits = train_valid({"row": rows[count:], "target": targets[count:]})
    return {**splits, "test": {"row": rows[:count], "target": targets[:count]}}
