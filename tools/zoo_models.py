"""Model classes of other packages, small: ``NAME: (package, build)`` with ``build() -> (loss, params, args)``.

A loss is some scalar of the outputs; what counts is which products the model is made of. Run by ``tools/zoo.py``.
"""

# mypy: ignore-errors
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Build = Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 12))
SEQUENCE = jax.random.normal(jax.random.key(2), (3, 7, 16))
IMAGES = jax.random.normal(jax.random.key(3), (3, 16, 16, 3))
IDS = jax.random.randint(jax.random.key(4), (3, 9), 1, 40)


def scalar(outputs: Any) -> jax.Array:
    """A loss of whatever a model returns."""
    floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
    return jnp.asarray(sum(jnp.mean(jnp.sin(x + 0.3)) for x in floats))


def linen(make: Callable[[Any], Any], *args: Any) -> Build:
    """A module of flax.linen, made by ``make(flax.linen)``; collections other than params are constants."""

    def build() -> Any:
        import flax.linen as nn

        model = make(nn)
        variables = dict(model.init(KEY, *args))
        params = variables.pop("params")
        mutable = list(variables)

        def loss(params: Any, variables: Any, *args: Any) -> jax.Array:
            outputs = model.apply({"params": params, **variables}, *args, mutable=mutable)
            return scalar(outputs[0] if mutable else outputs)

        return loss, params, (variables, *args)

    return build


def haiku(function: Callable[[Any, Any], Any], *args: Any) -> Build:
    """``function(haiku, *args)``, transformed."""

    def build() -> Any:
        import haiku as hk

        model = hk.transform_with_state(lambda *args: function(hk, *args))
        params, state = model.init(KEY, *args)
        return (lambda p, *args: scalar(model.apply(p, state, KEY, *args)[0])), params, args

    return build


def equinox(make: Callable[[Any], Any], x: Any, call: Callable[[Any, Any], Any] | None = None) -> Build:
    """A module of Equinox, mapped over the batch."""

    def build() -> Any:
        import equinox as eqx

        params, static = eqx.partition(make(eqx), eqx.is_inexact_array)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            model = eqx.combine(params, static)
            return scalar(jax.vmap(lambda x: model(x) if call is None else call(model, x))(x))

        return loss, params, (x,)

    return build


def nnx(make: Callable[[Any, Any], Any], *args: Any) -> Build:
    """A module of flax.nnx, made by ``make(flax.nnx, rngs)``."""

    def build() -> Any:
        from flax import nnx

        graph, params, rest = nnx.split(make(nnx, nnx.Rngs(0)), nnx.Param, ...)
        return (lambda p, rest, *args: scalar(nnx.merge(graph, p, rest)(*args))), params, (rest, *args)

    return build


def transformer(name: str, config: str, settings: dict[str, Any], **inputs: Any) -> Build:
    """A model of transformers with random weights."""

    def build() -> Any:
        import transformers

        # These models are from before jnp.clip renamed its arguments.
        clip, renamed = jnp.clip, {"a_min": "min", "a_max": "max"}
        jnp.clip = lambda x, *of, **named: clip(x, *of, **{renamed.get(k, k): v for k, v in named.items()})
        model = getattr(transformers, name)(getattr(transformers, config)(**settings), seed=0)
        run = lambda p, inputs: scalar(model(**inputs, params=p, train=False).to_tuple())  # noqa: E731
        return run, model.params, (inputs,)

    return build


def flow(name: str, **settings: Any) -> Build:
    """A normalising flow of flowjax, by maximum likelihood."""

    def build() -> Any:
        import equinox as eqx
        import paramax
        from flowjax import distributions, flows

        base = distributions.Normal(jnp.zeros(12))
        params, static = eqx.partition(
            getattr(flows, name)(KEY, base_dist=base, flow_layers=2, **settings),
            eqx.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
        )
        return (lambda p, x: -jnp.mean(paramax.unwrap(eqx.combine(p, static)).log_prob(x))), params, (X,)

    return build


def neural_ode() -> Any:
    """A neural differential equation of Diffrax."""
    import diffrax
    import equinox as eqx

    params, static = eqx.partition(eqx.nn.MLP(12, 12, 16, 2, key=KEY, activation=jnp.tanh), eqx.is_inexact_array)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        field = diffrax.ODETerm(lambda t, y, args: eqx.combine(params, static)(y))
        settings = {"adjoint": diffrax.DirectAdjoint(), "max_steps": 16}

        def solve(y: jax.Array) -> Any:
            return diffrax.diffeqsolve(field, diffrax.Tsit5(), 0.0, 1.0, 0.1, y, **settings).ys

        return scalar(jax.vmap(solve)(x))

    return loss, params, (X,)


