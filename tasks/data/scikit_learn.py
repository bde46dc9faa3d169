"""Data that come with scikit-learn: images of digits, and tables."""

from functools import partial
from types import ModuleType

import numpy as np

from gmn_lopt.tasks.data import Dataset, Split, train_valid
from gmn_lopt.tasks.data.cache import DataError


def load_digits(data_dir: str | None = None) -> dict[str, Split]:
    """The splits, ``{"image": float32 [examples, 64] in [0, 1], "label": int32 [examples]}`` each.

    Raises:
        DataError: scikit-learn is not installed.
    """
    del data_dir
    images, labels = _scikit_learn().load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))  # the generator whose stream NumPy has frozen
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    test = {"image": images[1437:], "label": labels[1437:]}
    return {**train_valid({"image": images[:1437], "label": labels[:1437]}), "test": test}


def load_table(name: str, regression: bool, data_dir: str | None = None) -> dict[str, Split]:
    """The splits, ``{"row": float32 [rows, columns], "target": int32 or float32 [rows]}`` each.

    A fifth of the rows is ``"test"``. Columns, and the target of a regression, are standardised by the training split.

    Raises:
        DataError: scikit-learn is not installed.
    """
    del data_dir
    rows, targets = getattr(_scikit_learn(), f"load_{name}")(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(targets))
    rows, targets = rows[order], targets[order]
    count = len(targets) // 5
    train = train_valid({"row": rows[count:], "target": targets[count:]})["train"]
    rows = ((rows - train["row"].mean(0)) / train["row"].std(0)).astype(np.float32)
    if regression:
        targets = (targets - train["target"].mean()) / train["target"].std()
    targets = targets.astype(np.float32 if regression else np.int32)
    splits = train_valid({"row": rows[count:], "target": targets[count:]})
    return {**splits, "test": {"row": rows[:count], "target": targets[:count]}}


def _scikit_learn() -> ModuleType:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise DataError("these data come with scikit-learn: pip install 'gmn_lopt[train]'") from error
    datasets: ModuleType = sklearn.datasets
    return datasets


DIGITS = Dataset(load_digits, 10)
TABLES = {
    "breast_cancer": Dataset(partial(load_table, "breast_cancer", False), 2),
    "wine": Dataset(partial(load_table, "wine", False), 3),
    "diabetes": Dataset(partial(load_table, "diabetes", True), None),
}
