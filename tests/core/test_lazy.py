"""The declarations of all ops without torch, and with torch after them (core/lazy.py).

Each test is a process: what is imported first decides.
"""

import subprocess
import sys
import textwrap

from xla_ops.core.op import OPS

_NO_TORCH = "import sys; sys.modules['torch'] = None"
_JAX_FIRST = "import sys, types; sys.modules['jax'] = types.ModuleType('jax')"


def _run(*parts):
    code = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_declares_all_ops_without_torch():
    out = _run(
        _NO_TORCH,
        """
        import xla_ops
        from xla_ops.core.op import OPS
        for op in OPS.values():
            print(op.name, *op.arguments)
        """,
    )
    expected = [" ".join((op.name, *op.arguments)) for op in OPS.values()]
    assert out.splitlines() == expected


def test_schemas_name_the_arguments_that_torch_reads_in_them():
    for op in OPS.values():
        arguments = op.overload._schema.arguments
        assert op.arguments == tuple(argument.name for argument in arguments)


def test_says_what_is_missing_where_torch_is():
    out = _run(
        _NO_TORCH,
        """
        import xla_ops
        try:
            xla_ops.rms_norm
        except ImportError as error:
            print(error)
        from xla_ops.core.hlo import torch
        from xla_ops.core.op import autograd
        for ask in (lambda: torch.zeros, lambda: autograd.kernel):
            try:
                ask()
            except RuntimeError as error:
                print(error)
        """,
    )
    assert out.splitlines() == [
        "import of torch halted; None in sys.modules",
        "torch.zeros must not be asked for where xla_ops runs without torch",
        "xla_ops.core.autograd must not be used without torch",
    ]


def test_torch_stays_out_where_jax_is_first_until_an_op_is_asked_for():
    out = _run(
        _JAX_FIRST,
        """
        import xla_ops
        print("torch" in sys.modules)
        rms_norm = xla_ops.rms_norm
        print("torch" in sys.modules)
        """,
    )
    assert out.split() == ["False", "True"]


def test_ops_work_where_torch_comes_later():
    """Constants that were made before torch still mean its dtypes."""
    out = _run(
        _JAX_FIRST,
        """
        import xla_ops
        static_scaled_fp8_quant = xla_ops.static_scaled_fp8_quant
        import torch
        print(static_scaled_fp8_quant(torch.tensor([3.0]), torch.tensor(0.5)).float())
        kv = torch.zeros(2, 2, 4, 1, 8, dtype=torch.uint8)
        rows = torch.ones(2, 1, 8)
        slots = torch.tensor([1, -1])
        xla_ops.reshape_and_cache_flash(rows, rows, kv[0], kv[1], slots, "fp8")
        print(kv.count_nonzero().item(), kv[0, 0, 1, 0, 0].item())
        xla_ops.set_debug(True)
        print(torch.ops.xla_ops.rms_norm(rows, rows[0, 0], 1e-6).shape)
        """,
    )
    assert out.splitlines() == ["tensor([6.])", "16 56", "torch.Size([2, 1, 8])"]


def test_ops_of_torch_are_there_as_soon_as_torch_is():
    out = _run(
        _JAX_FIRST,
        """
        import xla_ops, sys
        num_finders = len(sys.meta_path)
        import torch
        print(torch.ops.xla_ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-12))
        print(num_finders - len(sys.meta_path))
        """,
    )
    assert out.splitlines() == ["tensor([[1., 1., 1., 1.]])", "1"]


def test_constants_hold_dtypes_of_torch_where_it_comes_later():
    """A cache's codes were of a dtype that torch does not take."""
    out = _run(
        _JAX_FIRST,
        """
        import sys
        from xla_ops.ops.convert_fp8 import convert_fp8
        from xla_ops.core import no_torch, paged_cache
        import torch
        for name, module in sys.modules.items():
            if name.startswith("xla_ops.") and module is not no_torch:
                for constant, value in vars(module).items():
                    values = value.values() if type(value) is dict else [value]
                    for one in values:
                        held = one if type(one) in (tuple, list) else [one]
                        if any(isinstance(item, no_torch.DType) for item in held):
                            print(name, constant)
        rows = torch.ones(2, 1, 8)
        codes = paged_cache.convert(rows, None, "fp8")
        print(codes.dtype, convert_fp8(rows).dtype)
        """,
    )
    assert out.split() == ["torch.float8_e4m3fn"] * 2


def test_torch_is_imported_where_ops_cannot_be_defined():
    out = _run(
        _JAX_FIRST,
        """
        import warnings, xla_ops
        from xla_ops.core import lazy
        def fail():
            raise RuntimeError("no such thing")
        lazy.when_torch(fail)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch
        print(torch.ones(1).item(), *(w.message for w in caught))
        """,
    )
    assert out.strip() == (
        "1.0 xla_ops: torch.ops.xla_ops could not be defined for this torch:"
        " no such thing"
    )


def test_attribute_that_is_no_op():
    out = _run(
        _NO_TORCH,
        """
        import xla_ops
        try:
            xla_ops.no_such_op
        except AttributeError as error:
            print(error)
        """,
    )
    assert out.strip() == "module 'xla_ops' has no attribute 'no_such_op'"
