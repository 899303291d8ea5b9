"""FlashAttention 4's functions and block lists through the operators of flashspark.torch_ops: eagerly, under
torch.compile in one graph, with fake tensors, and the operators' schemas. Skipped without torch."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest
from flashspark.mods import scalar
from problems import offsets, pages

torch = pytest.importorskip("torch")
torch_ops = pytest.importorskip("flashspark.torch_ops")
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402 - it needs torch
from torch.autograd import forward_ad  # noqa: E402
from torch_arrays import moved  # noqa: E402

H, D = 4, 16
LENGTHS = [(12, 30), (1, 17), (20, 20)]
make = torch.Generator().manual_seed(3)
SLOPES = torch.rand(H, generator=make)
TOKENS = torch.randn(128, generator=make)
CAPTURED = torch.randn(H, 64, generator=make)
FACTOR, WEIGHT = scalar(0.75), 3


def weighted(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    distance = q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q - kv_idx
    return score * FACTOR - aux_tensors[0][h_idx] * abs(distance) + aux_tensors[1][kv_idx + seqlen_info.offset_k]


def numbered(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
    return score * aux_scalars[0] + aux_scalars[1] * (kv_idx % 3)


def capturing(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + CAPTURED[h_idx, kv_idx] * WEIGHT


def near(b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (abs(q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q - kv_idx) < 9) | (kv_idx < h_idx)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=make).to(dtype)


def dense(dtype=torch.float32, batch=2, rows=20, keys=40):
    q, *kv = normal(batch, rows, H, D, dtype=dtype), *(normal(batch, keys, 2, D, dtype=dtype) for _ in range(2))
    return q, *kv


def lists(rows=20, keys=40, size=16):
    kinds = np.random.default_rng(2).integers(0, 3, (1, 1, -(-rows // size), -(-keys // size)))
    kinds[..., 0] = 1
    parts = []
    for kind in (1, 2):
        order = np.argsort(kinds != kind, axis=-1, kind="stable").astype(np.int32)
        parts += [torch.from_numpy((kinds == kind).sum(-1).astype(np.int32)), torch.from_numpy(order)]
    return flashspark.BlockSparseTensors(*parts, (size, size))


def packed_call():
    q = normal(sum(x for x, _ in LENGTHS), H, D)
    k, v = (normal(sum(x for _, x in LENGTHS), 2, D) for _ in range(2))
    cu = [torch.from_numpy(offsets([x[i] for x in LENGTHS])) for i in range(2)]
    return "flash_attn_varlen_func", (q, k, v, *cu, 20, 30)


def cache_call():
    q = normal(3, 2, H, D)
    rows = [[normal(n, 2, D).numpy() for _, n in LENGTHS] for _ in range(2)]
    k, v, table = map(moved, pages(np.random.default_rng(1), *rows, 16))
    lengths = torch.tensor([n for _, n in LENGTHS], dtype=torch.int32)
    options = {"cache_seqlens": lengths, "block_table": table}
    return "flash_attn_with_kvcache", (q, k, v), options


CALLS = {
    "score": ("flash_attn_func", dense(), {"score_mod": weighted, "aux_tensors": [SLOPES, TOKENS]}),
    "mask": ("flash_attn_func", dense(torch.bfloat16), {"mask_mod": near, "causal": True}),
    "both": ("flash_attn_func", dense(), {"score_mod": weighted, "mask_mod": near, "aux_tensors": [SLOPES, TOKENS]}),
    "numbers": ("flash_attn_func", dense(), {"score_mod": numbered, "aux_scalars": [0.5, 2]}),
    "captured": ("flash_attn_func", dense(), {"score_mod": capturing, "softcap": 3.0}),
    "lists": ("flash_attn_func", dense(), {"block_sparse_tensors": lists()}),
    "lists and mask": ("flash_attn_func", dense(), {"mask_mod": near, "block_sparse_tensors": lists()}),
    "packed": (*packed_call(), {"score_mod": weighted, "aux_tensors": [SLOPES, TOKENS]}),
    "cache": (*cache_call()[:2], {**cache_call()[2], "score_mod": weighted, "aux_tensors": [SLOPES, TOKENS]}),
    "dropout": ("flash_attn_func", dense(), {"score_mod": capturing, "dropout_p": 0.5, "rng_state": (5, 6)}),
}


def both(name, args, options):
    """(out, lse) of the package's own function, and through the operators."""
    return [getattr(module, name)(*args, return_softmax_lse=True, **options) for module in (flashspark, torch_ops)]


