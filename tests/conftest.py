"""Fixtures: which ISA computes, which array library the arrays are of, where randomness starts."""

import importlib
import os

import numpy as np
import pytest

from fastattn import _cpu

ISAS = {row["name"]: row["missing"] for row in _cpu.isa_table()}
BACKENDS = ("numpy", "cupy")
requested_backends = pytest.StashKey[list[str]]()


def pytest_configure(config):
    """Take the backends to test from FASTATTN_TEST_BACKENDS; one that is asked for must be here."""
    requested = os.environ.get("FASTATTN_TEST_BACKENDS", "numpy").replace(" ", "").split(",")
    if unknown := set(requested) - set(BACKENDS):
        raise pytest.UsageError(
            f"FASTATTN_TEST_BACKENDS names {sorted(unknown)}; expected some of {BACKENDS}"
        )
    for name in requested:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise pytest.UsageError(f"FASTATTN_TEST_BACKENDS asks for {name}: {error}") from error
    config.stash[requested_backends] = requested


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """The array library under test, one after the other."""
    if request.param not in request.config.stash[requested_backends]:
        pytest.skip(f"FASTATTN_TEST_BACKENDS does not ask for {request.param}")
    return importlib.import_module(request.param)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every ISA that was built, one after the other: its kernels run in the test."""
    if ISAS[request.param]:
        pytest.skip(f"{request.param} cannot run here: this machine lacks {ISAS[request.param]}")
    before = _cpu.use_isa(request.param)
    assert _cpu.current_isa() == request.param
    yield request.param
    assert _cpu.current_isa() == request.param
    _cpu.use_isa(before)


@pytest.fixture
def rng():
    """Random numbers; tests hold for any FASTATTN_TEST_SEED."""
    return np.random.default_rng(int(os.environ.get("FASTATTN_TEST_SEED", "0")))
