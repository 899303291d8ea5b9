"""The repository for Hugging Face's `kernels` (tools/dev/hf_kernel.py): its layout, and that the real package loads and
runs it without an installed flashspark. Everything is loaded in processes of its own."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import flashspark
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/dev/hf_kernel.py"
MACHINE = platform.machine()


def load_tool():
    spec = importlib.util.spec_from_file_location("hf_kernel", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The installed package as a wheel again."""
    path = tmp_path_factory.mktemp("wheel") / f"flashspark-0.1.0-py3-none-manylinux_2_28_{MACHINE}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for folder in map(Path, flashspark.__path__):
            for file in folder.rglob("*"):
                if file.is_file():
                    archive.write(file, Path("flashspark") / file.relative_to(folder))
        archive.writestr("flashspark-0.1.0.dist-info/METADATA", "Name: flashspark")
        archive.writestr("flashspark.pth", "import sys")
    return path


@pytest.fixture(scope="module")
def repository(wheel, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "flashspark"
    load_tool().write(out, [wheel])
    return out


def run(code: str, *blocked: str, **environment: str) -> dict:
    """Runs code in a new process that cannot import the blocked modules; returns what it prints as JSON at its end."""
    block = f"""
        import json, sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {blocked!r}:
                    raise ImportError(f"{{name}} is blocked")
        sys.meta_path.insert(0, Block())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(block) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=900,  # a machine that others keep busy, too
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_layout(repository):
    folders = sorted((repository / "build").iterdir())
    assert f"tvm-ffi01-cpu-{MACHINE}-linux" in [folder.name for folder in folders]
    identities = set()
    for folder in folders:
        assert re.fullmatch(rf"tvm-ffi01-(cu\d+|cpu)-{MACHINE}-linux", folder.name)
        about = json.loads((folder / "metadata.json").read_text())
        assert about["name"] == "flashspark" and about["id"].isidentifier() and about["python-depends"] == ["tvm-ffi"]
        identities.add(about["id"])
        if "-cpu-" in folder.name:
            assert about["backend"] == {"type": "cpu"}
        else:
            assert about["backend"]["type"] == "cuda" and "12.0f" in about["backend"]["archs"]
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"metadata.json"}
        hashes = about["digest"]["files"]
        assert files == {*hashes} and {"__init__.py", "interface.py", "_flashspark_ffi.so"} <= files
        assert not [name for name in files if name.startswith("vllm") or name.endswith((".pyc", "_hook.py"))]
        for name, value in hashes.items():
            assert value == base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()).decode()
    assert len(identities) == len(folders)
    card = (repository / "README.md").read_text()
    assert all(f"`{folder.name}`" in card for folder in folders) and "<variants>" not in card


def test_the_same_wheel_gives_the_same_bytes(repository, wheel, tmp_path):
    again = tmp_path / "again"
    load_tool().write(again, [wheel])
    files = sorted(p.relative_to(repository) for p in repository.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((repository / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_wheels_for_windows_are_left_where_they_lie(tmp_path):
    names = ["flashspark-0.1.0-py3-none-linux_x86_64.whl", "flashspark-0.1.0-py3-none-manylinux_2_28_aarch64.whl"]
    for name in (*names, "flashspark-0.1.0-py3-none-win_amd64.whl"):
        (tmp_path / name).touch()
    assert [path.name for path in load_tool().wheels_of(tmp_path)] == names


def test_wrong_wheels(tmp_path):
    tool = load_tool()
    with pytest.raises(SystemExit, match="x86_64 or aarch64"):
        tool.read_wheel(tmp_path / "flashspark-0.1.0-py3-none-win_amd64.whl")
    with pytest.raises(SystemExit, match=r"holds the name libflashspark\.so 0 times"):
        tool.renamed({"libflashspark.so": b"", "_flashspark_ffi.so": b""}, "0" * 64)
    with pytest.raises(SystemExit, match="does not say which GPU architectures"):
        tool.architectures({"libflashspark.so": b"\0sm_80, sm_90, sm_120f\0"})


def test_architectures():
    """Those that the build has kernels for, and no others that the library speaks of."""
    texts = {b"sm_90": ["9.0"], b"sm_80, sm_90, sm_120f": ["8.0", "9.0", "12.0f"], b"": []}
    for text, expected in texts.items():
        library = b"\0sm_120f, sm_121f\0flashspark: kernels for " + text + b"\0sm_100, sm_103, sm_110\0"
        assert load_tool().architectures({"libflashspark.so": library}) == expected


def test_without_an_installation_and_beside_one(repository, tmp_path):
    """Imported as the loader does, but without its package: this runs where there is no torch, too."""
    (folder,) = (repository / "build").glob("*-cpu-*")
    got = run(
        f"""
        import importlib.util, numpy as np
        spec = importlib.util.spec_from_file_location("_unique", {str(folder / "__init__.py")!r})
        kernel = sys.modules["_unique"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernel)
        q = np.linspace(-1, 1, 60, dtype=np.float32).reshape(1, 5, 2, 6)
        out = kernel.flash_attn_func(q, q, q, causal=True)
        sys.meta_path.pop(0)
        same = None
        import flashspark
        same = bool(np.array_equal(out, flashspark.flash_attn_func(q, q, q, causal=True)))
        libraries = {{line.split("/")[-1].strip() for line in open("/proc/self/maps") if line.rstrip().endswith(".so")}}
        loaded = sorted(name for name in libraries if name.startswith(("libfs", "libflashspark")))
        print(json.dumps([same, kernel.__version__, loaded, kernel.flash_attn_func.__module__]))
        """,
        "flashspark",
        "ml_dtypes",
    )
    same, version, loaded, module = got
    assert same and version == flashspark.native_version() and module == "_unique._ops"
    assert len(loaded) == 2 and "libflashspark.so" in loaded  # each copy has a library of its own


USE = """
    import torch
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 32)
    k, v = torch.randn(2, 2, 9, 2, 32)
    wide = [x.transpose(1, 2) for x in (q, *(x.repeat_interleave(2, 2) for x in (k, v)))]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    out = kernel.flash_attn_func(q, k, v, causal=True)
    four, lse = kernel.interface.flash_attn_func(q, k, v, causal=True, return_lse=True)
    five, nothing = kernel.interface._flash_attn_fwd(q, k, v, causal=True)
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed = kernel.flash_attn_varlen_func(*flat, cu, cu, 9, 9, causal=True)
    six, lse_of_six = kernel.interface.flash_attn_varlen_func(
        *flat, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=9, max_seqlen_k=9, causal=True, return_lse=True
    )
    cached = kernel.flash_attn_with_kvcache(q, k, v, cache_seqlens=9, causal=True)
    operator = torch.compile(kernel.torch_ops.flash_attn_func, backend="aot_eager", fullgraph=True)
    compiled = operator(q, k, v, causal=True)
    with kernel.integrations.torch.enabled():
        sdpa = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    half = kernel.flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True).float()
    near = lambda a, b, tolerance: bool((a - b).abs().max() < tolerance)
    exact = [near(x, expected, 1e-5) for x in (out, four, five, cached, compiled, sdpa)]
    exact += [near(x.unflatten(0, (2, 9)), expected, 1e-5) for x in (packed, six)]
    exact += [near(half, expected, 3e-2), nothing is None, lse.shape == (2, 4, 9), lse_of_six.shape == (4, 18)]
    exact += [kernel.integrations.torch.calls() == {"flashspark": 1}]
