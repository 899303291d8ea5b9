"""The custom node of integrations/comfyui in a stand-in for ComfyUI, which tests/python/comfyui_stand_in.py has.

No package was found on PyPI that has ComfyUI's attention.py, so the stand-in is written from its interface. Nothing
here runs in ComfyUI itself.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import comfyui_stand_in as stand_in  # noqa: E402
import flashspark.integrations.comfyui as ours  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
KEY = "optimized_attention_override"


@pytest.fixture
def comfy(monkeypatch):
    """comfy.ldm.modules.attention, as a freshly started ComfyUI has it."""
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", stand_in)
    monkeypatch.setattr(sys.modules["comfy.ldm.modules"], "attention", stand_in, raising=False)
    functions = stand_in.REGISTERED_ATTENTION_FUNCTIONS
    monkeypatch.setattr(stand_in, "REGISTERED_ATTENTION_FUNCTIONS", dict(functions))
    stand_in.ran.clear()
    ours.calls(reset=True)
    return stand_in


def load():
    """The folder as ComfyUI loads it: from its path, under a name that is no identifier."""
    spec = importlib.util.spec_from_file_location("/ComfyUI/custom_nodes/flashspark", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attention(comfy):
    """The registered function."""
    load()
    return comfy.get_attention_function("flashspark")


def inputs(heads=4, heads_kv=None, rows=7, keys=None, head_dim=16, dtype=torch.float32, flat=True, seed=0):
    """q, k, v as ComfyUI passes them: (batch, length, heads * head_dim), or else (batch, heads, length, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for length, n in ((rows, heads), (keys or rows, heads_kv or heads), (keys or rows, heads_kv or heads)):
        x = torch.randn((2, length, n, head_dim), generator=generator).to(dtype)
        tensors.append(x.flatten(2) if flat else x.transpose(1, 2))
    return tensors


def check(attention, q, k, v, heads, **options):
    """flashspark computes the call, and the result is that of the stand-in's attention_pytorch in double precision."""
    out = attention(q, k, v, heads, **options)
    assert ours.calls(reset=True) == {"flashspark": 1} and not stand_in.ran
    expected = stand_in.attention_pytorch(q.double(), k.double(), v.double(), heads, **options)
    stand_in.ran.clear()
    assert out.shape == expected.shape and out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


def check_left(attention, reason, *args, **options):
    """ComfyUI's attention_pytorch computes the call, for the given reason."""
    out = attention(*args, **options)
    assert stand_in.ran == {"pytorch": 1}
    ((given, count),) = ours.calls(reset=True).items()
    assert count == 1 and given.startswith(f"comfyui: {reason}"), given
    torch.testing.assert_close(out, stand_in.attention_pytorch(*args, **options), equal_nan=True)
    stand_in.ran.clear()
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "skip_reshape"])
@pytest.mark.parametrize("flat_out", [True, False], ids=["flat_out", "skip_output_reshape"])
def test_layouts_and_types(attention, dtype, flat, flat_out):
    q, k, v = inputs(keys=9, dtype=dtype, flat=flat)
    check(attention, q, k, v, 4, skip_reshape=not flat, skip_output_reshape=not flat_out)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "skip_reshape"])
def test_grouped_heads(attention, flat):
    check(attention, *inputs(6, 2, flat=flat), 6, skip_reshape=not flat, enable_gqa=True)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 128, 160])
def test_head_sizes(attention, head_dim):
    check(attention, *inputs(2, head_dim=head_dim, rows=33, keys=77), 2)


def test_options(attention):
    tensors = inputs()
    check(attention, *tensors, 4, scale=0.37)
    check(attention, *tensors, 4, mask=None, attn_precision=torch.float32, low_precision_attention=False)
    check(attention, *tensors, 4, transformer_options={"block_index": 3}, preferred_attention=None)
    with torch.inference_mode():
        check(attention, *inputs(), 4)
    check(attention, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors), 4)