def equal(results, others):
    return all(torch.equal(x, y) for x, y in zip(results, others))


@pytest.mark.parametrize("call", CALLS)
def test_eagerly(call):
    assert equal(*both(*CALLS[call]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", CALLS)
def test_compiled_in_one_graph(call, backend):
    name, args, options = CALLS[call]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def model(*args, **options):
        out, lse = getattr(torch_ops, name)(*args, return_softmax_lse=True, **options)
        return out * 2, lse

    for _ in range(2):
        out, lse = model(*args, **options)
        assert equal((out / 2, lse), both(name, args, options)[0])
    assert counter.frame_count == 1
    assert sum("attention_functions" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes) == 1


@pytest.mark.parametrize("module", [flashspark, torch_ops])
@pytest.mark.parametrize("place", ["q", "captured"])
def test_no_tangent_is_lost(module, place):
    (q, k, v), slopes = dense(), SLOPES.clone()

    def function(q, slopes):
        return module.flash_attn_func(q, k, v, score_mod=weighted, aux_tensors=[slopes, TOKENS])

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="tensor with a tangent"):
        function(
            forward_ad.make_dual(q, torch.ones_like(q)) if place == "q" else q,
            slopes if place == "q" else forward_ad.make_dual(slopes, torch.ones_like(slopes)),
        )
    one, other = (q, slopes) if place == "q" else (slopes, q)
    of_one = (lambda x: function(x, other)) if place == "q" else (lambda x: function(other, x))
    with pytest.raises(NotImplementedError, match="tensor with a tangent"):
        torch.func.jvp(of_one, (one,), (torch.ones_like(one),))


def compiled(counter="eager"):
    """flash_attn_func of tensors with a function, compiled anew."""
    torch._dynamo.reset()
    return torch.compile(
        lambda args, score, aux, **more: torch_ops.flash_attn_func(*args, score_mod=score, aux_tensors=aux, **more),
        fullgraph=True,
        backend=counter,
    )


def test_contents_may_change_without_compiling():
    counter = CompileCounterWithBackend("eager")
    args, aux, model = dense(), [SLOPES.clone(), TOKENS.clone()], compiled(counter)
    for _ in range(3):
        assert torch.equal(
            model(args, weighted, aux), flashspark.flash_attn_func(*args, score_mod=weighted, aux_tensors=aux)
        )
        aux = [aux[0] * 2, aux[1] + 1]
    kept = CAPTURED.clone()
    model(args, capturing, None)
    count = counter.frame_count
    CAPTURED.mul_(2)
    try:
        assert torch.equal(model(args, capturing, None), flashspark.flash_attn_func(*args, score_mod=capturing))
    finally:
        CAPTURED.copy_(kept)
    assert counter.frame_count == count == 2


@pytest.mark.parametrize("numbers", [(1, 2, 3, -4), (0.5, 0.25, 1.0), (True, False), ("a", "b")])
def test_functions_with_the_same_code_are_told_apart(numbers):
    def of(number):
        def score(s, b, h, q, k, info, aux):
            return s * (ord(number) - 96 if isinstance(number, str) else number)

        return score

    args, model = dense(), compiled()
    for score in (*map(of, numbers), of(numbers[0])):
        assert torch.equal(model(args, score, None), flashspark.flash_attn_func(*args, score_mod=score))


def test_what_a_function_refers_to_is_guarded(monkeypatch):
    """Numbers of modules, scalars, and functions that are called."""
    args, model = dense(), compiled()

    def same(score, aux=None):
        return torch.equal(model(args, score, aux), flashspark.flash_attn_func(*args, score_mod=score, aux_tensors=aux))

    assert same(capturing) and same(weighted, [SLOPES, TOKENS])
    before = model(args, capturing, None)
    monkeypatch.setitem(globals(), "WEIGHT", 5)
    assert same(capturing) and not torch.equal(model(args, capturing, None), before)
    monkeypatch.setattr(FACTOR, "value", 0.25)
    assert same(weighted, [SLOPES, TOKENS])


def test_functions_made_in_the_graph():
    args, number = dense(), 2

    def model(q, k, v, slopes):
        def score(s, b, h, q, k, info, aux):
            return s + aux[0][h] * (k - q) * number

        return torch_ops.flash_attn_func(q, k, v, score_mod=score, aux_tensors=[slopes])

    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for slopes in (SLOPES, SLOPES * 2):
        assert torch.equal(fast(*args, slopes), model(*args, slopes))


def test_shapes_of_tensors_that_a_function_reads():
    def last(s, b, h, q, k, info, aux):
        return s + aux[0][aux[0].shape[0] - 1 - k % 8]

    args, model = dense(), compiled()
    for count in (8, 20, 31):
        aux = [TOKENS[:count].clone()]
        want = flashspark.flash_attn_func(*args, score_mod=last, aux_tensors=aux)
        assert torch.equal(model(args, last, aux), want)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict):
    """The operator holds the functions' texts, so that a program needs no Python of theirs."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v, slopes, tokens):
            return torch_ops.flash_attn_func(
                q, k, v, score_mod=weighted, mask_mod=near, aux_tensors=[slopes, tokens], causal=True
            )

    args = (*dense(), SLOPES, TOKENS)
    program = torch.export.export(Model(), args, strict=strict)
    assert torch.equal(program.module()(*args), Model()(*args))


def test_dynamic_shapes():
    counter = CompileCounterWithBackend("eager")
    model, aux = compiled(counter), [SLOPES, TOKENS]
    for rows, keys in ((20, 40), (21, 41), (30, 55), (33, 60)):
        args = dense(rows=rows, keys=keys)
        want = flashspark.flash_attn_func(*args, score_mod=weighted, aux_tensors=aux)
        assert torch.equal(model(args, weighted, aux), want)
    assert counter.frame_count == 2


def test_given_results():
    args, options = dense(), {"score_mod": weighted, "aux_tensors": [SLOPES, TOKENS]}
    want, want_lse = flashspark.flash_attn_func(*args, return_softmax_lse=True, **options)
    out, lse = torch.empty_like(args[0]), torch.empty(2, H, 20)
    torch._dynamo.reset()
    for function in (torch_ops.flash_attn_func, torch.compile(torch_ops.flash_attn_func, backend="eager")):
        out.zero_(), lse.zero_()
        got = function(*args, out=out, lse=lse, return_softmax_lse=True, **options)
        assert got[0] is out and equal(got, (want, want_lse)) and equal((out, lse), (want, want_lse))


def operands(call):
    """The arguments that the operator is called with."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "attention_functions" in str(function):
                seen.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    name, args, options = CALLS[call]
    with Watch():
        getattr(torch_ops, name)(*args, return_softmax_lse=True, **options)
    return seen[0]


