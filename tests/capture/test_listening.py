"""Listening to the calls of a forward: other tools and other threads do not notice."""

from __future__ import annotations

import cProfile
import pstats
import sys
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.models import Body

PARTS = {"c": nn.Conv2d(3, 4, 1), "b": nn.BatchNorm2d(4)}


def folded(forward: Any) -> int:
    """How many rewrites a convolution and a BatchNorm under a forward allow."""
    return len(fxrep.report(fxrep.optimize(Body(forward, **PARTS).eval())).rewrites)


def plain(m: Any, x: Tensor) -> Any:
    return m.b(m.c(x))


def test_cprofile_goes_on() -> None:
    def afterwards() -> None:
        torch.ones(1).sum()

    with cProfile.Profile() as profile:
        assert folded(plain) == 1
        afterwards()
    names = {name for _, _, name in pstats.Stats(profile).stats}  # type: ignore[attr-defined]
    assert {"capture", "afterwards"} <= names


def test_a_profiler_of_python_code_goes_on() -> None:
    heard = []

    def hear(frame: types.FrameType, event: str, called: Any) -> None:
        heard.append(frame.f_code.co_name)

    sys.setprofile(hear)
    try:
        assert folded(plain) == 1
        assert sys.getprofile() is hear
    finally:
        sys.setprofile(None)
    assert "optimize" in heard


@pytest.mark.skipif(not hasattr(sys, "monitoring"), reason="new in Python 3.12")
def test_another_tool_keeps_its_number() -> None:
    monitoring: Any = getattr(sys, "monitoring")  # noqa: B009
    monitoring.use_tool_id(4, "another")
    try:
        assert folded(plain) == 1
        assert folded(lambda m, x: m.b(m.c(x)) if torch.is_grad_enabled() else x) == 0
        assert monitoring.get_tool(4) == "another"
    finally:
        monitoring.free_tool_id(4)


def test_nothing_listens_after_a_forward_that_raises() -> None:
    def raises(m: Any, x: Tensor) -> Any:
        raise RuntimeError(f"{m.c(x).sum()}")

    assert folded(raises) == 0
    assert sys.getprofile() is None


def test_other_threads_may_ask() -> None:
    """A thread that asks for the mode all the time is no reason to leave a forward as it is."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            torch.is_grad_enabled()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert all(folded(plain) == 1 for _ in range(5))
    finally:
        done.set()
        thread.join()


def test_a_module_of_python_that_is_imported_asks_no_traced_value(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import torch\ndef same(a, b): return a is b\nSAME = same(torch, torch)\n"
    code += "MODE = torch.is_grad_enabled()\n"
    (tmp_path / "imported_while_tracing.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    def imports(m: Any, x: Tensor) -> Any:
        import imported_while_tracing  # type: ignore[import-not-found]

        return m.b(m.c(x)) if imported_while_tracing.SAME else x

    assert folded(imports) == 1


def test_the_first_question_is_the_reason() -> None:
    """It is only recorded; the error that follows from the answer is not reported."""

    def asks(m: Any, x: Tensor) -> Any:
        if x is m.c(x):
            return x
        return m.b(m.c(x)) if x.shape[1] == 3 else x

    skipped = fxrep.report(fxrep.optimize(Body(asks, **PARTS).eval())).skipped
    assert "compares the identity of values" in skipped[0].reason
