"""Runs over two processes on this machine; each process has one device."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gmn_lopt.meta.processes import LOST, connected
from gmn_lopt.util.errors import UsageError

ROOT = Path(__file__).parent.parent
STEPS = 12
SMALL = ["--task", "digits_mlp", "--optimizer", "ds", "--optimizer.residual.network.width", "4", "--horizon", "20"]
SMALL += ["--stage", f"pes:meta_steps={STEPS},learning_rate=1e-2,truncation=10,pairs=2"]
SMALL += ["--log-every", "2", "--checkpoint-every", "4", "--keep", "9"]
ENDLESS = ["--task", "linear_regression", "--optimizer", "sgdm"]
ENDLESS += [
    "--checkpoint-every",
    "1000000",
    "--stage",
    "pes:meta_steps=1000000,learning_rate=1e-2,truncation=2,pairs=4",
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


class Run:
    """Processes of one run; those that are left are killed at the end."""

    def __init__(self, *args, count=2, each=((), ()), devices=(1, 1)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        for i in range(count):
            command = [sys.executable, "meta_train.py", *map(str, args), *each[i]]
            if count > 1:
                command += ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process-id", str(i)]
            flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices[i]}"
            env = {**os.environ, "XLA_FLAGS": flags}
            self.processes.append(subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, env=env))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait(self):
        """Exit codes and what was written to stderr."""
        stderr = [process.communicate(timeout=240)[1] for process in self.processes]
        return [process.returncode for process in self.processes], stderr

    def after_rows(self, out, count):
        """Wait until so many rows have been logged."""
        file = out / "metrics.jsonl"
        while not (file.exists() and file.read_text().count("\n") >= count):
            assert all(process.poll() is None for process in self.processes), self.wait()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run, by one process and by two."""
    root = tmp_path_factory.mktemp("runs")
    for name, count in (("one", 1), ("two", 2)):
        with Run(*SMALL, "--out", root / name, count=count) as run:
            codes, stderr = run.wait()
        assert codes == [0] * count, stderr
    assert "2 cpu device(s)" in stderr[0]
    assert stderr[1] == "", "only the first process writes"
    return root


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_alike(a, b):
    restore = ocp.StandardCheckpointer().restore
    states = [restore(run / "checkpoints" / str(STEPS) / "default") for run in (a, b)]
    # Adam takes steps of 1e-2 also where the gradient is all but 0, and so enlarges what rounding leaves there.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=5e-4), *states)


def test_two_processes_compute_what_one_does(runs):
    check_alike(runs / "one", runs / "two")
    for a, b in zip(rows(runs / "one"), rows(runs / "two"), strict=True):
        assert a["meta_step"] == b["meta_step"]
        for name in ("loss", "gradient_norm", "gradient_noise", "alpha", "truncation_loss"):
            rtol = 1e-4 if a["meta_step"] == 2 else 1e-2  # from the first update on, see check_alike
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, err_msg=name)
    assert (runs / "two" / "COMPLETE").exists()
    assert {"coordinator", "processes", "process_id"}.isdisjoint(
        json.loads((runs / "two" / "config.json").read_text())["settings"]
    )


@pytest.mark.parametrize(("before", "after"), [("one", 2), ("two", 1)])
def test_another_number_of_processes_resumes(runs, tmp_path, before, after):
    out = tmp_path / "run"
    shutil.copytree(runs / before, out)
    (out / "COMPLETE").unlink()
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / str(step))
    with Run("--out", out, "--resume", count=after) as run:
        codes, stderr = run.wait()
    assert codes == [0] * after, stderr
    check_alike(out, runs / "one")


def test_a_signal_to_any_process_stops_all_at_the_same_meta_step(tmp_path):
    out = tmp_path / "run"
    with Run(*ENDLESS, "--out", out) as run:
        run.after_rows(out, 2)
        run.processes[1].send_signal(signal.SIGTERM)
        codes, stderr = run.wait()
    assert codes == [0, 0], stderr
    (last,) = [path.name for path in (out / "checkpoints").iterdir()]
    assert f"interrupted at meta-step {last} of" in stderr[0]
    assert "Traceback" not in "".join(stderr)


def test_a_number_of_processes_that_does_not_divide_the_pairs_is_refused(tmp_path):
    with Run(*ENDLESS[:-1], "pes:truncation=2,pairs=3", "--out", tmp_path / "run") as run:
        codes, stderr = run.wait()
    assert codes == [2, 2], stderr
    assert "3 pairs or unrolls cannot be shared evenly by 2 processes; choose a multiple of 2" in stderr[0]
    assert not (tmp_path / "run").exists()


def test_processes_with_different_numbers_of_devices_are_refused(tmp_path):
    with Run(*ENDLESS, "--out", tmp_path / "run", devices=(1, 2)) as run:
        codes, stderr = run.wait()
    assert codes == [2, 2], stderr
    assert stderr[0] == "meta_train.py: every process needs as many devices; they have 1, 2\n"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_with_one_line(tmp_path, lost):
    out = tmp_path / "run"
    with Run(*ENDLESS, "--out", out) as run:
        run.after_rows(out, 2)
        run.processes[lost].kill()
        codes, stderr = run.wait()
    # The computation sees the loss at once, and so does JAX, which may abort the process first.
    assert codes[1 - lost] in (LOST, -signal.SIGABRT)
    ours = [line for line in stderr[1 - lost].splitlines() if line.startswith("meta_train.py:")]
    if codes[1 - lost] == LOST:
        assert ours == ["meta_train.py: another process was lost; start all of them again with --resume"]
    else:
        assert "JAX distributed service detected fatal errors" in stderr[1 - lost]
    assert "Traceback" not in stderr[1 - lost]


def test_processes_with_different_settings_are_refused(tmp_path):
    with Run(*ENDLESS, "--out", tmp_path / "run", each=((), ("--seed", "1"))) as run:
        codes, stderr = run.wait()
    assert codes == [2, 2], stderr
    for text in stderr:
        assert text.startswith("meta_train.py: the processes have different settings; give all"), text
        assert text.count("\n") == 1, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("host", 2, 0), "write HOST:PORT"),
        (("host:1", 2, None), "needs --processes and --process-id"),
        (("host:1", 2, 2), "must be from 0 to 1"),
    ],
)
def test_incomplete_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message), connected(*settings):
        pass
