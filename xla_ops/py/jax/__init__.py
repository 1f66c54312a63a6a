"""The ops for JAX arrays: under jit, grad, vmap, shard_map and partitioned jit.

They are those of `xla_ops`, by the same declarations and handlers, on the CPU and on
CUDA, and need no torch. An op that updates a tensor there returns the new value here:

    import xla_ops.jax as xj

    @functools.partial(jax.jit, donate_argnames="kv_cache")
    def step(query, key, value, kv_cache, slots, lengths, tables, starts):
        kv_cache = xj.reshape_and_cache_flash(key, value, kv_cache, None, slots)
        return xj.paged_attention(query, kv_cache, lengths, tables, starts, 1, scale)

A donated cache stays where it is: docs/jax.md.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import ops
from ..core import front
from ..core.debug import set_debug
from ..core.op import OPS, Op
from ..version import __version__
from . import call, fronts

Op.framework = call

__all__ = ["__version__", "functional", "set_debug"]
__all__ += ops.__all__


def functional(name: str) -> Callable:
    """Returns a functional op by its name in xla_ops/py/core/op.py's OPS.

    It takes and returns JAX arrays, with the arguments of its schema but for donors.
    For layouts of caches that are not those of the functions here, say, which ops are
    told by `geometry`.
    """
    op = OPS[name]
    return fronts.functional(lambda *args: op(*args, *(None,) * op.num_donors))


def __getattr__(name: str) -> Callable:
    """Makes a function of JAX arrays when it is first asked for."""
    if name not in ops.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(ops, name)
    # Where one has a result and the other none, the front is a form for vLLM, which
    # writes what the function returns.
    has_result = fronts.has_result(function)
    written, has_own_result = front.WRITTEN.get(name, front.Written((), has_result))
    made = fronts.adapted(function, written if has_own_result == has_result else ())
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
