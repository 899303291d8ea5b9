"""attn_implementation="flashspark" of Hugging Face transformers, against its eager attention. CPU, float32."""

from __future__ import annotations

import importlib.util
import os

import pytest

for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flashspark.integrations.transformers  # noqa: E402
import tiny_models as tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from flashspark.integrations import _transformers_attention as ours  # noqa: E402
from flashspark.integrations import _transformers_masks as masks  # noqa: E402

torch.set_num_threads(1)  # threads of OpenMP spin while they wait, on a machine that other tests share
flashspark.integrations.transformers.register()
CAUSAL = list(tiny.CAUSAL)


@pytest.fixture(scope="module")
def models():
    """Each model once; set(name, attention) switches it."""
    known = {}

    def get(name, attention):
        if name not in known:
            known[name] = tiny.build(getattr(tiny, name))
        known[name].set_attn_implementation(attention)
        assert known[name].config._attn_implementation == attention
        return known[name]

    return get


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that attention called."""
    made = []
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        real = getattr(flashspark, name)

        def counted(*args, _name=name, _real=real, **kwargs):
            made.append(_name.removeprefix("flash_attn_"))
            return _real(*args, **kwargs)

        monkeypatch.setattr(flashspark, name, counted)
    return made


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def both(models, name, **inputs):
    return [logits(models(name, attention), **inputs) for attention in ("flashspark", "eager")]


def close(got, want, kept=None):
    kept = slice(None) if kept is None else kept.bool()
    torch.testing.assert_close(got[kept], want[kept], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padding(models, calls, name, side):
    ids, mask = tiny.padded([23, 23, 23] if side == "none" else [23, 5, 14], side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": tiny.position_ids(mask)}
    close(*both(models, name, **inputs), mask)
    assert calls == ["func" if side == "none" else "with_kvcache"] * 3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padding_on_both_sides_and_between(models, name):
    ids, mask = tiny.padded([20, 20], "left")
    mask[0, :3], mask[0, 17:], mask[1, 15:] = 0, 0, 0
    positions = tiny.position_ids(mask)
    close(*both(models, name, input_ids=ids, attention_mask=mask, position_ids=positions), mask)
    if name == "llama":  # with windows, eager counts what lies between
        mask[0, 8:11] = 0
        close(*both(models, name, input_ids=ids, attention_mask=mask, position_ids=tiny.position_ids(mask)), mask)


def test_a_sequence_of_nothing_but_padding(models):
    ids, mask = tiny.padded([9, 9], "left")
    mask[1] = 0
    got = logits(models("llama", "flashspark"), input_ids=ids, attention_mask=mask)
    close(got[:1], logits(models("llama", "eager"), input_ids=ids[:1]))
    assert got.isfinite().all()


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_positions(models, calls, name, use_cache):
    """Sequences one behind another; eager computes each alone."""
    lengths = [13, 1, 17]
    ids = tiny.padded([31], "left")[0]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(models(name, "flashspark"), input_ids=ids, position_ids=positions, use_cache=use_cache)
    assert calls == ["varlen_func"] * 3
    want = [logits(models(name, "eager"), input_ids=part) for part in ids.split(lengths, 1)]
    close(got, torch.cat(want, 1))


def test_packed_positions_of_several_rows(models, calls):
    ids = tiny.padded([12, 12], "left")[0]
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in (5, 9)])
    close(*both(models, "gemma3", input_ids=ids, position_ids=positions, use_cache=False))
    assert calls == ["varlen_func"] * 3


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_packed_by_lengths(models, calls, name):
    lengths = [9, 14]
    ids = tiny.padded([23], "left")[0]
    cu = torch.tensor([0, 9, 23], dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    # Without positions for the mask, which would find the sequences itself.
    cache = transformers.DynamicCache(config=models(name, "eager").config)
    got = logits(models(name, "flashspark"), input_ids=ids, position_ids=positions, past_key_values=cache, **given)
    want = [logits(models(name, "eager"), input_ids=part) for part in ids.split(lengths, 1)]
    close(got, torch.cat(want, 1))
    assert calls == ["varlen_func"] * 3


def generated(model, side, cache, **options):
    ids, mask = tiny.padded([11, 4, 8], side)
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            **options,
        )


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(models, name, cache):
    """Windows of 7 keys: the sliding layers' caches fill up, and turn round."""
    want = generated(models(name, "eager"), "left", None)
    assert torch.equal(generated(models(name, "flashspark"), "left", cache), want)


def test_more_tokens_after_padding_on_the_right(models):
    """The padding then lies between a sequence's tokens."""
    ids, mask = tiny.padded([11, 4, 8], "right")
    more = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], 1)
    results = []
    for attention in ("flashspark", "eager"):
        model = models("llama", attention)
        cache = transformers.DynamicCache(config=model.config)
        logits(model, input_ids=ids, attention_mask=mask, position_ids=tiny.position_ids(mask), past_key_values=cache)
        positions = tiny.position_ids(more)[:, 11:]
        rest = {"attention_mask": more, "position_ids": positions, "past_key_values": cache}
        results.append(logits(model, input_ids=ids[:, 1:3], **rest))
    close(*results)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_static_cache_without_a_mask(models, name):
    """In two parts: only the offset tells how much of the cache is in use."""
    ids = tiny.padded([12, 12], "left")[0]
    want = logits(models(name, "eager"), input_ids=ids)
    model = models(name, "flashspark")
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    parts = [logits(model, input_ids=part, past_key_values=cache) for part in ids.split([5, 7], 1)]
    close(torch.cat(parts, 1), want)