@pytest.mark.parametrize("call", CALLS)
def test_schema_and_fake_kernel(call):
    operator, args, kwargs = operands(call)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, args, kwargs, test_utils=tests)


def test_meta_tensors():
    args = [x.to("meta") for x in dense()]
    aux = [SLOPES.to("meta"), TOKENS.to("meta")]
    out, lse = torch_ops.flash_attn_func(*args, score_mod=weighted, aux_tensors=aux, return_softmax_lse=True)
    assert out.device.type == "meta" and out.shape == (2, 20, H, D) and lse.shape == (2, H, 20)
    with pytest.raises(ValueError, match=r"score_mod's tensor 1\.device = cpu: must be the device of q, meta"):
        torch_ops.flash_attn_func(*args, score_mod=weighted, aux_tensors=[aux[0], TOKENS])


def trained(call, function, wanted=("q", "k", "v", "aux")):
    """Gradients of a call's tensors, of those in `wanted`, from those of out and of lse."""
    name, args, options = CALLS[call]
    leaves = dict(zip(("q", "k", "v"), (x.clone() for x in args[:3])))
    aux = [x.clone() for x in options.get("aux_tensors", ())]
    tensors = [x.requires_grad_() for word, x in leaves.items() if word in wanted]
    tensors += [x.requires_grad_() for x in aux if "aux" in wanted]
    options = options | ({"aux_tensors": aux} if aux else {})
    out, lse = function(name)(*leaves.values(), *args[3:], return_softmax_lse=True, **options)
    (out.float().square().sum() + lse.sin().sum()).backward()
    return [x.grad for x in tensors]


