"""flashspark.jax against the package's function on NumPy arrays, which test_dense.py verifies."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import flashspark.jax as ours  # noqa: E402
import jax.numpy as jnp  # noqa: E402

TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}


def inputs(rng, rows=7, keys=9, heads=4, heads_kv=2, width=16, width_v=None, dtype=np.float32):
    """q, k, v as NumPy arrays."""
    shapes = (2, rows, heads, width), (2, keys, heads_kv, width), (2, keys, heads_kv, width_v or width)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def check(arrays, jit=True, tensors=None, **options):
    """Compares out and lse, for types that NumPy's arrays share with JAX's bit by bit."""
    tensors = tensors or {}
    names = list(tensors)

    def call(*args):
        return ours.flash_attn_func(*args[:3], **dict(zip(names, args[3:])), return_softmax_lse=True, **options)

    given = [jnp.asarray(x) for x in (*arrays, *tensors.values())]
    out, lse = (jax.jit(call) if jit else call)(*given)
    expected = flashspark.flash_attn_func(*arrays, **tensors, return_softmax_lse=True, **options)
    assert isinstance(out, jax.Array) and out.dtype == arrays[0].dtype and lse.dtype == np.float32
    for got, want in zip((out, lse), expected):
        assert got.shape == want.shape
        tolerance = TOLERANCE[str(arrays[0].dtype)]
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("jit", [True, False])
def test_types(rng, dtype, jit):
    check(inputs(rng, dtype=dtype), jit=jit, causal=True)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 1, "keys": 130},
        {"rows": 40, "keys": 33, "heads": 3, "heads_kv": 1},
        {"width": 20},
        {"width": 24, "width_v": 12},
        {"width": 128, "width_v": 64},
    ],
    ids=str,
)
def test_sizes(rng, sizes):
    check(inputs(rng, **sizes))


@pytest.mark.parametrize(
    "options",
    [
        {"softmax_scale": 0.3},
        {"causal": True, "window_size": (3, None)},
        {"window_size": (2, 1), "softcap": 5.0},
        {"num_splits": 2, "deterministic": True},
        {"window_size": None},
    ],
    ids=str,
)
def test_options(rng, options):
    check(inputs(rng), **options)


def test_optional_tensors(rng):
    slopes = rng.uniform(0, 1, 4).astype(np.float32)
    sinks = rng.standard_normal(4).astype(np.float32)
    used = np.array([9, 4], np.int32)
    check(inputs(rng), tensors={"alibi_slopes": slopes}, causal=True)
    check(inputs(rng), tensors={"alibi_slopes": np.stack([slopes, 2 * slopes])}, jit=False)
    check(inputs(rng), tensors={"sinks": sinks, "seqused_k": used}, causal=True)
    q, k, v = inputs(rng)
    rows = jnp.array([7, 2], jnp.int32)
    out = ours.flash_attn_func(q, k, v, seqused_q=rows)
    expected = flashspark.flash_attn_func(q, k, v, seqused_q=np.asarray(rows))
    np.testing.assert_allclose(out[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(out[1, :2], expected[1, :2], atol=1e-6)


def test_inside_a_program(rng):
    """Two calls, arithmetic around them, a loop, and layouts that XLA chooses."""
    q, k, v = inputs(rng, rows=8, keys=8, heads=2)

    @jax.jit
    def program(q, k, v):
        def step(_, x):
            return ours.flash_attn_func(x, k, v, causal=True) + q

        turned = jnp.transpose(jnp.transpose(q, (0, 2, 1, 3)) * 2, (0, 2, 1, 3))
        return jax.lax.fori_loop(0, 3, step, turned)

    x = 2 * q
    for _ in range(3):
        x = flashspark.flash_attn_func(x, k, v, causal=True) + q
    np.testing.assert_allclose(program(q, k, v), x, atol=1e-5)


def test_shapes_without_a_call(rng):
    q, k, v = inputs(rng)
    shape = jax.eval_shape(lambda *x: ours.flash_attn_func(*x, return_softmax_lse=True), q, k, v)
    assert [(x.shape, str(x.dtype)) for x in shape] == [((2, 7, 4, 16), "float32"), ((2, 4, 7), "float32")]


def test_transformations_are_refused(rng):
    q, k, v = map(jnp.asarray, inputs(rng))
    with pytest.raises(NotImplementedError, match="fold the mapped axis into num_seqs"):
        jax.vmap(ours.flash_attn_func)(q[None], k[None], v[None])
    with pytest.raises(NotImplementedError, match="fold the mapped axis"):
        jax.jit(jax.vmap(lambda q: ours.flash_attn_func(q, k, v)))(q[None])
    loss = lambda q: ours.flash_attn_func(q, k, v).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="a second derivative"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(q)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(loss, (q,), (q,))
    with pytest.raises(NotImplementedError, match="fold the mapped axis"):
        jax.vmap(jax.grad(loss))(q[None])


def formula(q, k, v, causal=False, softcap=0.0, alibi_slopes=None, sinks=None, seqused_k=None):
    """out and lse in JAX's own operations."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5
    rows, keys = s.shape[2:]
    used = jnp.full(q.shape[0], keys) if seqused_k is None else seqused_k
    distance = (jnp.arange(rows)[:, None] + used[:, None, None] - rows - jnp.arange(keys))[:, None]
    s = softcap * jnp.tanh(s / softcap) if softcap else s
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape(-1, q.shape[2], 1, 1) * jnp.abs(distance)
    s = jnp.where((jnp.arange(keys) < used[:, None])[:, None, None], s, -jnp.inf)
    s = jnp.where(distance >= 0, s, -jnp.inf) if causal else s
    if sinks is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (*s.shape[:3], 1))], -1)
    p = jax.nn.softmax(s, -1)[..., :keys]
    return jnp.einsum("bhts,bshd->bthd", p, v), jax.nn.logsumexp(s, -1)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    ("options", "tensors", "sizes"),
    [
        ({"causal": True}, (), {}),
        ({"softcap": 3.0, "deterministic": True}, (), {"heads": 4, "heads_kv": 1}),
        ({"causal": True}, ("alibi_slopes", "sinks"), {}),
        ({}, ("alibi_slopes", "seqused_k"), {}),
        ({"causal": True}, (), {"width": 20, "width_v": 12}),
        ({}, (), {"width": 64, "width_v": 32, "rows": 40}),
    ],
    ids=str,
)
def test_gradients(rng, options, tensors, sizes, jit):
    """Of out and of lse, for q, k, v, slopes and sinks, against JAX's own operations."""
    given = {
        "alibi_slopes": rng.uniform(0, 0.5, (2, 4)).astype(np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
        "seqused_k": np.array([9, 4], np.int32),
    }
    arrays = [jnp.asarray(x) for x in inputs(rng, **sizes)] + [jnp.asarray(given[name]) for name in tensors]
    places = [i for i, x in enumerate(arrays) if x.dtype == jnp.float32]
    weights = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in formula(*arrays[:3])]

    def loss(function):
        def value(*args):
            results = function(*args[:3], **dict(zip(tensors, args[3:])))
            return sum((x * w).sum() for x, w in zip(results, weights))

        return value

    own = jax.grad(loss(lambda *x, **y: ours.flash_attn_func(*x, **y, **options, return_softmax_lse=True)), places)
    used = {name: x for name, x in options.items() if name != "deterministic"}
    want = jax.grad(loss(lambda *x, **y: formula(*x, **y, **used)), places)(*arrays)
    for got, expected in zip((jax.jit(own) if jit else own)(*arrays), want):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_gradients_in_narrow_types(rng):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(rng))
    sinks = jnp.asarray(rng.standard_normal(4), jnp.bfloat16)
    loss = lambda f: lambda q, sinks: (f(q, k, v, sinks=sinks)[0].astype(jnp.float32) ** 2).sum()  # noqa: E731
    call = lambda *x, **y: ours.flash_attn_func(*x, **y, return_softmax_lse=True)  # noqa: E731
    got = jax.grad(loss(call), (0, 1))(q, sinks)
    wide = lambda q, k, v, sinks: formula(*(x.astype(jnp.float32) for x in (q, k, v)), sinks=sinks)  # noqa: E731
    want = jax.grad(loss(wide), (0, 1))(q, sinks.astype(jnp.float32))
    for x, y in zip(got, want):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=5e-2, atol=5e-2)


