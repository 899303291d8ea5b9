"""Checks of flashspark in SGLang's own files; test_integrations_sglang.py runs this and reads what it prints.

sglang_checks.py FOLDER: FOLDER has SGLang's Python files; prints JSON: check -> "" or what went wrong
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = sys.argv[1:2]

import sglang_argument_checks as on_arguments  # noqa: E402
import sglang_world as world  # noqa: E402
import torch  # noqa: E402

FP8 = torch.float8_e4m3fn
LINEAR = ("linear.gdn_backend", "linear.kda_backend", "linear.lightning_backend", "linear.utils")
CHECKS = {}


def check(function, **options):
    CHECKS[" ".join([function.__name__, *(str(x) for x in options.values())])] = lambda: function(**options)
    return function


def registry():
    from sglang.srt.layers.attention import attention_registry

    return attention_registry


class Requests:
    """Some requests on a backend, whose every result is compared with attention in float64."""

    def __init__(self, model, backend=None, sinks=None, **layer):
        self.model, self.backend = model, backend or registry().ATTENTION_BACKENDS["flashspark"](model.runner)
        self.layer = model.layer(**layer)
        self.options = {} if sinks is None else {"sinks": sinks}
        self.keys = [torch.zeros(0, 2, model.head_dim) for _ in range(3)]
        self.values = [torch.zeros(0, 2, model.v_head_dim) for _ in range(3)]

    def step(self, mode, new, keep=True, prepare=None, spec_info=None, sees=None):
        """One batch of new[r] tokens of request r. sees(r): (rows, keys) bools, instead of the causal mask."""
        before = [len(x) for x in self.keys]
        batch = self.model.batch(mode, before, new, spec_info)
        (prepare or self.backend.init_forward_metadata)(batch)
        q, k, v = self.model.random(sum(new))
        keys = [torch.cat(x) for x in zip(self.keys, self.stored(k, self.layer.k_scale).split(new))]
        values = [torch.cat(x) for x in zip(self.values, self.stored(v, self.layer.v_scale).split(new))]
        out = self.backend.forward(q, k.clone(), v.clone(), self.layer, batch, **self.options)
        rows = zip(range(3), q.view(sum(new), 4, -1).split(new), out.view(sum(new), 4, -1).split(new))
        for r, mine, result in rows:
            want = self.attention(mine, keys[r], values[r], sees and sees(r))
            error = (result.double() - want).abs().max().item() if len(mine) else 0
            assert error < (1e-5 if self.model.dtype == torch.float32 else 2e-2), f"{mode}, request {r}: {error}"
        if keep:
            self.keys, self.values = keys, values
        return batch

    def stored(self, x, scale):
        """What an fp8 cache makes of it."""
        return x.float() if scale is None else (x / scale).to(FP8).float() * scale

    def attention(self, q, k, v, sees):
        layer, n = self.layer, len(k)
        at, other = torch.arange(n - len(q), n)[:, None], torch.arange(n)[None]
        if sees is None:
            sees = other <= at
        if layer.sliding_window_size > 0:
            sees = sees & (other >= at - layer.sliding_window_size)
        k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * layer.scaling
        if layer.logit_cap:
            scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
        scores = scores.masked_fill(~sees, -math.inf)
        sinks = self.options.get("sinks")
        extra = torch.full((4,), -math.inf) if sinks is None else sinks
        extra = extra.double()[:, None, None].expand(4, len(q), 1)
        p = torch.cat([scores, extra], dim=2).softmax(dim=2)[:, :, :-1]
        return torch.einsum("hqk,khd->qhd", p, v)

    def all_modes(self):
        self.step("EXTEND", [70, 3, 20])
        self.step("EXTEND", [5, 33, 1])  # another chunk, whose prefix is in the cache
        self.step("MIXED", [1, 17, 1])
        for _ in range(2):
            self.step("DECODE", [1, 1, 1])


def modes(page_size, dtype):
    """Extend, chunks, mixed, decode."""
    Requests(world.Model(page_size, getattr(torch, dtype))).all_modes()


for size in (1, 16, 64):
    for kind in ("float32", "bfloat16"):
        check(modes, page_size=size, dtype=kind)


def features(page_size, feature):
    window = {"sliding_window_size": 24}
    layers = {"window": window, "window pool": window, "softcap": {"logit_cap": 2.0}}
    models = {
        "window": {"window": 24},
        "window pool": {"window": 24, "window_pool": True},
        "head sizes": {"v_head_dim": 16},
    }
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if feature == "sinks" else None
    Requests(world.Model(page_size, **models.get(feature, {})), None, sinks, **layers.get(feature, {})).all_modes()


for size in (1, 16, 64):
    for name in ("window", "window pool", "softcap", "sinks", "head sizes"):
        check(features, page_size=size, feature=name)


def fp8_cache(page_size):
    """An e4m3 cache with scales, and queries in the model's type."""
    requests = Requests(world.Model(page_size, torch.bfloat16, FP8))
    requests.layer.k_scale, requests.layer.v_scale = torch.tensor(0.5), torch.tensor(2.0)
    requests.all_modes()