MASKS = {
    "length, length": (7, 9),
    "batch, length, length": (2, 7, 9),
    "batch, 1, 1, length": (2, 1, 1, 9),
    "batch, heads, length, length": (2, 4, 7, 9),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("added", [True, False], ids=["added", "bool"])
def test_masks_are_left(attention, shape, added):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    q, k, v = inputs(keys=9)
    out = check_left(attention, "mask", q, k, v, 4, mask if added else mask > -1)
    assert not torch.equal(out, attention(q, k, v, 4))


def test_gradients_are_left(attention):
    q, k, v = inputs()
    k.requires_grad_()
    out = check_left(attention, "an argument requires gradients", q, k, v, 4)
    out.sum().backward()
    assert k.grad is not None
    with torch.no_grad():
        check(attention, q, k, v, 4)


class Subclass(torch.Tensor):
    pass


def test_what_else_is_left(attention):
    q, k, v = inputs()
    check_left(attention, "dtype torch.float64", q.double(), k.double(), v.double(), 4)
    check_left(attention, "device meta", q.to("meta"), k.to("meta"), v.to("meta"), 4)
    check_left(attention, "a subclass of torch.Tensor", q, k, v.as_subclass(Subclass), 4)
    check_left(attention, "head size 520", *inputs(1, head_dim=520), 1)
    check_left(attention, "no elements", q, k[:, :0], v[:, :0], 4)
    check_left(attention, "argument softcap", q, k, v, 4, softcap=2.0)
    q, k, v = inputs(flat=False)
    check_left(attention, "shapes", q, k[:1], v[:1], 4, skip_reshape=True)  # torch broadcasts them


def test_errors_are_those_of_comfyui(attention):
    q, k, v = inputs()
    for tensors, heads in (((q, k, v), 5), ((q, k.half(), v), 4)):
        messages = []
        for function in (attention, stand_in.attention_pytorch):
            with pytest.raises(RuntimeError) as caught:
                function(*tensors, heads)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert set(ours.calls()) == {"comfyui: shapes", "comfyui: different dtypes"}


def test_what_flashspark_refuses_is_left(attention, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no implementation supports this\nand why")

    monkeypatch.setattr(ours, "_flash_attn_func", refuse)
    check_left(attention, "no implementation supports this", *inputs(), 4)
    assert ours.refusal("cpu") == "no implementation supports this"
    model = stand_in.ModelPatcher()
    assert ours.patched(model).model_options == model.model_options == {"transformer_options": {}}


def test_devices(monkeypatch):
    assert ours.refusal("cpu") == "" and ours.refusal("mps") == "device mps"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert ours.refusal("cuda") == "device cuda of ROCm" and ours.refusal("cpu") == ""


def test_the_node_leaves_the_model_alone(comfy):
    node = load().NODE_CLASS_MAPPINGS["FlashsparkAttention"]
    assert node.INPUT_TYPES() == {"required": {"model": ("MODEL",)}} and node.RETURN_TYPES == ("MODEL",)
    block = stand_in.Block(64, 4).requires_grad_(False)
    model = stand_in.ModelPatcher({"transformer_options": {"patches": {}}, "other": 1})
    [patched] = getattr(node(), node.FUNCTION)(model)
    assert model.model_options == {"transformer_options": {"patches": {}}, "other": 1}
    assert patched is not model and patched.model_options["other"] == 1
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    expected = block(x, transformer_options=model.model_options["transformer_options"])
    assert stand_in.ran == {"pytorch": 1} and ours.calls() == {}
    out = block(x, transformer_options=patched.model_options["transformer_options"])
    assert stand_in.ran == {"pytorch": 1} and ours.calls() == {"flashspark": 1}
    torch.testing.assert_close(out, expected)


def test_a_clone_that_shares_its_options(comfy, monkeypatch):
    """Whatever ComfyUI's clone() copies, nothing of the model is written to."""
    monkeypatch.setattr(stand_in.ModelPatcher, "clone", lambda self: stand_in.ModelPatcher(self.model_options))
    model = stand_in.ModelPatcher()
    assert KEY in ours.patched(model).model_options["transformer_options"]
    assert model.model_options == {"transformer_options": {}}


def test_a_patched_model_falls_back_to_the_attention_that_it_had(comfy):
    q, k, v = inputs()
    options = ours.patched(stand_in.ModelPatcher()).model_options["transformer_options"]
    mask = torch.ones(7, 7).tril().bool()
    stand_in.attention_sub_quad(q, k, v, 4, mask, transformer_options=options)
    assert stand_in.ran == {"sub_quad": 1} and ours.calls() == {"comfyui: mask": 1}


def test_another_override_is_replaced(comfy, caplog):
    model = stand_in.ModelPatcher()
    model.set_model_optimized_attention(stand_in.get_attention_function("sub_quad"))
    patched = ours.patched(ours.patched(model))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "replaces" in caplog.text
    assert patched.model_options["transformer_options"][KEY] is ours.override
    assert model.model_options["transformer_options"][KEY] is not ours.override


def test_the_registered_function_as_an_override(attention):
    """As ComfyUI's node for attention sets it, and under an override of another kind."""
    q, k, v = inputs()
    model = stand_in.ModelPatcher()
    model.set_model_optimized_attention(attention)
    options = model.model_options["transformer_options"]
    mask = torch.ones(7, 7).bool()
    stand_in.optimized_attention(q, k, v, 4, transformer_options=options)
    stand_in.optimized_attention(q, k, v, 4, mask, transformer_options=options)
    assert ours.calls(reset=True) == {"flashspark": 1, "comfyui: mask": 1} and stand_in.ran == {"pytorch": 1}
    options = ours.patched(model).model_options["transformer_options"]
    attention(q, k, v, 4, mask, transformer_options=options)
    assert ours.calls() == {"comfyui: mask": 1} and stand_in.ran == {"pytorch": 2}
    attention(*map(stand_in.AttentionTensorContainer, (q, k, v)), 4)
    assert ours.calls() == {"comfyui: mask": 1, "flashspark": 1}


def test_one_line_at_registration_and_none_later(comfy, caplog, capsys):
    caplog.set_level(logging.INFO)
    module = load()
    assert [record.getMessage() for record in caplog.records] == [
        "flashspark is registered as attention function 'flashspark'"
    ]
    attention = comfy.get_attention_function("flashspark")
    assert load().NODE_CLASS_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys() == {"FlashsparkAttention"}
    assert comfy.get_attention_function("flashspark") is attention
    q, k, v = inputs()
    attention(q, k, v, 4)
    attention(q, k, v, 4, torch.zeros(7, 7))
    assert len(caplog.records) == 1 and capsys.readouterr() == ("", "")


def test_comfyui_without_a_registry(comfy, caplog, monkeypatch):
    monkeypatch.delattr(stand_in, "register_attention_function")
    module = load()
    assert module.NODE_CLASS_MAPPINGS == {} == module.NODE_DISPLAY_NAME_MAPPINGS
    [record] = caplog.records
    assert record.levelname == "WARNING" and "no register_attention_function" in record.getMessage()
    assert "update ComfyUI" in record.getMessage()


def test_outside_comfyui(caplog):
    assert load().NODE_CLASS_MAPPINGS == {}
    [record] = caplog.records
    assert "must be called within ComfyUI" in record.getMessage()


def test_without_flashspark(comfy, caplog, monkeypatch):
    import flashspark.integrations

    monkeypatch.setitem(sys.modules, "flashspark.integrations.comfyui", None)
    monkeypatch.delattr(flashspark.integrations, "comfyui")
    assert load().NODE_CLASS_MAPPINGS == {}
    [record] = caplog.records
    assert "flashspark" in record.getMessage()


def test_compiled(comfy):
    """One graph, in which attention is flashspark's operator; masks go to ComfyUI's attention in the graph."""
    block = stand_in.Block(64, 4).requires_grad_(False)
    options = ours.patched(stand_in.ModelPatcher()).model_options["transformer_options"]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    expected = block(x, transformer_options=options)
    assert ours.calls(reset=True) == {"flashspark": 1}
    torch.testing.assert_close(compiled(x, transformer_options=options), expected)
    assert not stand_in.ran and ours.calls() == {}
    x = x.double()
    compiled = torch.compile(block.double(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, transformer_options=options), block(x))
    assert stand_in.ran["pytorch"] >= 1 and ours.calls() == {}