def graph_network() -> Any:
    """A graph network of jraph, of Haiku MLPs."""
    import haiku as hk
    import jraph

    graph = jraph.GraphsTuple(
        nodes=X, edges=X[:5], senders=jnp.arange(5), receivers=jnp.arange(1, 6), n_node=jnp.array([6]),
        n_edge=jnp.array([5]), globals=X[:1],
    )  # fmt: skip
    mlp = lambda name: lambda *args: hk.nets.MLP([16, 12], name=name)(jnp.concatenate(args, -1))  # noqa: E731

    def run(graph: Any) -> Any:
        update = {f"update_{part}_fn": jraph.concatenated_args(mlp(part)) for part in ("edge", "node", "global")}
        graph = jraph.GraphNetwork(**update)(graph)
        return graph.nodes, graph.edges, graph.globals

    model = hk.without_apply_rng(hk.transform(run))
    return (lambda p, graph: scalar(model.apply(p, graph))), model.init(KEY, graph), (graph,)


def policy() -> Any:
    """The policy network of Brax."""
    from brax.training import networks

    net = networks.make_policy_network(4, 12, hidden_layer_sizes=(16, 16))
    return (lambda p, x: scalar(net.apply(None, p, x))), net.init(KEY), (X,)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
VIT = {**TINY, "image_size": 16, "patch_size": 4}
WAVE = {**TINY, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
WAVE |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
WAVE |= {"feat_extract_norm": "layer"}
NCHW = IMAGES.transpose(0, 3, 1, 2)

MODELS: dict[str, tuple[str, Build]] = {
    "Dense, twice": ("flax.linen", linen(lambda nn: nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(4)]), X)),
    "WeightNorm(Dense)": ("flax.linen", linen(lambda nn: nn.WeightNorm(nn.Dense(8)), X)),
    "OptimizedLSTMCell": ("flax.linen", linen(lambda nn: nn.RNN(nn.OptimizedLSTMCell(8)), SEQUENCE)),
    "LSTMCell": ("flax.linen", linen(lambda nn: nn.RNN(nn.LSTMCell(8)), SEQUENCE)),
    "GRUCell": ("flax.linen", linen(lambda nn: nn.RNN(nn.GRUCell(8)), SEQUENCE)),
    "MGUCell": ("flax.linen", linen(lambda nn: nn.RNN(nn.MGUCell(8)), SEQUENCE)),
    "ConvLSTMCell": ("flax.linen", linen(lambda nn: nn.RNN(nn.ConvLSTMCell(4, (3, 3))), IMAGES[None])),
    "MultiHeadDotProductAttention": ("flax.linen", linen(lambda nn: nn.MultiHeadDotProductAttention(2), SEQUENCE)),
    "Conv, BatchNorm": (
        "flax.linen",
        linen(lambda nn: nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(True), nn.relu, nn.Conv(4, (1, 1))]), IMAGES),
    ),
    "ConvTranspose": ("flax.linen", linen(lambda nn: nn.ConvTranspose(4, (3, 3), (2, 2)), IMAGES)),
    "ConvLocal": ("flax.linen", linen(lambda nn: nn.ConvLocal(4, (3, 3)), IMAGES)),
    "DenseGeneral": ("flax.linen", linen(lambda nn: nn.DenseGeneral((2, 4), axis=(-2, -1)), SEQUENCE)),
    "Embed": ("flax.linen", linen(lambda nn: nn.Sequential([nn.Embed(40, 8), nn.Dense(8)]), IDS)),
    "Linear": (
        "flax.nnx",
        nnx(lambda m, r: m.Sequential(m.Linear(12, 8, rngs=r), jnp.tanh, m.Linear(8, 4, rngs=r)), X),
    ),
    "MultiHeadAttention": (
        "flax.nnx",
        nnx(lambda m, r: m.MultiHeadAttention(2, 16, decode=False, rngs=r), SEQUENCE),
    ),
    "Conv": ("flax.nnx", nnx(lambda m, r: m.Conv(3, 8, (3, 3), rngs=r), IMAGES)),
    "LoRALinear": ("flax.nnx", nnx(lambda m, r: m.LoRALinear(12, 8, lora_rank=2, rngs=r), X)),
    "nets.MLP": ("haiku", haiku(lambda hk, x: hk.nets.MLP([16, 8])(x), X)),
    "LSTM": ("haiku", haiku(lambda hk, x: hk.dynamic_unroll(hk.LSTM(8), x, hk.LSTM(8).initial_state(7))[0], SEQUENCE)),
    "GRU": ("haiku", haiku(lambda hk, x: hk.dynamic_unroll(hk.GRU(8), x, jnp.zeros((7, 8)))[0], SEQUENCE)),
    "nets.ResNet18": ("haiku", haiku(lambda hk, x: hk.nets.ResNet18(4)(x, True), IMAGES)),
    "nets.MobileNetV1": ("haiku", haiku(lambda hk, x: hk.nets.MobileNetV1(num_classes=4)(x, True), IMAGES)),
    "MultiHeadAttention ": (
        "haiku",
        haiku(lambda hk, x: hk.MultiHeadAttention(2, 8, w_init_scale=1.0)(x, x, x), SEQUENCE),
    ),
    "nn.MLP": ("equinox", equinox(lambda eqx: eqx.nn.MLP(12, 4, 16, 2, key=KEY), X)),
    "nn.GRUCell": ("equinox", equinox(lambda eqx: eqx.nn.GRUCell(12, 8, key=KEY), X, lambda m, x: m(x, jnp.zeros(8)))),
    "nn.LSTMCell": (
        "equinox",
        equinox(lambda eqx: eqx.nn.LSTMCell(12, 8, key=KEY), X, lambda m, x: m(x, (jnp.zeros(8), jnp.zeros(8)))),
    ),
    "nn.MultiheadAttention": (
        "equinox",
        equinox(lambda eqx: eqx.nn.MultiheadAttention(2, 16, key=KEY), SEQUENCE, lambda m, x: m(x, x, x)),
    ),
    "nn.Conv2d": ("equinox", equinox(lambda eqx: eqx.nn.Conv2d(3, 8, 3, key=KEY), NCHW)),
    "nn.WeightNorm": ("equinox", equinox(lambda eqx: eqx.nn.WeightNorm(eqx.nn.Linear(12, 8, key=KEY)), X)),
    "masked_autoregressive_flow": ("flowjax", flow("masked_autoregressive_flow")),
    "coupling_flow": ("flowjax", flow("coupling_flow")),
    "block_neural_autoregressive_flow": ("flowjax", flow("block_neural_autoregressive_flow")),
    "diffeqsolve (DirectAdjoint)": ("diffrax", neural_ode),
    "GraphNetwork": ("jraph", graph_network),
    "make_policy_network": ("brax", policy),
    "FlaxGPT2Model": ("transformers", transformer("FlaxGPT2Model", "GPT2Config", GPT2, input_ids=IDS)),
    "FlaxBertModel": ("transformers", transformer("FlaxBertModel", "BertConfig", TINY, input_ids=IDS)),
    "FlaxRobertaModel": ("transformers", transformer("FlaxRobertaModel", "RobertaConfig", TINY, input_ids=IDS)),
    "FlaxT5Model": (
        "transformers",
        transformer("FlaxT5Model", "T5Config", T5, input_ids=IDS, decoder_input_ids=IDS),
    ),
    "FlaxBartModel": (
        "transformers",
        transformer("FlaxBartModel", "BartConfig", BART, input_ids=IDS, decoder_input_ids=IDS),
    ),
    "FlaxLlamaModel": ("transformers", transformer("FlaxLlamaModel", "LlamaConfig", TINY, input_ids=IDS)),
    "FlaxViTModel": ("transformers", transformer("FlaxViTModel", "ViTConfig", VIT, pixel_values=NCHW)),
    "FlaxCLIPVisionModel": (
        "transformers",
        transformer("FlaxCLIPVisionModel", "CLIPVisionConfig", VIT, pixel_values=NCHW),
    ),
    "FlaxWav2Vec2Model": (
        "transformers",
        transformer(
            "FlaxWav2Vec2Model", "Wav2Vec2Config", WAVE, input_values=jnp.sin(jnp.arange(256.0)).reshape(2, 128)
        ),
    ),
    "FlaxResNetModel": (
        "transformers",
        transformer(
            "FlaxResNetModel",
            "ResNetConfig",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
            pixel_values=NCHW,
        ),
    ),
}
