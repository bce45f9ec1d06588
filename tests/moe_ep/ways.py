"""The ways in which a backend can be run, so that one parametrisation covers them.

reference     plain torch, on the GPU where there is one
interpreter   the Triton kernels in Triton's interpreter: a process of its own, since Triton decides when imported
gfx942        the Triton kernels compiled for gfx942, their machine code executed by the emulated chip
cuda          the Triton kernels on this machine's GPU
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from typing import Any, Literal

import pytest
import torch

Way = Literal["reference", "interpreter", "gfx942", "cuda"]

CPU_WAYS: list[Way] = ["reference", "interpreter", "gfx942"]
WAYS: list[Way] = list(CPU_WAYS)
if torch.cuda.is_available():
    WAYS.append("cuda")
every_way = pytest.mark.parametrize("way", WAYS)


def impl_of(way: Way) -> str:
    """The backend's name."""
    return "reference" if way == "reference" else "triton_kernel"


def arch_of(way: Way) -> str | None:
    """The arch that a selection is asked for; None for what is detected."""
    return "gfx942" if way == "gfx942" else None


def device_of(way: Way) -> torch.device:
    """Where a way's tensors live."""
    on_gpu = way == "cuda" or (way == "reference" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def call(way: Way, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) where this way runs kernels. For `interpreter` all of them must pickle."""
    if way == "interpreter":
        return _interpreter().submit(function, *args, **kwargs).result()
    with running(way):
        return function(*args, **kwargs)


@contextmanager
def running(way: Way) -> Iterator[None]:
    """Run kernels of this process this way. For `interpreter` the process must have been started `interpreting`."""
    if way == "gfx942":
        from tests.gfx942.driver import emulated

        with emulated():
            yield
    else:
        yield


@contextmanager
def interpreting() -> Iterator[None]:
    """Processes that are started within have a Triton that interprets: it asks when it is imported."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


@cache
def _interpreter() -> ProcessPoolExecutor:
    """One process for all the tests of this one."""
    with interpreting():
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()  # the process starts here
    return pool
