"""The table of model classes in docs/models.md: how much of each is factored, and whether factors give the gradient.

    python -m tools.zoo            makes build/zoo, an environment of its own, installs the packages, writes the table
    python -m tools.zoo NAME ...   prints the rows of some models

A package that cannot be installed, or a model that its package cannot build, has a row that says so.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ["brax", "diffrax", "dm-haiku", "equinox", "flowjax", "jraph", "transformers<4.50"]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- table: python -m tools.zoo -->", "<!-- end -->"


def main(names: list[str]) -> None:
    """Measure in the environment of the packages, then write the page."""
    place = ROOT / "build" / "zoo"
    python = str(place / "bin" / "python")
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        for package in [str(ROOT), *PACKAGES]:
            if subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=False).returncode:
                print(f"{package} cannot be installed", file=sys.stderr)
        (place / "ready").touch()
    command = [python, "-c", "from tools.zoo import measure; import sys; measure(sys.argv[1:])", *names]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lines = ["| package | class | kernels factored | entries factored | error of `reconstruct` | not factored |"]
    lines += ["|---|---|---:|---:|---:|---|"]
    lines += ["| {package} | `{name}` | {kernels} | {entries} | {error} | {odd} |".format(**row) for row in rows]
    if names:
        print("\n".join(lines))
        return
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n\n" + "\n".join(lines) + f"\n\n{END}" + rest.partition(END)[2])


def measure(names: list[str]) -> None:
    """Print one JSON object for each model."""
    from tools.zoo_models import MODELS

    for name, (package, build) in MODELS.items():
        if names and name not in names:
            continue
        row = {"package": package, "name": name.strip(), "kernels": "", "entries": "", "error": "", "odd": ""}
        try:
            row |= _row(*build())
        except Exception as error:  # whatever a package raises is said in its row
            row["odd"] = f"not run: {type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
        print(json.dumps(row), flush=True)


def _row(loss, params, args) -> dict[str, str]:
    import jax
    import jax.numpy as jnp

    import gmn_lopt

    structure = gmn_lopt.analyze(loss, params, *args)
    _, grads, factors = jax.jit(gmn_lopt.value_grad_and_factors(loss))(params, *args)
    rebuilt = jax.jit(lambda f, p: structure.reconstruct(f, p, *args))(factors, params)
    pairs = zip(structure.parameters, jax.tree.leaves(rebuilt), jax.tree.leaves(grads), strict=True)
    errors = [
        float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1e-6))
        for p, got, want in pairs
        if p.status == "factored"
    ]
    kernels = [p for p in structure.parameters if len(p.shape) > 1 and p.status != "unused"]
    entries = [p for p in structure.parameters if p.status != "unused"]
    share = lambda of: sum(p.size for p in of if p.status == "factored") / max(sum(p.size for p in of), 1)  # noqa: E731
    odd = {_short(reason) for p in entries if p.status != "factored" for reason in p.reason.split("; ")}
    return {
        "kernels": f"{100 * share(kernels):.0f} %",
        "entries": f"{100 * share(entries):.0f} %",
        "error": f"{max(errors, default=0.0):.0e}",
        "odd": ", ".join(sorted(odd)[:5]),
    }


def _short(reason: str) -> str:
    """A reason in a word or two: ``a scale``, ``a penalty``, or the primitive that a parameter goes into."""
    reason = reason.removeprefix("also ")
    if reason.startswith("in a term of the loss"):
        return "a penalty"
    return reason.split(":")[0].split(",")[0].removeprefix("used by ").split(" inside")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
