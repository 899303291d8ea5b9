"""Import time, call overhead, threads, the interpreter lock, fork, and what the package contains."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
import time

import flashspark
import numpy as np
import pytest
from reference import Options, attend_dense, close


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_quick_and_loads_nothing(record_property):
    code = "import time; t = time.perf_counter(); import flashspark; print(1e3 * (time.perf_counter() - t))"
    best = min(float(run_python(code)) for _ in range(5))
    record_property("import_ms", best)
    print(f"import flashspark: {best:.2f} ms")
    assert best < 50
    heavy = "numpy tvm_ffi ml_dtypes torch"
    loaded = run_python(f"import sys, flashspark; print([m for m in {heavy.split()!r} if m in sys.modules])")
    assert loaded == "[]"


def test_names():
    for name in flashspark.__all__:
        assert getattr(flashspark, name) is not None
        assert name in dir(flashspark)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashspark.no_such_name
    assert flashspark.native_version() == flashspark.__version__ == importlib.metadata.version("flashspark")
    assert list(flashspark.implementations()) == ["cuda", "cpu-engine", "cpu-reference"]
    assert all(flashspark.implementations().values())
    assert flashspark.cpu_threads() >= 1
    assert flashspark.cpu_target()


def test_functions_are_documented():
    for name in (
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flash_attn_with_kvcache",
        "append_kv",
        "_flash_attn_fwd",
    ):
        assert len(getattr(flashspark, name).__doc__) > 300, name
    import flashspark as package

    assert os.path.exists(os.path.join(package.__path__[0], "py.typed"))


def best_microseconds(function, rounds=200, calls=100) -> float:
    """Rounds are shorter than a busy machine's time slices, so that one of them is undisturbed."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def test_call_overhead(record_property):
    """A problem too small to take time. The target is 5 us on an idle machine; the bound allows for a busy one."""
    q = np.ones((1, 1, 1, 8), np.float32)
    out = np.empty_like(q)
    call = flashspark.flash_attn_func
    plain, in_place = best_microseconds(lambda: call(q, q, q)), best_microseconds(lambda: call(q, q, q, out=out))
    record_property("call_us", plain)
    print(f"flash_attn_func, one key: {plain:.2f} us, with out= {in_place:.2f} us")
    assert plain < 25


def long_problem():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 1500, 8, 64)).astype(np.float32) for _ in range(3)]


def test_interpreter_lock_is_released():
    """One thread computes while another counts; if the interpreter lock were held, the counter would stand still."""
    arrays = long_problem()
    ticks, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        start = time.perf_counter()
        # The scalar oracle on one thread: deliberately slow.
        flashspark.flash_attn_func(*arrays, implementation="cpu-reference", num_threads=1)
        end = time.perf_counter()
    finally:
        stop.set()
        counter.join()
    during = [t for t in ticks if start + 0.005 < t < end - 0.005]
    assert end - start > 0.1, "the call is too short to tell"
    assert len(during) > 10, f"{len(during)} ticks in {end - start:.3f} s"
    assert max(np.diff(during)) < (end - start) / 2


def test_lock_is_released_whatever_the_environment_says():
    code = (
        "import flashspark._core as c;"
        "print(all(getattr(c, n).release_gil for n in ('attention_forward', 'attention_validate', 'append_kv')))"
    )
    assert run_python(code, TVM_FFI_RELEASE_GIL_BY_DEFAULT="0") == "True"


def test_many_threads_at_once(normal):
    """Concurrent callers get their own results and their own errors."""
    problems = [(normal(1, 7 + n, 4, 32), normal(1, 60 + n, 2, 32), normal(1, 60 + n, 2, 32)) for n in range(8)]
    wants = [attend_dense(*p, Options(causal=True))[0] for p in problems]
    failures = []

    def work(n):
        try:
            for _ in range(50):
                close(flashspark.flash_attn_func(*problems[n], causal=True), wants[n])
                with pytest.raises(ValueError, match=f"softcap = -{n + 1}"):
                    flashspark.flash_attn_func(*problems[n], softcap=-(n + 1))
        except BaseException as error:  # noqa: BLE001
            failures.append((n, error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_fork(normal):
    """A child forked after the thread pool has started can compute and does not hang."""
    q, k, v = normal(2, 64, 4, 32), normal(2, 64, 2, 32), normal(2, 64, 2, 32)
    want = flashspark.flash_attn_func(q, k, v)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if np.allclose(flashspark.flash_attn_func(q, k, v), want, atol=1e-6) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(flashspark.flash_attn_func(q, k, v), want)


def test_arrays_are_not_kept_alive(normal):
    import gc
    import weakref

    q, k, v = normal(1, 8, 4, 32), normal(1, 8, 2, 32), normal(1, 8, 2, 32)
    out = flashspark.flash_attn_func(q, k, v)
    watches = [weakref.ref(x) for x in (q, k, v, out)]
    del q, k, v, out
    gc.collect()
    assert [w() for w in watches] == [None] * 4


def test_other_dlpack_producers(normal):
    import tvm_ffi

    q, k, v = normal(1, 8, 4, 32), normal(1, 8, 2, 32), normal(1, 8, 2, 32)
    want = flashspark.flash_attn_func(q, k, v)
    out = np.empty_like(q)
    foreign = [tvm_ffi.from_dlpack(x) for x in (q, k, v)]
    assert flashspark.flash_attn_func(*foreign, out=out) is out
    np.testing.assert_array_equal(out, want)
    with pytest.raises(TypeError, match="give out="):
        flashspark.flash_attn_func(*foreign)


def test_forced_implementation_by_environment():
    code = (
        "import numpy as np, flashspark as f; q = np.zeros((1, 1, 1, 8), np.float32);"
        "print(f.flash_attn_func(q, q, q, explain=True))"
    )
    assert "cpu-reference" in run_python(code, FLASHSPARK_FORCE_IMPLEMENTATION="cpu-reference")


def test_command_is_installed():
    """The wheel installs the native command beside the interpreter, with the package's version."""
    import shutil
    import sysconfig

    command = shutil.which("flashspark", path=sysconfig.get_path("scripts"))
    assert command, "no flashspark in " + sysconfig.get_path("scripts")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and flashspark.__version__ in result.stdout
