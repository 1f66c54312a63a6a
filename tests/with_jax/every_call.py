"""A program without torch: calls functions of xla_ops.jax, and differentiates them.

python every_call.py CASES RESULTS, both files of pickle: CASES of (name, arguments,
arguments by name), and RESULTS of what `outcomes` makes of each.
"""

import pickle
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]

import jax
import jax.numpy as jnp

import xla_ops.jax as xj


def outcomes(name, args, named):
    """The results of a call and of its backward, or what that raises."""
    function = getattr(xj, name)
    leaves, tree = jax.tree.flatten(args)
    places = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]

    def loss(given):
        known = dict(zip(places, given, strict=True))
        args = tree.unflatten([known.get(i, leaf) for i, leaf in enumerate(leaves)])
        results = jax.tree.leaves(function(*args, **named))
        floats = [r.astype(jnp.float32).sum() for r in results if _is_float(r)]
        return sum(floats, jnp.zeros(()))

    try:
        grads = jax.grad(loss)([leaves[i] for i in places])
    except RuntimeError as error:
        grads = str(error)
    return function(*args, **named), grads


def _is_float(value):
    is_array = isinstance(value, jax.Array)
    return is_array and value.dtype in (jnp.float32, jnp.float16, jnp.bfloat16)


if __name__ == "__main__":
    cases = pickle.loads(Path(sys.argv[1]).read_bytes())
    found = [outcomes(*case) for case in cases]
    Path(sys.argv[2]).write_bytes(pickle.dumps(found))
