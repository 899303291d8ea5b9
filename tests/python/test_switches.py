"""Environment variables of the vLLM package are read once; tests may have them read again. No vLLM is needed."""

from __future__ import annotations

import pytest
from flashspark.vllm import switches


@pytest.fixture(autouse=True)
def fresh():
    switches.reread()
    yield
    switches.reread()


def test_batch_invariance_is_read_once(monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    assert not switches.batch_invariant()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not switches.batch_invariant()
    switches.reread()
    assert switches.batch_invariant()
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")


@pytest.mark.parametrize(
    ("text", "wanted", "others"),
    [
        (None, [(12, 0), (12, 1)], [(9, 0), (10, 0)]),
        ("", [(12, 0)], [(9, 0)]),
        ("9.0,12.x", [(9, 0), (12, 1)], [(8, 9)]),
        ("8, 9.0", [(8, 0), (8, 9), (9, 0)], [(12, 0), (9, 1)]),
    ],
)
def test_capabilities(monkeypatch, text, wanted, others):
    monkeypatch.delenv("FLASHSPARK_CAPABILITIES", raising=False)
    if text is not None:
        monkeypatch.setenv("FLASHSPARK_CAPABILITIES", text)
    assert all(switches.wants_capability(*capability) for capability in wanted)
    assert not any(switches.wants_capability(*capability) for capability in others)


@pytest.mark.parametrize("text", ["twelve", "9.0;12.x", "9.0,,"])
def test_bad_capabilities_are_named(monkeypatch, text):
    monkeypatch.setenv("FLASHSPARK_CAPABILITIES", text)
    with pytest.raises(ValueError, match="FLASHSPARK_CAPABILITIES"):
        switches.capabilities()