def test_a_training_loop(rng):
    """Gradient descent inside a compiled loop."""
    q, k, v = (jnp.asarray(x) for x in inputs(rng))
    target = ours.flash_attn_func(q, k, v, causal=True)

    def loss(x):
        return ((ours.flash_attn_func(x, k, v, causal=True) - target) ** 2).sum()

    start = jnp.zeros_like(q)
    end = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x - 0.5 * jax.grad(loss)(x), x))(start)
    assert loss(end) < 0.2 * loss(start)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": np.zeros((2, 7, 4), np.float32)}, ValueError, r"q\.shape = \(2, 7, 4\): must be"),
        ({"k": np.zeros((2, 9, 2, 8), np.float32)}, ValueError, r"k\.shape = \(2, 9, 2, 8\): must be"),
        ({"v": np.zeros((2, 8, 2, 16), np.float32)}, ValueError, r"v\.shape = "),
        ({"k": np.zeros((2, 9, 3, 16), np.float32), "v": np.zeros((2, 9, 3, 16), np.float32)}, ValueError, "multiple"),
        ({"q": np.zeros((2, 7, 4, 16), np.int32)}, TypeError, r"q\.dtype = int32: must be bfloat16, float16, float32"),
        ({"v": np.zeros((2, 9, 2, 16), np.float16)}, TypeError, r"v\.dtype = float16: must be float32"),
        ({"q": [[1.0]]}, TypeError, "q = list: must be a JAX or NumPy array"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p"),
        ({"window_size": (1, 2, 3)}, ValueError, "window_size"),
        ({"softcap": "a"}, TypeError, "softcap"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"sinks\.shape = \(3,\): must be \(num_heads,\)"),
        ({"seqused_k": np.zeros(2, np.int64)}, TypeError, r"seqused_k\.dtype = int64"),
        ({"alibi_slopes": 1.0}, TypeError, "alibi_slopes = float"),
    ],
    ids=lambda x: "" if not isinstance(x, dict) else " ".join(x),
)
def test_errors(rng, change, error, text):
    arguments = {**dict(zip("qkv", inputs(rng))), **change}
    with pytest.raises(error, match=text):
        ours.flash_attn_func(**arguments)


