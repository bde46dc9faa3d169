import os
import threading

import jax
import jax.numpy as jnp
import pytest
from threadpoolctl import threadpool_info

from gmn_lopt.util import threads
from gmn_lopt.util.threads import one_blas_thread, one_core


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def affinities() -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in threads._threads()]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_all_threads_are_kept_on_one_core_and_let_go_again():
    jnp.linalg.cholesky(jnp.eye(3)).block_until_ready()  # JAX has started its threads
    stop = threading.Event()
    before, blas = affinities(), blas_threads()
    with one_core() as kept:
        assert kept
        assert len(set.union(*affinities())) == 1
        assert blas_threads() == {1}
        within = threading.Thread(target=stop.wait)
        within.start()
    assert affinities()[: len(before)] == before
    assert set.union(*affinities()) == os.sched_getaffinity(0) == set.union(*before)
    assert blas_threads() == blas
    stop.set()
    within.join()
    jax.block_until_ready(jnp.ones(3) + 1)


def test_where_affinity_cannot_be_set_it_says_so(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with one_core() as kept:
        assert not kept


def test_the_user_decides_on_blas_threads(monkeypatch):
    called = []
    monkeypatch.setattr(threads, "threadpool_limits", lambda limit, user_api: called.append((limit, user_api)))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    one_blas_thread()
    assert called == []
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    one_blas_thread()
    assert called == [(1, "blas")]
