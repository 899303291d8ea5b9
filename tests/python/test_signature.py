"""The public functions agree with the table of the native calls' arguments: names, order, fallbacks."""

from __future__ import annotations

import inspect

import flashspark
import numpy as np
import pytest
from flashspark import _call, _scheduler_metadata
from flashspark._signature import APPEND, ATTENTION, HEAD, REQUIRED, SCHEDULE, TAIL

# Arguments of the functions that the native call does not have: other spellings, and what Python handles itself.
SPELLINGS = {"s_aux", "learnable_sink", "page_table", "return_lse", "return_softmax_lse", "return_attn_probs", "qv"}
SETTLED = {"window_size", "explain", "strict", "pack_gqa", "sm_margin", "_attend", "_append"}
FUNCTIONS = {"score_mod", "mask_mod", "aux_tensors", "aux_scalars", "block_sparse_tensors"}  # of scores and positions
# Arguments of the native call that a function does not offer.
NOT_OFFERED = {
    "flash_attn_func": {
        *("cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k", "max_seqlen_k", "block_table", "leftpad_k"),
        *("kv_batch_index",),
    },
    "flash_attn_varlen_func": {"leftpad_k", "kv_batch_index"},
    "flash_attn_with_kvcache": {"cu_seqlens_k", "dropout_p", "rng_state"},
}
FACES = {"flash_attn_func": 0, "flash_attn_varlen_func": 0, "flash_attn_with_kvcache": 1}
APPENDED = {"k", "v", "rotary_cos", "rotary_sin", "cu_seqlens_k_new", "rotary_interleaved", "rotary_seqlens"}


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", FACES)
def test_functions_offer_every_argument(name):
    offered = set(parameters(getattr(flashspark, name))) - SPELLINGS - SETTLED - FUNCTIONS
    words = {word for word in ATTENTION.words[FACES[name]] if not word.startswith("window_size[")}
    extra = APPENDED if name == "flash_attn_with_kvcache" else set()
    assert offered - extra == words - {"face", "stored_as"} - NOT_OFFERED[name]


def test_append_and_schedule_offer_every_argument():
    assert set(parameters(flashspark.append_kv)) - {"page_table", "strict"} == set(APPEND.names) - {"stored_as"}
    ignored = {"window_size", "pack_gqa", "sm_margin", "page_size", "cu_seqlens_k_new", "max_seqlen_k_new"}
    words = {word for word in SCHEDULE.words[0] if not word.startswith("window_size[")}
    assert set(parameters(flashspark.get_scheduler_metadata)) - ignored == words


@pytest.mark.parametrize("name", FACES)
def test_defaults_are_the_fallbacks(name):
    offered = parameters(getattr(flashspark, name))
    for word, fallback in zip(ATTENTION.words[FACES[name]], ATTENTION.fallbacks):
        if word in offered and fallback is not REQUIRED and offered[word].default is not inspect.Parameter.empty:
            assert offered[word].default == fallback, word


@pytest.mark.parametrize("name", [*FACES, "_flash_attn_fwd"])
def test_arguments_arrive_in_their_places(name, monkeypatch):
    """Every argument gets a distinct value, which the native call must receive at the position that the table
    states."""
    face = FACES.get(name, 2)
    function, seen = getattr(flashspark, name), {}

    def attend(face_given, tensors, out, lse, want_lse, mode, head, tail, *_):
        seen.update(zip(ATTENTION.names, (face_given, 0, *tensors, out, lse, *head, *tail)))
        return out, lse

    skipped = SPELLINGS - {"learnable_sink"} if face == 2 else SPELLINGS
    own = {}
    for word, parameter in parameters(function).items():
        kept = parameter.kind is not parameter.VAR_KEYWORD and word not in skipped | SETTLED | APPENDED - {"k", "v"}
        kept = kept and word != "dropout_p"  # which is read before the call: test_dropout_arrives
        if kept and word not in FUNCTIONS | {"compile_only", "num_threads"}:
            own[word] = np.array([len(own)], np.int32)
    if face == 1:
        own.pop("k"), own.pop("v")
    if face == 2:
        own.pop("window_size_left"), own.pop("window_size_right")
        monkeypatch.setattr(inspect.getmodule(function), "attend", attend)
        function(**own)
    else:
        own["window_size"] = ("left", "right")
        if name == "flash_attn_varlen_func":
            own["cu_seqlens_k"] = None
        function(**own, _attend=attend)
        assert seen["window_left"] == "left" and seen["window_right"] == "right"
    assert seen["face"] == face
    for field, word in zip(ATTENTION.names, ATTENTION.words[face]):
        if word in own:
            assert seen[field] is own[word], (field, word)
    assert HEAD < TAIL == HEAD + 9


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
@pytest.mark.parametrize("others", [{}, {"sinks": "sinks"}, {"check_device": True}])
def test_dropout_arrives(name, others):
    seen = {}

    def attend(face_given, tensors, out, lse, want_lse, mode, head, tail, *_):
        seen.update(zip(ATTENTION.names[TAIL:], tail))
        return out, lse

    state = np.zeros(2, np.int64)
    lengths = {"cu_seqlens_q": 1, "cu_seqlens_k": None, "max_seqlen_q": 1, "max_seqlen_k": 1}
    given = lengths if name == "flash_attn_varlen_func" else {}
    function = getattr(flashspark, name)
    function(0, 0, 0, **given, dropout_p=np.float32(0.25), rng_state=state, **others, _attend=attend)
    assert seen["dropout_p"] == 0.25 and seen["rng_state"] is state
    assert all(seen[word] == value for word, value in others.items())
    seen.clear()
    function(0, 0, 0, **given, dropout_p=0, **others, _attend=attend)
    assert "dropout_p" not in seen and "rng_state" not in seen


def test_what_append_and_schedule_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(flashspark._cache, "_append_quickly", lambda values: seen.append(values) or True)
    own = {name: np.zeros(1) for name in parameters(flashspark.append_kv) if name not in ("page_table", "strict")}
    flashspark.append_kv(**own)
    assert all(value is own[name] for name, value in zip(APPEND.names[1:], seen[0][1:], strict=True))
    monkeypatch.setattr(_scheduler_metadata, "_run", lambda values: seen.append(values) or 0)
    own = {name: np.zeros(1) for name in SCHEDULE.names if name not in ("window_left", "window_right", "qkv_dtype")}
    flashspark.get_scheduler_metadata(**own, window_size=("left", "right"))
    own |= {"window_left": "left", "window_right": "right", "qkv_dtype": 3}
    assert all(value is own[name] or value == own[name] for name, value in zip(SCHEDULE.names, seen[1], strict=True))


def test_names_that_other_generations_look_for():
    """transformers inspects the signature; FlashAttention 2, 3 and 4 use different names for the same argument."""
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        offered = parameters(getattr(flashspark, name))
        for word in (
            *("softcap", "window_size", "deterministic", "s_aux", "learnable_sink", "softmax_scale", "causal"),
            *("attention_chunk", "pack_gqa", "sm_margin", "num_splits", "return_lse", "return_softmax_lse", "qv"),
            *("score_mod", "mask_mod", "aux_tensors"),
        ):
            assert word in offered, (name, word)
    first = list(parameters(flashspark.flash_attn_func))[:11]
    assert first == [
        *("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"),
        *("deterministic", "return_attn_probs"),
    ]


def test_the_tail_without_arguments():
    assert all(fallback is None or not fallback for fallback in _call.ATTENTION.fallbacks[TAIL:])
