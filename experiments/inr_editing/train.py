"""Train one editor of SIRENs, so that an interrupted run goes on where it stopped, bit for bit."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from experiments.inr_editing import data, siren
from gmn_lopt.networks.deep_weight_space import DeepWeightSpace
from gmn_lopt.networks.editor import Editor, EditorModule, shown
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.networks.graph import GraphNetwork
from gmn_lopt.networks.saved_editor import save_editor
from gmn_lopt.util.arrays import read_arrays, write_arrays
from gmn_lopt.util.errors import FileError, UsageError
from gmn_lopt.util.files import read_json, write_atomically
from gmn_lopt.util.progress import progress

CHECKPOINT_SECONDS = 30.0
EVALUATIONS = 10  # of the validation loss during training; the weights where it is lowest are kept
EVALUATION_BATCH = 32
SHOWN = 8  # test images of which it is kept what edited networks show


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Attributes:
        data: one of ``data.IMAGES``.
        train, valid, test: how many networks.
        points: how many pixels of the edited image are known.
        networks: which weight-space networks.
        methods: what they read; see :func:`make_editor`.
        width, layers: of the weight-space networks.
        reader: GradMetaNet. ``attention``: GradMetaNet++.
        probes: learned points of methods with probing.
        heads: networks whose values are averaged in methods with several.
        pixels: random pixels on which an edited network is judged in a training step.
        steps, batch, learning_rate, weight_decay: of AdamW; the rate warms up for 5 % of the steps, then falls to zero
            along a cosine.
    """

    data: str
    train: int
    valid: int
    test: int
    points: int
    networks: tuple[str, ...]
    methods: tuple[str, ...]
    width: int
    layers: int
    reader: GradMetaNetConfig
    attention: GradMetaNetPlusPlusConfig
    probes: int
    heads: int
    pixels: int
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 1e-4

    @property
    def counts(self) -> dict[str, int]:
        """How many networks each split has."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


NETWORKS: dict[str, Callable[[int, int], DeepWeightSpace | GraphNetwork]] = {
    "dws": DeepWeightSpace,
    "gmn": GraphNetwork,
}
METHODS = ("weights", "probing", "told", "gradmetanet", "gradmetanet++", "gradmetanet x heads")


def make_editor(setting: Setting, network: str, method: str, params: siren.Params) -> Editor:
    """The editor of a method.

    Methods are ``"weights"``, the weight-space network alone; ``"probing"``; ``"told"``, the control: what the
    gradients are made of, without them; ``"gradmetanet"``, ``"gradmetanet++"``; ``"gradmetanet x heads"``.

    Args:
        setting: its sizes.
        network: one of ``NETWORKS``.
        method: one of ``METHODS``.
        params: all networks that are trained on, whose spread the editor divides by.

    Raises:
        UsageError: there is no such network or method.
    """
    for name, known in ((network, tuple(NETWORKS)), (method, METHODS)):
        if name not in known:
            raise UsageError(f"unknown method {name!r}: choose one of {', '.join(known)}")
    readers: dict[str, GradMetaNetConfig | GradMetaNetPlusPlusConfig]
    readers = {"gradmetanet": setting.reader, "gradmetanet x heads": setting.reader, "gradmetanet++": setting.attention}
    kind = data.IMAGES[setting.data]
    # The same for all networks and methods (appendix F.3).
    chosen = np.random.default_rng(0).permutation(kind.height * kind.width)[: setting.points]
    points = np.asarray(siren.grid(kind.height, kind.width))[chosen].tolist()
    return Editor(
        network=NETWORKS[network](setting.width, setting.layers),
        points=tuple(map(tuple, points)),
        reader=readers.get(method),
        probes=setting.probes if method == "probing" else 0,
        told=method == "told",
        heads=setting.heads if method.endswith("heads") else 1,
        spreads=tuple(float(x.std()) for x in jax.tree.leaves(params)),
    )


def known_values(editor: Editor, kind: data.Images, targets: Float[Array, "n pixels c"]) -> Float[Array, "n points c"]:
    """The values of edited images at an editor's points."""
    points = np.asarray(editor.points)
    sizes = np.array([kind.height, kind.width])
    row, column = np.rint((points + 1) / 2 * (sizes - 1)).astype(int).T
    return targets[:, row * kind.width + column]


