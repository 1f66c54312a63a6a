"""xla_ops.jax in processes without torch, and beside torch in any order."""

import subprocess
import sys
import textwrap

import pytest

_CALLS = """
    x = jnp.arange(8.0).reshape(2, 4)
    print(round(float(jax.jit(xj.rms_norm)(x, jnp.ones(4)).sum()), 3))
    cache = xj.reshape_and_cache_flash(
        jnp.ones((1, 1, 8)), jnp.ones((1, 1, 8)), jnp.zeros((2, 1, 4, 1, 8)), None,
        jnp.zeros((1,), jnp.int32),
    )
    print(cache.sum(), xj.rms_norm_dynamic_per_token_quant(x, jnp.ones(4), jnp.int8)[1])
"""
_EXPECTED = ["7.127", "16.0 [[0.01262651]", " [0.00982062]]"]


def _run(*parts):
    code = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_where_there_is_no_torch():
    found = _run(
        """
        import sys

        sys.modules["torch"] = None
        import xla_ops.jax as xj
        import jax, jax.numpy as jnp
        """,
        _CALLS,
    )
    assert found == _EXPECTED


def test_torch_stays_out_where_jax_is_imported_first():
    found = _run(
        "import jax, jax.numpy as jnp, sys, xla_ops.jax as xj",
        _CALLS,
        "print('torch' in sys.modules)",
    )
    assert found == [*_EXPECTED, "False"]


@pytest.mark.parametrize(
    "imports",
    [
        "import torch; import xla_ops.jax as xj; import jax, jax.numpy as jnp",
        "import jax, jax.numpy as jnp, xla_ops.jax as xj; xj.gelu_new(jnp.ones((1, 2)))"
        "\nimport torch",
    ],
    ids=["before", "after"],
)
def test_beside_torch(imports):
    """Each framework's arrays have their own dtypes, and both work."""
    found = _run(
        imports,
        "import xla_ops",
        "print(xla_ops.rms_norm(torch.ones(1, 4), torch.ones(4)).sum())",
        _CALLS,
        "print(xla_ops.static_scaled_fp8_quant(torch.ones(1), torch.ones(())).float())",
    )
    assert found == ["tensor(4.0000)", *_EXPECTED, "tensor([1.])"]
