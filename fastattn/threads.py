"""How many threads a call on the CPU takes."""

from __future__ import annotations

from fastattn import _cpu
from fastattn._problem import thread_count


def set_num_threads(n: int | None) -> None:
    """Set the number of threads of all later calls in this process that do not say `num_threads`.

    Parameters
    ----------
    n : int >= 1, or None
        None goes back to OpenMP's own maximum, asked at each call, so that OMP_NUM_THREADS and
        threadpoolctl work, but not more than the process's affinity and its container's quota
        allow. A number given here, or to a call, is taken as it is, though no call starts more
        threads than it has work for.

    Raises
    ------
    TypeError
        `n` is not an int; a bool is none.
    ValueError
        `n` is below 1.

    See Also
    --------
    get_num_threads : The number that a call takes now.

    Notes
    -----
    The number of threads changes the time a result takes, and no bit of it.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.set_num_threads(1)
    >>> fastattn.get_num_threads()
    1
    >>> fastattn.set_num_threads(None)
    """
    _cpu.set_num_threads(0 if n is None else thread_count("n", n))


def get_num_threads() -> int:
    """Return the number of threads that a call without `num_threads` takes.

    Returns
    -------
    int
        What `set_num_threads` said, else OpenMP's maximum, capped by the process's affinity and
        its container's quota.

    See Also
    --------
    set_num_threads : Sets it.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.get_num_threads() >= 1
    True
    """
    return _cpu.get_num_threads()