def test_errors_of_the_native_call(rng):
    """What only the values show is XLA's error with the native text."""
    q, k, v = inputs(rng)
    with pytest.raises(jax.errors.JaxRuntimeError, match="seqused_k"):
        ours.flash_attn_func(q, k, v, seqused_k=jnp.array([3, 10], jnp.int32)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="softcap"):
        ours.flash_attn_func(q, k, v, softcap=-1.0).block_until_ready()


def test_without_the_bridge(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jax_tvm_ffi", None)
    with pytest.raises(ImportError, match="pip install jax-tvm-ffi"):
        ours._bridge.__wrapped__()


def test_a_bridge_for_another_jax_is_named(monkeypatch):
    """What jaxlib says when jax-tvm-ffi 0.1.3 registers a function with JAX 0.9.0."""
    said = "INVALID_ARGUMENT: .. handler's API version (0.3) is incompatible with the framework's API version (0.1)"

    def refuse(*args, **kwargs):
        raise RuntimeError(said)

    monkeypatch.setattr(ours._bridge(), "register_ffi_target", refuse)
    wanted = (
        rf"^jax-tvm-ffi [\d.]+ is built for another release of JAX than {jax.__version__}: update jax and jaxlib, or"
    )
    with pytest.raises(ImportError, match=wanted):
        ours._register("a_name", None, "cpu")
    said = "ALREADY_EXISTS"
    with pytest.raises(RuntimeError, match="ALREADY_EXISTS"):
        ours._register("a_name", None, "cpu")