def train(
    setting: Setting,
    network: str,
    method: str,
    seed: int,
    splits: dict[str, data.Split],
    out: Path,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train an editor, or go on with it, or read what it came to.

    Args:
        setting, network, method: what is trained; see :func:`make_editor`.
        seed: of the weights and the batches.
        splits: the networks, of :func:`data.load`.
        out: a directory of this run: its checkpoint, ``result.json``, the editor, and ``shown.npz``, what the first
            networks of the test split show.
        quiet: whether to show no progress.

    Returns:
        The result: mean squared errors of the splits, number of weights, and seconds.

    Raises:
        UsageError: what is in the directory was trained otherwise.
    """
    described = json.loads(json.dumps({**asdict(setting), "network": network, "method": method, "seed": seed}))
    if os.path.lexists(out / "result.json"):
        result = read_json(out / "result.json")
        if result.get("setting") != described:
            raise UsageError(f"{out} was trained with other settings: choose another --out")
        if lacking := sorted({"errors", "weights", "seconds"} - result.keys()):
            raise UsageError(f"{out / 'result.json'} is damaged: {lacking[0]} is not there; remove it to begin again")
        return result
    out.mkdir(parents=True, exist_ok=True)
    kind = data.IMAGES[setting.data]
    editor = make_editor(setting, network, method, splits["train"].params)
    module = editor.module(siren.forward, first(splits["train"].params))
    known = {name: known_values(editor, kind, split.target) for name, split in splits.items()}
    tx = optimizer(setting)
    key = jax.random.key(seed)
    init = jax.jit(lambda key: module.init(key, first(splits["train"].params), known["train"][0])["params"])
    weights = init(key)
    state = {"weights": weights, "best": weights, "valid": jnp.inf, "optimizer": tx.init(weights)}
    step, seconds = 0, 0.0
    if (saved := _read_checkpoint(out / "checkpoint.npz", state, described)) is not None:
        state, step, seconds = saved
    update = jax.jit(partial(_update, setting, module, tx))
    show = jax.jit(partial(edit, module, kind))  # compiled once: all evaluations are of as many networks
    last = start = time.monotonic()
    with progress(setting.steps, f"{network} + {method}, seed {seed}", "steps", initial=step, disable=quiet) as bar:
        while step < setting.steps:
            step += 1
            arguments = state["weights"], state["optimizer"], jax.random.fold_in(key, step)
            weights, optimizer_state = update(splits["train"], known["train"], *arguments)
            state = {**state, "weights": weights, "optimizer": optimizer_state}
            bar.update()
            if step % max(setting.steps // EVALUATIONS, 1) == 0:
                valid = mean_error(show(weights, splits["valid"].params, known["valid"]), splits["valid"])
                bar.set_postfix(valid=f"{float(valid):.5f}")
                if valid < state["valid"]:
                    state = {**state, "best": weights, "valid": valid}
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                last = time.monotonic()
                _write_checkpoint(out / "checkpoint.npz", state, described, step, seconds + last - start)
    values = {name: show(state["best"], splits[name].params, known[name]) for name in ("valid", "test")}
    errors = {name: float(mean_error(x, splits[name])) for name, x in values.items()}
    write_arrays(out / "shown.npz", {"shown": np.asarray(values["test"][:SHOWN])})
    save_editor(out / "editor", editor, siren.forward, first(splits["train"].params), state["best"])
    result = {
        "setting": described,
        "errors": errors,
        "weights": sum(x.size for x in jax.tree.leaves(weights)),
        "scale": float(jnp.exp(state["best"]["log_scale"])),
        "seconds": seconds + time.monotonic() - start,
    }
    write_atomically(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    (out / "checkpoint.npz").unlink(missing_ok=True)
    return result


def first(params: siren.Params) -> siren.Params:
    """The first of many networks."""
    return jax.tree.map(lambda x: x[0], params)


def optimizer(setting: Setting) -> optax.GradientTransformation:
    """AdamW with warm-up and a cosine, behind a bound on the norm of the gradient."""
    warmup = max(setting.steps // 20, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, setting.learning_rate, warmup, max(setting.steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=setting.weight_decay))


def _update(
    setting: Setting,
    module: EditorModule,
    tx: optax.GradientTransformation,
    split: data.Split,
    known: Array,
    weights: PyTree,
    state: PyTree,
    key: Array,
) -> tuple[PyTree, PyTree]:
    kind = data.IMAGES[setting.data]
    points = siren.grid(kind.height, kind.width)
    for_batch, for_pixels = jax.random.split(key)
    batch = jax.random.randint(for_batch, (setting.batch,), 0, len(split))
    pixels = jax.random.permutation(for_pixels, len(points))[: setting.pixels]

    def loss(weights: PyTree) -> Array:
        def one(params: siren.Params, values: Array, target: Array) -> Array:
            edited = module.apply({"params": weights}, params, values)
            return ((shown(siren.forward, edited, points[pixels]) - target[pixels]) ** 2).mean()

        params = jax.tree.map(lambda x: x[batch], split.params)
        return jax.vmap(one)(params, known[batch], split.target[batch]).mean()

    updates, state = tx.update(jax.grad(loss)(weights), state, weights)
    return optax.apply_updates(weights, updates), state


def edit(
    module: EditorModule, kind: data.Images, weights: PyTree, params: siren.Params, known: Float[Array, "n points c"]
) -> Float[Array, "n pixels c"]:
    """What many networks show after being edited."""
    points = siren.grid(kind.height, kind.width)

    def one(network: tuple[siren.Params, Array]) -> Array:
        return shown(siren.forward, module.apply({"params": weights}, *network), points)

    return jax.lax.map(one, (params, known), batch_size=EVALUATION_BATCH)


def mean_error(values: Float[Array, "n pixels c"], split: data.Split) -> Array:
    """The mean squared error of what a split's edited networks show, over all pixels."""
    return ((values - split.target) ** 2).mean()


def _write_checkpoint(file: Path, state: PyTree, described: dict[str, Any], step: int, seconds: float) -> None:
    arrays = {f"leaf_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    write_arrays(file, {"described": json.dumps(described), "step": step, "seconds": seconds, **arrays})


def _read_checkpoint(file: Path, state: PyTree, described: dict[str, Any]) -> tuple[PyTree, int, float] | None:
    if not os.path.lexists(file):
        return None
    try:
        arrays = read_arrays(file)
        if json.loads(str(arrays["described"])) != described:
            raise UsageError(f"{file} is of a run with other settings: choose another --out")
        leaves, treedef = jax.tree.flatten(state)
        found = [jnp.asarray(arrays[f"leaf_{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(treedef, found), int(arrays["step"]), float(arrays["seconds"])
    except UsageError:
        raise
    except (FileError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is damaged: remove it to begin this run again") from error