check(fp8_cache, page_size=1)
check(fp8_cache, page_size=16)


def target_verify(page_size):
    """Speculation along a chain of four tokens."""
    world.speculate(topk=1, draft_tokens=4)
    requests = Requests(world.Model(page_size))
    requests.step("EXTEND", [70, 3, 20])
    requests.step("TARGET_VERIFY", [4, 4, 4], keep=False, spec_info=SimpleNamespace())
    requests.step("TARGET_VERIFY", [4, 4, 4], spec_info=SimpleNamespace())


def target_verify_tree(page_size):
    """Speculation along a tree: the prefix and the tree are two calls, whose results are merged."""
    world.speculate(topk=2, draft_tokens=4)
    requests = Requests(world.Model(page_size))
    requests.step("EXTEND", [70, 3, 20])
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()

    def sees(r):
        return torch.cat([torch.ones(4, len(requests.keys[r]), dtype=torch.bool), tree], dim=1)

    info = SimpleNamespace(custom_mask=torch.cat([sees(r).flatten() for r in range(3)]))
    algorithm = SimpleNamespace(is_uno=lambda: False)

    def prepare(batch):
        batch.spec_algorithm = algorithm
        requests.backend.init_forward_metadata(batch)

    requests.step("TARGET_VERIFY", [4, 4, 4], spec_info=info, sees=sees, prepare=prepare)


for size in (1, 16, 64):
    check(target_verify, page_size=size)
    check(target_verify_tree, page_size=size)


def captured_graph(page_size):
    """What a captured decode reads stays where it is, and is right at other lengths."""
    requests = Requests(world.Model(page_size))
    backend = requests.backend
    backend.init_cuda_graph_state(4, 4)
    requests.step("EXTEND", [1, 1, 1])
    held = []

    def capture(batch):
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)
        held.append(backend.forward_metadata)

    def replay(batch):
        backend.init_forward_metadata_out_graph(batch)
        assert backend.forward_metadata is held[0], "a replay has other metadata than the capture"

    requests.step("DECODE", [1, 1, 1], keep=False, prepare=capture)
    assert held[0].scheduler_metadata is None
    places = [x.data_ptr() for x in (held[0].page_table, held[0].cache_seqlens_int32)]
    requests.step("EXTEND", [70, 3, 20])
    for _ in range(2):
        requests.step("DECODE", [1, 1, 1], prepare=replay)
    assert places == [x.data_ptr() for x in (held[0].page_table, held[0].cache_seqlens_int32)]


for size in (1, 16, 64):
    check(captured_graph, page_size=size)


@check
def draft():
    """The draft's backends, from SGLang's factory: three steps of decoding, two of which have attention."""
    from sglang.srt.speculative import draft_utils

    world.speculate(topk=1, draft_tokens=4)
    draft_utils.attention_backends = lambda: ("flashspark", "flashspark")
    draft_utils.get_spec = lambda: SimpleNamespace(speculative_attention_mode="prefill")
    model = world.Model(16)
    model.runner.draft_attention_backend = None
    model.runner.model_config.hf_config = SimpleNamespace()
    factory = draft_utils.DraftBackendFactory(model.runner, 1, 3)
    extend, decode = factory.create_draft_extend_backend(), factory.create_decode_backend()
    assert [type(x).__name__ for x in (extend, decode, *decode.attn_backends)] == [
        "FlashSparkBackend", "FlashSparkMultiStepBackend", "FlashSparkBackend", "FlashSparkBackend",
    ]  # fmt: skip
    assert [x.speculative_step_id for x in decode.attn_backends] == [0, 1] and decode.speculative_num_steps == 3
    assert {x.decode_attention_backend_str for x in (extend, *decode.attn_backends)} == {"flashspark"}
    requests = Requests(model, extend)
    requests.step("EXTEND", [70, 3, 20])
    requests.step("DRAFT_EXTEND_V2", [4, 4, 4])
    for requests.backend in decode.attn_backends:
        requests.backend.init_forward_metadata(draft_batch(requests, requests.backend.speculative_step_id))
        requests.step("DECODE", [1, 1, 1], prepare=lambda batch: None)


def draft_batch(requests, step):
    """SGLang prepares all steps from the lengths before the first."""
    before = [len(x) - step for x in requests.keys]
    batch = requests.model.batch("DECODE", before, [1, 1, 1], SimpleNamespace())
    batch.seq_lens, batch.seq_lens_cpu = torch.tensor(before), torch.tensor(before)
    return batch


@check
def embeddings():
    """Without a cache: the keys of the batch, from the tensors that the model gives."""
    world.State.bags["get_model"].is_embedding = True
    requests = Requests(world.Model(16))
    world.State.bags["get_model"].is_embedding = False
    assert requests.backend.fa_skip_kv_cache
    requests.step("EXTEND", [70, 3, 20])


