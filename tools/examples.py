"""The table of examples in docs/examples.md: what each trains, and how many held-out images it then gets right.

python -m tools.examples            runs all, from three seeds each, and writes the table
python -m tools.examples NAME ...   runs some, and prints their rows

Each example has a process of its own. Its time is that of all processors together, from the start of Python to the end
of the first seed: imports and compilation are in it, and what else the machine does is not. The other seeds take their
compiled programs from a cache.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "examples.md"
START, END = "<!-- table: python -m tools.examples -->", "<!-- end -->"
SEEDS = 3
EXAMPLES = {
    "linen": "flax.linen, `TrainState` | residual network, batch normalisation",
    "nnx": "flax.nnx, `Optimizer` | convolutions, batch normalisation, dropout",
    "equinox": "Equinox | vision transformer",
    "haiku": "Haiku, with state | convolutions, batch normalisation",
    "cnn": "flax.linen, optax's loop | convolutions, layer normalisation",
    "optax": "plain `jax.numpy`, `multi_steps` | recurrent network under `scan`",
    "shard_map": "flax.linen, eight devices | convolution, group normalisation",
}


def main(names: list[str]) -> None:
    """Run the examples, then write the table or print rows."""
    rows = ["| example | package | model | accuracy | lowest | processor seconds |", "|---|---|---|---:|---:|---:|"]
    for name in names or EXAMPLES:
        command = [sys.executable, "-c", f"from tools.examples import measure; measure({name!r})"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        own = found["accuracy"]
        mean, lowest = f"{100 * sum(own) / len(own):.1f} %", f"{100 * min(own):.1f} %"
        rows.append(f"| `{name}_digits.py` | {EXAMPLES[name]} | {mean} | {lowest} | {found['seconds']:.0f} |")
        print(rows[-1], flush=True)
    if not names:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}\n\n" + "\n".join(rows) + f"\n\n{END}" + rest.partition(END)[2])


def measure(name: str) -> None:
    """Print the accuracies of an example, and the time of the first, as JSON."""
    import importlib

    import jax

    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        example = importlib.import_module(f"examples.{name}_digits")
        accuracy, seconds = [example.main()], time.process_time()
        accuracy += [example.main(seed=seed) for seed in range(1, SEEDS)]
        print(json.dumps({"accuracy": accuracy, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1:])
