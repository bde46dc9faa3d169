"""MLPs on tables that come with scikit-learn: tasks that no shipped optimizer has been meta-trained on.

``breast_cancer`` (569 tumours, 30 measurements, 2 classes), ``wine`` (178 wines, 13 measurements, 3 classes) and
``diabetes`` (442 patients, 10 measurements, a progression score: regression). Columns, and the score, are standardised
by the training split. A fifth is the test split, the rows shuffled once, always alike.
"""

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data.scikit_learn import TABLES
from gmn_lopt.tasks.mlp import make_mlp


def make(
    data_dir: str | None = None,
    *,
    data: str = "breast_cancer",
    hidden: tuple[int, ...] = (32, 32),
    batch_size: int = 64,
    horizon: int = 500,
    activation: str = "tanh",
) -> Task:
    """A network with tanh units on ``"breast_cancer"``, ``"wine"`` or ``"diabetes"``.

    The other settings are those of :func:`gmn_lopt.tasks.mlp.make_mlp`; ``data_dir`` is not used.
    """
    if data not in TABLES:
        raise ValueError(f"unknown data {data!r}; choose one of {', '.join(TABLES)}")
    table = TABLES[data]
    return make_mlp("tabular_mlp", table, hidden=hidden, batch_size=batch_size, horizon=horizon, activation=activation)
