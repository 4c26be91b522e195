"""Fixtures: what computes, which library the arrays are of, where randomness starts.

Tests that need a GPU are marked so; they run if FASTATTN_TEST_BACKENDS asks for cupy.
"""

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
            library = importlib.import_module(name)
            if name == "cupy":
                library.cuda.runtime.getDeviceCount()  # an error where there is none
        except (ImportError, RuntimeError) as error:
            raise pytest.UsageError(f"FASTATTN_TEST_BACKENDS asks for {name}: {error}") from error
    config.stash[requested_backends] = requested


def pytest_collection_modifyitems(config, items):
    """Where NumPy is not asked for, leave out what would be the same test again."""
    if "numpy" not in config.stash[requested_backends]:
        left_out = [item for item in items if not item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and "cupy" not in item.config.stash[requested_backends]:
        pytest.skip("FASTATTN_TEST_BACKENDS does not ask for cupy")


GPU = pytest.param("cupy", marks=pytest.mark.gpu)


def compute_on(target):
    from helpers import computing_on  # which needs more than the tests that need no helpers

    return computing_on(target)


@pytest.fixture(params=["numpy", GPU])
def xp(request):
    """The array library under test, one after the other; Cases compute on its arrays."""
    with compute_on(request.param):
        yield importlib.import_module(request.param)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every ISA that was built, one after the other: its kernels run in the test."""
    if missing := ISAS[request.param]:
        pytest.skip(f"{request.param} cannot run here: this machine lacks {missing}")
    with compute_on(request.param):
        assert _cpu.current_isa() == request.param
        yield request.param


@pytest.fixture(params=[*ISAS, GPU])
def target(request):
    """All that computes, one after the other: every ISA that was built, and the GPU."""
    if missing := ISAS.get(request.param):
        pytest.skip(f"{request.param} cannot run here: this machine lacks {missing}")
    with compute_on(request.param):
        yield request.param


@pytest.fixture
def rng():
    """Random numbers; tests hold for any FASTATTN_TEST_SEED."""
    return np.random.default_rng(int(os.environ.get("FASTATTN_TEST_SEED", "0")))