"""


def test_the_real_loader(repository):
    """get_local_kernel, its choice of a variant, its view of the digest, and every function, without ml_dtypes."""
    pytest.importorskip("kernels")
    pytest.importorskip("torch")
    backend = None if len([*(repository / "build").iterdir()]) > 1 else "cpu"  # a build without kernels has no other
    code = f"""
    from pathlib import Path
    from kernels import Metadata, get_loaded_kernels, get_local_kernel
    from kernels._rust import Digest, DigestAlgorithm
    kernel = get_local_kernel(Path({str(repository)!r}), backend={backend!r})
    (loaded,) = get_loaded_kernels()
    folder = Path(kernel.__file__).parent
    loaded.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    {USE}
    print(json.dumps([exact, folder.name, loaded.metadata.backend.archs, kernel.__name__ == loaded.metadata.id]))
    """
    exact, variant, archs, named = run(code, "flashspark", "ml_dtypes")
    assert all(exact), exact
    assert named and variant.startswith("tvm-ffi01-") and ("-cpu-" in variant or "12.0f" in archs)


def test_local_kernels_and_the_cpu_variant(repository):
    """LOCAL_KERNELS, with which get_kernel finds the folder, beside an installed flashspark whose operators exist."""
    pytest.importorskip("kernels")
    pytest.importorskip("torch")
    code = f"""
    import flashspark.torch_ops
    from kernels import get_kernel, has_kernel
    found = has_kernel("someone/flashspark", version=0, backend="cpu")
    kernel = get_kernel("someone/flashspark", version=0, backend="cpu")
    {USE}
    theirs = flashspark.flash_attn_func(q, k, v, causal=True)
    exact.append(bool(torch.equal(theirs, out)))
    print(json.dumps([exact, found, kernel.__file__]))
    """
    exact, found, file = run(code, LOCAL_KERNELS=f"someone/flashspark={repository}")
    assert all(exact), exact
    assert found and "tvm-ffi01-cpu-" in file
