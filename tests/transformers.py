"""Small causal transformers in plain JAX and in every model library: ``name -> (loss_fn, params, args)``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, STREAM, HEADS, HEAD, FEED, TOKENS, BATCH = 11, 8, 2, 3, 5, 4, 3
MASKED = -1e9


def tokens():
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, TOKENS + 1))
    return jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])


def next_token_loss(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def randomised(params):
    """Parameters without the zeros and ones of libraries' initialisers, which would hide permutations."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), params)


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["shift"]


def rms_norm(p, x):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def attend(q, k, v, bias=0.0):
    """Causal attention: queries, keys and values ``[batch, tokens, heads, head]``."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5 + bias
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, MASKED)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def heads_of(x, heads=HEADS):
    return x.reshape(*x.shape[:-1], heads, -1)


def separate(p, h):
    """Query, key and value matrices, split into heads by a reshape."""
    q, k, v = h @ p["q"] + p["q_bias"], h @ p["k"], h @ p["v"] + p["v_bias"]
    return attend(*map(heads_of, (q, k, v))).reshape(*h.shape[:-1], -1) @ p["o"] + p["o_bias"]


def alibi(p, h):
    """Heads that differ by a slope: used by position."""
    q, k, v = (heads_of(h @ p[name]) for name in "qkv")
    distance = jnp.arange(TOKENS) - jnp.arange(TOKENS)[:, None]
    bias = 2.0 ** -jnp.arange(HEADS)[:, None, None] * distance
    return attend(q, k, v, bias).reshape(*h.shape[:-1], -1) @ p["o"]


def ordered_values(p, h):
    """Value dimensions used by position."""
    q, k, v = (heads_of(h @ p[name]) for name in "qkv")
    return attend(q, k, jnp.cumsum(v, -1)).reshape(*h.shape[:-1], -1) @ p["o"]


def ordered_stream(p, h):
    """The residual stream used by position."""
    return separate(p, jnp.roll(h, 1, axis=-1))


def fused(p, h):
    """One matrix for queries, keys and values."""
    q, k, v = jnp.split(h @ p["qkv"] + p["qkv_bias"], 3, axis=-1)
    return attend(*map(heads_of, (q, k, v))).reshape(*h.shape[:-1], -1) @ p["o"]


def per_head(p, h):
    """Kernels with a head axis; one more per-head map, a batch of matrices."""
    q, k, v = (jnp.einsum("bti,ihd->bthd", h, p[name]) for name in ("q", "k", "v"))
    mixed = jnp.einsum("bthd,hde->bthe", attend(q, k, v), p["mix"])
    return jnp.einsum("bthe,heo->bto", mixed, p["o"])


def rotate(x):
    angles = jnp.arange(x.shape[1])[:, None] * 100.0 ** -jnp.linspace(0.0, 1.0, x.shape[-1] // 2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def grouped(p, h):
    """Rotary positions; four heads of queries on two of keys and values."""
    q, k, v = heads_of(h @ p["q"], 4), heads_of(h @ p["k"]), heads_of(h @ p["v"])
    k, v = (jnp.repeat(x, 2, axis=2) for x in (rotate(k), v))
    return attend(rotate(q), k, v).reshape(*h.shape[:-1], -1) @ p["o"]


def feed_forward(p, h):
    return jax.nn.gelu(h @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def ordered_hidden(p, h):
    """Hidden neurons used by position."""
    return (jax.nn.relu(h @ p["up"]) * jnp.arange(FEED)) @ p["down"]


def gated(p, h):
    return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


WIDTH = HEADS * HEAD
NORM = {"scale": (STREAM,), "shift": (STREAM,)}
SHAPES = {
    separate: {
        **{name: (STREAM, WIDTH) for name in "qkv"},
        **{"q_bias": (WIDTH,), "v_bias": (WIDTH,), "o": (WIDTH, STREAM), "o_bias": (STREAM,)},
    },
    fused: {"qkv": (STREAM, 3 * WIDTH), "qkv_bias": (3 * WIDTH,), "o": (WIDTH, STREAM)},
    per_head: {
        **{name: (STREAM, HEADS, HEAD) for name in "qkv"},
        **{"mix": (HEADS, HEAD, HEAD + 1), "o": (HEADS, HEAD + 1, STREAM)},
    },
    grouped: {"q": (STREAM, 16), "k": (STREAM, 8), "v": (STREAM, 6), "o": (12, STREAM)},
    feed_forward: {"up": (STREAM, FEED), "up_bias": (FEED,), "down": (FEED, STREAM), "down_bias": (STREAM,)},
    gated: {"gate": (STREAM, FEED), "up": (STREAM, FEED), "down": (FEED, STREAM)},
}

SHAPES[ordered_stream] = SHAPES[separate]
SHAPES[alibi] = SHAPES[ordered_values] = {name: SHAPES[separate][name] for name in "qkvo"}
SHAPES[ordered_hidden] = {name: SHAPES[feed_forward][name] for name in ("up", "down")}


def plain(
    attention=separate, feed=feed_forward, norm=layer_norm, tied=False, post=False, scan=False, remat=False, blocks=2
):
    """A transformer in plain JAX; ``scan``: the blocks' parameters are stacked and scanned over."""
    rng = np.random.default_rng(0)
    norm_shapes = NORM if norm is layer_norm else {"scale": (STREAM,)}
    block_shapes = {"attention": SHAPES[attention], "feed": SHAPES[feed], "norm": norm_shapes, "norm2": norm_shapes}
    shapes = {"embed": (VOCABULARY, STREAM), "blocks": [block_shapes] * blocks, "norm": norm_shapes}
    if attention is not grouped:
        shapes["position"] = (TOKENS, STREAM)
    if not tied:
        shapes["out"] = (STREAM, VOCABULARY)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32), shapes, is_leaf=is_shape)
    if scan:
        params["blocks"] = jax.tree.map(lambda *xs: jnp.stack(xs), *params["blocks"])

    def block(x, p):
        if post:
            x = norm(p["norm"], x + attention(p["attention"], x))
            return norm(p["norm2"], x + feed(p["feed"], x))
        x = x + attention(p["attention"], norm(p["norm"], x))
        return x + feed(p["feed"], norm(p["norm2"], x))

    def loss(params, ids, targets):
        step = jax.checkpoint(block) if remat else block
        x = params["embed"][ids] + params.get("position", 0.0)
        if scan:
            x, _ = jax.lax.scan(lambda x, p: (step(x, p), None), x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = step(x, p)
        x = norm(params["norm"], x)
        return next_token_loss(x @ (params["embed"].T if tied else params["out"]), targets)

    return loss, params, tokens()


def linen_transformer(tied=True):
    import flax.linen as nn

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(VOCABULARY, STREAM)
            x = table(ids) + nn.Embed(TOKENS, STREAM)(jnp.arange(TOKENS))
            mask = nn.make_causal_mask(ids)
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(HEADS, qkv_features=WIDTH)(nn.LayerNorm()(x), mask=mask)
                x = x + nn.Dense(STREAM)(nn.gelu(nn.Dense(FEED)(nn.LayerNorm()(x))))
            return table.attend(nn.LayerNorm()(x))

    model = Transformer()
    args = tokens()
    params = randomised(model.init(jax.random.key(0), args[0]))
    return lambda params, ids, targets: next_token_loss(model.apply(params, ids), targets), params, args


def nnx_transformer():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.norm2 = nnx.RMSNorm(STREAM, rngs=rngs), nnx.LayerNorm(STREAM, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, STREAM, WIDTH, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(STREAM, FEED, rngs=rngs), nnx.Linear(FEED, STREAM, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norm(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(VOCABULARY, STREAM, rngs=rngs)
            self.first, self.second = Block(rngs), Block(rngs)
            self.out = nnx.Linear(STREAM, VOCABULARY, rngs=rngs)

        def __call__(self, ids):
            mask = nnx.make_causal_mask(ids)
            return self.out(self.second(self.first(self.table(ids), mask), mask))

    graph, params = nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)

    def loss(params, ids, targets):
        return next_token_loss(nnx.merge(graph, params)(ids), targets)

    return loss, randomised(params), tokens()


def haiku_transformer():
    import haiku as hk

    def forward(ids):
        table = hk.Embed(VOCABULARY, STREAM)
        x = table(ids) + hk.get_parameter("position", (TOKENS, STREAM), init=jnp.ones)
        mask = jnp.tril(jnp.ones((TOKENS, TOKENS)))[None, None]
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(HEADS, HEAD, w_init_scale=1.0, model_size=STREAM)(h, h, h, mask)
            x = x + hk.Linear(STREAM)(jax.nn.relu(hk.Linear(FEED)(hk.LayerNorm(-1, True, True)(x))))
        return hk.Linear(VOCABULARY)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    args = tokens()
    params = randomised(model.init(jax.random.key(0), args[0]))
    return lambda params, ids, targets: next_token_loss(model.apply(params, ids), targets), params, args


def equinox_transformer():
    import equinox as eqx

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.attention = eqx.nn.MultiheadAttention(HEADS, STREAM, qk_size=HEAD, vo_size=HEAD, key=keys[0])
            self.norm = eqx.nn.LayerNorm(STREAM)
            self.up = eqx.nn.Linear(STREAM, FEED, key=keys[1])
            self.down = eqx.nn.Linear(FEED, STREAM, key=keys[2])

        def __call__(self, x):
            h = jax.vmap(self.norm)(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))

    class Transformer(eqx.Module):
        table: eqx.nn.Embedding
        blocks: list
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.table = eqx.nn.Embedding(VOCABULARY, STREAM, key=keys[0])
            self.blocks = [Block(keys[1]), Block(keys[2])]
            self.out = eqx.nn.Linear(STREAM, VOCABULARY, key=keys[3])

        def __call__(self, ids):
            x = jax.vmap(self.table)(ids)
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.out)(x)

    params, static = eqx.partition(Transformer(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, ids, targets):
        return next_token_loss(jax.vmap(eqx.combine(params, static))(ids), targets)

    return loss, randomised(params), tokens()


# With the sizes of the permutable spaces, in order of size: the stream is 8, heads 2, their dimensions 3, hidden 5.
MODELS = {
    "plain": (plain, [2, 2, 3, 3, 3, 3, 5, 5, 8]),
    "tied, post-LayerNorm": (functools.partial(plain, tied=True, post=True), [2, 2, 3, 3, 3, 3, 5, 5, 8]),
    "fused": (functools.partial(plain, fused, remat=True), [2, 2, 3, 3, 5, 5, 8]),
    "per head": (functools.partial(plain, per_head, gated, rms_norm), [2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 8]),
    "rotary, grouped": (functools.partial(plain, grouped, gated, rms_norm, tied=True), [2, 2, 2, 2, 3, 3, 5, 5, 8]),
    "scan": (functools.partial(plain, scan=True, blocks=3), [2, 3, 3, 5, 8]),
    "scan, remat, tied": (functools.partial(plain, fused, gated, tied=True, scan=True, remat=True), [2, 3, 5, 8]),
    "flax.linen": (linen_transformer, [2, 2, 3, 3, 3, 3, 5, 5, 8]),
    "flax.nnx": (nnx_transformer, [2, 2, 3, 3, 3, 3, 5, 5, 8]),
    "haiku": (haiku_transformer, [2, 2, 3, 3, 3, 3, 5, 5, 8]),
    "equinox": (equinox_transformer, [2, 2, 3, 3, 3, 3, 5, 5, 8]),
}
