"""The run directory of several processes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from gmn_lopt.meta.processes import from_first, in_any, is_first
from gmn_lopt.meta.run_directory import RunDirectory, RunError


class SharedRunDirectory:
    """A :class:`RunDirectory` that the first process has, and the others are told about.

    Only the first process reads and writes; states are gathered in it and sent from it. A checkpoint is therefore that
    of a single process and does not know of devices: any number of processes and devices can resume from it. All
    methods but :meth:`log` must be called by all processes.

    Args:
        path: the directory.
        begin: opens the directory.

    Raises:
        RunError: the first process cannot open it.
    """

    def __init__(self, path: Path, begin: Callable[[], RunDirectory]):
        self.path = path
        self._run: RunDirectory | None = self._in_first(begin)
        mine = [self._run.latest, self._run.complete] if self._run else [0, 0]
        latest, complete = from_first(np.asarray(mine, np.uint32))
        self.latest, self.complete = int(latest), bool(complete)

    def mark_complete(self, meta_step: int) -> None:
        """See :meth:`RunDirectory.mark_complete`."""
        self._in_first(lambda: self._opened.mark_complete(meta_step))

    def log(self, row: Mapping[str, Any]) -> None:
        """See :meth:`RunDirectory.log`."""
        if self._run:
            self._run.log(row)

    def save(self, meta_step: int, state: PyTree) -> None:
        """See :meth:`RunDirectory.save`; the state is spread over the processes."""
        whole = multihost_utils.process_allgather(state, tiled=True)
        self._in_first(lambda: self._opened.save(meta_step, whole))
        self.latest = meta_step

    def restore(self, like: PyTree) -> PyTree:
        """See :meth:`RunDirectory.restore`; the state that is returned is spread like ``like``."""
        here = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
        state = self._in_first(lambda: self._opened.restore(abstract))

        def spread(x: jax.Array, mine: Any) -> jax.Array:
            whole = from_first(np.empty(x.shape, x.dtype) if mine is None else np.asarray(mine))
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])

        if state is None:
            return jax.tree.map(lambda x: spread(x, None), like)
        return jax.tree.map(spread, like, state)

    def close(self) -> None:
        """See :meth:`RunDirectory.close`."""
        if self._run:
            self._run.close()

    @property
    def _opened(self) -> RunDirectory:
        assert self._run is not None, "only the first process has it"
        return self._run

    def _in_first(self, action: Callable[[], Any]) -> Any:
        """Do it in the first process; where it fails there, fail in all."""
        result, error = None, None
        if is_first():
            try:
                result = action()
            except RunError as failure:
                error = failure
        if in_any(error is not None):
            raise error or RunError("process 0 could not go on; its own message says why")
        return result