DIFFERENTIABLE = [call for call in CALLS if call != "cache"]


@pytest.mark.parametrize("how", ["operators", "eager", "aot_eager"])
@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_gradients_are_those_of_the_package(call, how):
    want = trained(call, lambda name: getattr(flashspark, name))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(how) if how != "operators" else None

    def operators(name):
        function = getattr(torch_ops, name)
        return function if counter is None else torch.compile(function, fullgraph=True, backend=counter)

    got = trained(call, operators)
    assert all(x is not None and x.abs().max() > 0 for x in got) and equal(got, want)
    assert counter is None or counter.frame_count == 1


@pytest.mark.parametrize("how", ["operators", "aot_eager"])
@pytest.mark.parametrize("wanted", [("q",), ("k", "v"), ("aux",)])
def test_gradients_of_some_tensors(wanted, how):
    torch._dynamo.reset()

    def operators(name):
        function = getattr(torch_ops, name)
        return function if how == "operators" else torch.compile(function, fullgraph=True, backend=how)

    got = trained("both", operators, wanted)
    assert got and equal(got, trained("both", lambda name: getattr(flashspark, name), wanted))


@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_schema_and_fake_kernel_of_the_backward_pass(call):
    operator, args, kwargs = operands(call)
    q, k, v, *rest = (x.clone().requires_grad_() if i < 3 else x for i, x in enumerate(args))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (q, k, v, *rest), kwargs, test_utils=tests)


def test_gradients_that_are_not_computed_are_refused():
    q, k, v = dense()
    q.requires_grad_()
    given = {"score_mod": weighted, "aux_tensors": [SLOPES, TOKENS]}
    with pytest.raises(ValueError, match=r"q\.requires_grad = True.*no_grad"):
        torch_ops.flash_attn_func(q, k, v, out=torch.empty(q.shape), **given)
    with torch.no_grad():
        torch_ops.flash_attn_func(q, k, v, out=torch.empty(q.shape), **given)
    name, args, options = CALLS["cache"]
    aux = [SLOPES.clone().requires_grad_(), TOKENS]
    with pytest.raises(ValueError, match=r"captured tensor\.requires_grad = True.*for flash_attn_with_kvcache"):
        getattr(torch_ops, name)(*args, **(options | {"aux_tensors": aux}))
    out = torch_ops.flash_attn_func(q, k, v, **given)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def detaching(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + aux_tensors[0][h_idx].detach()


@pytest.mark.parametrize("compile", [False, True])
def test_functions_that_detach_are_refused(compile):
    torch._dynamo.reset()
    function = torch_ops.flash_attn_func
    function = torch.compile(function, backend="eager", fullgraph=True) if compile else function
    q, k, v = dense()
    assert not function(q, k, v, score_mod=detaching, aux_tensors=[SLOPES]).requires_grad
    errors = (NotImplementedError, torch._dynamo.exc.TorchDynamoException)
    for tensors, slopes in (((q.clone().requires_grad_(), k, v), SLOPES), ((q, k, v), SLOPES.clone().requires_grad_())):
        with pytest.raises(errors if compile else NotImplementedError, match=r"which calls detach\(\)"):
            function(*tensors, score_mod=detaching, aux_tensors=[slopes])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"score_mod": weighted, "aux_tensors": [SLOPES.numpy()]},
            TypeError,
            r"aux_tensors\[0\] = ndarray: must be a torch",
        ),
        ({"score_mod": weighted}, flashspark.TraceError, "the call gives 0"),
        ({"aux_tensors": [SLOPES]}, ValueError, "aux_tensors = 1 values: must be None without score_mod"),
        (
            {"score_mod": lambda s, b, h, q, k, n, a: s if s > 0 else -s},
            flashspark.TraceError,
            "`if`: write torch.where",
        ),
        ({"block_sparse_tensors": lists(rows=9)}, ValueError, r"block_sparse_tensors\.mask_block_cnt\.shape"),
    ],
)
def test_errors(options, error, match, compile):
    torch._dynamo.reset()
    function = torch_ops.flash_attn_func
    function = torch.compile(function, backend="eager", fullgraph=True) if compile else function
    with pytest.raises((error, torch._dynamo.exc.TorchDynamoException) if compile else error, match=match):
        function(*dense(), **options)