def test_prompt_in_parts(models):
    ids, mask = tiny.padded([20, 9], "left")
    got, want = [], None
    for attention in ("flashspark", "eager"):
        model = models("gemma3", attention)
        cache = transformers.DynamicCache(config=model.config)
        parts = []
        for start, end in ((0, 8), (8, 9), (9, 20)):
            positions = tiny.position_ids(mask)[:, start:end]
            inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": positions}
            parts.append(logits(model, **inputs, past_key_values=cache))
        got, want = torch.cat(parts, 1), got
    close(want, got, mask)


def test_bidirectional_model(models, calls):
    """A mask function of the model's own is written out and read as it is."""
    ids, mask = tiny.padded([19, 6], "right")
    close(*both(models, "gemma3_bidirectional", input_ids=ids, attention_mask=mask), mask)
    assert "func" in calls


@pytest.mark.parametrize("kind", ["bool", "float", "heads"])
def test_masks_of_four_dimensions(models, calls, kind):
    ids = tiny.padded([10, 10], "left")[0]
    keep = torch.rand(2, 4 if kind == "heads" else 1, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.4
    keep |= torch.eye(10, dtype=torch.bool)
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    got = logits(models("llama", "flashspark"), input_ids=ids, attention_mask=keep if kind == "bool" else added)
    close(got, logits(models("llama", "eager"), input_ids=ids, attention_mask=added))
    assert calls == ["func"] * 3


def test_vision(models, calls):
    """Qwen2-VL: two images of different sizes in the tower, whose attention is packed by cu_seqlens."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 6]])
    patches = torch.randn(28, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    text = [90, *[96] * 4, 91, 5, 6, 90, *[96] * 3, 91, 7, 8, 9]
    ids = torch.tensor([text])
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == 96).int()}
    inputs["attention_mask"] = torch.ones_like(ids)
    close(*both(models, "qwen2_vl", **inputs))
    assert calls == ["varlen_func"] * 2 + ["func"] * 3


def batched(model, prompts, **options):
    """Token lists of transformers' continuous batching."""
    config = transformers.GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = {"block_size": 4, "num_blocks": 60, "max_batch_tokens": 24, "use_async_batching": False} | options
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**batching),
        progress_bar=False,
    )
    return [outputs[key].generated_tokens for key in sorted(outputs, key=lambda key: int(key.split("_")[-1]))]


def alone(model, prompts):
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_continuous_batching(models, calls, name, in_place):
    """Prompts of which one does not fit one step. In place: a step of decoding reads and writes the pages, which
    transformers does for models without windows."""
    from transformers.generation.continuous_batching import initialization

    ids, mask = tiny.padded([31, 3, 12], "left")
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask)]
    want = alone(models(name, "eager"), prompts)
    calls.clear()
    if in_place:
        options = {"max_blocks_per_request": 16}
        real = initialization.ensure_decode_fast_path_is_available

        def ensure(*args):
            # transformers offers its block tables on GPUs only, but uses nothing of one for them.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda: True)
                real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(initialization, "ensure_decode_fast_path_is_available", ensure)
            got = batched(models(name, "flashspark"), prompts, **options)
    else:
        got = batched(models(name, "flashspark"), prompts)
    assert got == want
    assert set(calls) == {"varlen_func", *(["with_kvcache"] if in_place and name == "llama" else [])}


def test_compiled(models):
    """Static shapes under torch.compile: operators of flashspark.torch_ops, in one graph a layer."""
    ids = tiny.padded([16, 16], "left")[0]
    model = models("gpt_oss", "flashspark")
    compiled = torch.compile(model.model.layers[0].self_attn, backend="aot_eager", fullgraph=True)
    hidden = model.model.embed_tokens(ids).detach()
    around = model.model.rotary_emb(hidden, torch.arange(16)[None])
    with torch.no_grad():
        got = compiled(hidden, position_embeddings=around, attention_mask=None)[0]
        want = model.model.layers[0].self_attn(hidden, position_embeddings=around, attention_mask=None)[0]
    close(got, want)


def test_mask_function_says_what_is_known():
    ones = torch.ones(2, 5, dtype=torch.bool)
    assert masks.mask(2, 5, 5, attention_mask=ones) is None
    assert masks.mask(2, 1, 5, q_offset=4) is None
    assert masks.mask(2, 2, 9, q_offset=3).shape == (2, 5)  # a static cache
    assert masks.mask(2, 2, 9, q_offset=torch.tensor(3), attention_mask=ones) is not None
    assert masks.mask(2, 4, 9, mask_function=masks.theirs.bidirectional_mask_function) is None
    left = torch.tensor([[False, True, True], [True, True, True]])
    found = masks.padding_of(left)
    assert found.whole and not found.on_the_right and found.first.tolist() == [1, 0] and found.last.tolist() == [3, 3]
    assert masks.padding_of(left) is found  # looked at once
    left[1, 1] = False
    assert not masks.padding_of(left).whole  # written to since


@pytest.mark.parametrize("side", ["none", "left"])
def test_dropout(calls, side):
    """Drawn from torch's generator; padding is taken out, since a cache's function has none."""
    x = torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    mask = None if side == "none" else tiny.padded([12, 5], side)[1].bool()

    def drawn(seed, dropout=0.5):
        torch.manual_seed(seed)
        return ours.attention(torch.nn.Module(), x, x, x, mask, dropout=dropout, is_causal=True)[0]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert set(calls) == {"func" if side == "none" else "varlen_func"}
    assert drawn(1, 0.0).shape == drawn(1).shape == (2, 12, 4, 16)


def test_registering_twice_changes_nothing():
    from transformers import modeling_flash_attention_utils as flash

    before = flash._lazy_imports
    flashspark.integrations.transformers.register()
    assert flash._lazy_imports is before
    assert ours.attention is transformers.AttentionInterface()["flashspark"]
