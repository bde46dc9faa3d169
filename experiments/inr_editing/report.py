"""The table of an experiment, and its picture: originals, targets, and what edited networks show."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments.inr_editing import data
from experiments.inr_editing.train import SHOWN, Setting
from gmn_lopt.evaluation.protocol import mean_and_std
from gmn_lopt.evaluation.report import markdown_table, spread
from gmn_lopt.util.arrays import read_arrays
from gmn_lopt.util.files import write_atomically

HEAD = ("network", "reads", "test error x 100", "gain", "error, valid x 100", "weights", "seconds")
LABELS = {
    "weights": "its weights",
    "probing": "+ probing",
    "told": "+ the known values, no gradients",
    "gradmetanet": "+ GradMetaNet",
    "gradmetanet++": "+ GradMetaNet++",
    "gradmetanet x heads": "+ GradMetaNet, several heads",
}


def write(out: Path, setting: Setting, splits: dict[str, data.Split], results: Sequence[dict[str, Any]]) -> str:
    """Write ``report.md``, ``report.json`` and ``edits.png`` into a directory, and return the table.

    Args:
        out: the directory.
        setting: what was trained on.
        splits: the networks.
        results: of :func:`~experiments.inr_editing.train.train`, each with the directory of its ``"run"``.
    """
    test = splits["test"]
    unedited = float(((test.original - test.target) ** 2).mean())
    fit = data.psnr(setting.data, test)
    lines = [["none", "", f"{100 * unedited:.3f}", "", "", "", ""]]
    summary = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["setting"]["network"], result["setting"]["method"]), []).append(result)
    for (network, method), runs in groups.items():
        errors = np.array([run["errors"]["test"] for run in runs])
        base = [run["errors"]["test"] for run in groups.get((network, "weights"), [])]
        # Relative to the same network on its weights alone, with the same seeds.
        gain = 1 - errors.mean() / np.mean(base[: len(errors)]) if base else None
        cells = [spread(mean_and_std(100 * errors), 3), "" if gain is None or method == "weights" else f"{gain:.1%}"]
        valid = np.mean([run["errors"]["valid"] for run in runs])
        rest = [f"{100 * valid:.3f}", f"{runs[0]['weights']:,}", f"{np.mean([run['seconds'] for run in runs]):,.0f}"]
        lines.append([network, LABELS[method], *cells, *rest])
        summary.append({"network": network, "method": method, "test": errors.tolist(), "gain": gain, "valid": valid})
    head = (
        f"{setting.data}: {setting.train} networks to train on, {setting.test} to test on, which show their images "
        f"with {fit:.1f} dB; {setting.points} known pixels, {setting.steps} steps of {setting.batch}."
    )
    table = f"{head}\n\n{markdown_table(HEAD, lines)}"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.md", f"{table}\n".encode())
    facts = {"setting": setting.data, "psnr": fit, "unedited": unedited, "results": summary}
    write_atomically(out / "report.json", (json.dumps(facts, indent=2) + "\n").encode())
    draw(out / "edits.png", setting, test, {key: runs[0]["run"] for key, runs in groups.items()})
    return table


def draw(file: Path, setting: Setting, test: data.Split, runs: dict[tuple[str, str], Path]) -> None:
    """Draw a few test images, a row each for the original, the target, and what each editor makes."""
    kind = data.IMAGES[setting.data]
    rows: dict[str, Float[np.ndarray, "n pixels c"]] = {
        "original": np.asarray(test.original[:SHOWN]),
        "target": np.asarray(test.target[:SHOWN]),
    }
    for (network, method), run in runs.items():
        rows[f"{network} {LABELS[method]}"] = read_arrays(run / "shown.npz")["shown"]
    figure = Figure(figsize=(1.0 * SHOWN + 2.6, 1.0 * len(rows)), layout="constrained", dpi=100)
    axes = figure.subplots(len(rows), SHOWN, squeeze=False)
    for line, (label, values) in zip(axes, rows.items()):
        for place, image in zip(line, values):
            image = np.clip((image - kind.low) / (kind.high - kind.low), 0, 1)
            place.imshow(image.reshape(kind.height, kind.width, kind.channels).squeeze(), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(label.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(file)