@check
def deterministic():
    """--enable-deterministic-inference reaches every call, as one split, which flashspark is told to be exact about."""
    flag = world.State.bags["get_exec"].deterministic
    flag.enable_deterministic_inference = True
    requests = Requests(world.Model(16, torch.bfloat16))
    flag.enable_deterministic_inference = False
    from flashspark.integrations import _sglang_backend as ours

    with mock.patch.object(ours._cache, "flash_attn_with_kvcache", wraps=ours._cache.flash_attn_with_kvcache) as called:
        requests.all_modes()
    asked = {(call.kwargs["num_splits"], call.kwargs["deterministic"]) for call in called.call_args_list}
    assert asked == {(1, True)}, asked


@check
def built_by_sglang():
    """What SGLang builds from the name, as its model runner does."""
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup as setup

    model = world.Model(16)
    model.runner.model_config.hf_config = SimpleNamespace(architectures=["LlamaForCausalLM"])
    registry().mambaish_config = lambda config: None
    registry().hybrid_gdn_config = lambda config: None
    resolved = setup.ResolvedAttentionBackendStr(prefill="flashspark", decode="flashspark")
    backend = setup._build_resolved_backend(model_runner=model.runner, resolved=resolved, init_new_workspace=False)
    assert type(backend).__name__ == "FlashSparkBackend"
    Requests(model, backend).all_modes()


@check
def hybrid_on_blackwell():
    """SGLang's list of backends of hybrid models on SM12x has no place for plug-ins; flashspark goes as a peer."""
    import sglang.srt.utils

    for name in (*LINEAR, "hybrid_linear_attn_backend"):  # of Triton kernels, which there are none of here
        sys.modules[f"{registry().__package__}.{name}"] = world._Absent(name)
    sys.modules["sglang.kernels.ops.attention.fla.utils"] = world._Absent("utils")
    names = registry()
    names.hybrid_gdn_config = names.mambaish_config = lambda config: SimpleNamespace(full_attention_layer_ids=[3])
    names.get_platform = lambda: SimpleNamespace(is_sm120=True)
    sglang.srt.utils.is_blackwell = lambda: True
    sys.modules[f"{names.__package__}.hybrid_linear_attn_backend"].HybridLinearAttnBackend = lambda *parts: parts
    model = world.Model(16)
    model.runner.model_config.hf_config = SimpleNamespace(architectures=["Qwen3NextForCausalLM"])
    full = names.ATTENTION_BACKENDS["flashspark"](model.runner)
    assert names.attn_backend_wrapper(model.runner, full)[::2] == (full, [3])
    assert model.runner.prefill_attention_backend_str == model.runner.decode_attention_backend_str == "flashspark"
    for wrapper, name in ((names.attn_backend_wrapper, "fa3"), (names.attn_backend_wrapper.__wrapped__, "flashspark")):
        model.runner.decode_attention_backend_str = name
        try:
            wrapper(model.runner, full)
        except AssertionError as error:
            assert "supported on Blackwell" in str(error)
        else:
            raise AssertionError(f"SGLang accepts {name}: is the hook still needed?")


@check
def refusals():
    """What flashspark does not compute is refused when the backend is built, with what to do instead."""
    build = registry().ATTENTION_BACKENDS["flashspark"]

    def refused(text, model, **changes):
        vars(model.runner).update(changes)
        try:
            build(model.runner)
        except NotImplementedError as error:
            assert text in str(error) and "use --attention-backend triton" in str(error), error
        else:
            raise AssertionError(f"{text}: not refused")

    refused("MLA", world.Model(), use_mla_backend=True)
    refused("mxfp8", world.Model(), kv_cache_dtype_str="mxfp8")
    refused("k_cache.dtype", world.Model(), kv_cache_dtype=torch.float8_e5m2)
    refused("multiple of 8", world.Model(head_dim=36))


@check
def others_are_untouched():
    """Calls of another backend in the process go to SGLang's own function, and so does its import."""
    from sglang.kernels.ops.attention import flash_attention
    from sglang.srt.layers.attention import flashattention_backend as stock

    world.Model()
    registry().ATTENTION_BACKENDS["flashspark"](world.Model().runner)
    assert stock.flash_attn_with_kvcache.__wrapped__ is flash_attention.flash_attn_with_kvcache
    asked, flash_attention.fa3_flash_attn_with_kvcache = [], lambda *args, **kwargs: asked.append(args)
    stock.flash_attn_with_kvcache("q", "k", "v", ver=3)
    assert asked == [("q", "k", "v")]
    import sgl_kernel.flash_attn

    assert isinstance(sgl_kernel.flash_attn, world._Absent), "flashspark stayed in sgl_kernel.flash_attn"


for of_arguments in (on_arguments.arguments, on_arguments.resolved_arguments, on_arguments.checks_of_models):
    check(of_arguments)


def main() -> None:
    world.enter()
    from sglang.srt.plugins import load_plugins

    assert "flashspark" not in registry().ATTENTION_BACKENDS
    load_plugins()
    assert "flashspark.integrations._sglang_backend" not in sys.modules, "imported before it is chosen"
    results = {}
    for name, function in CHECKS.items():
        world.speculate()
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
