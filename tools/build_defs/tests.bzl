"""Tests: Python ones against the built wheel, C++ ones against libraries."""

load(":cc.bzl", "COPTS")
load(":tags.bzl", "check_tags")

# Tests that share a GPU run one at a time and outside the sandbox, which
# hides devices.
_GPU_EXECUTION = ["exclusive", "no-sandbox"]

def xla_ops_cc_test(name, copts = [], tags = [], **kwargs):
    """A cc_test with this project's options and checked tags.

    Args:
      name: target.
      copts: further options of the compiler.
      tags: of tags.bzl.
      **kwargs: further arguments of cc_test.
    """
    gpu = check_tags(name, tags)
    native.cc_test(
        name = name,
        copts = COPTS + copts,
        linkstatic = True,
        tags = tags + (_GPU_EXECUTION if gpu else []),
        **kwargs
    )

def xla_ops_py_test(
        name,
        srcs,
        data = [],
        env = {},
        size = "large",
        tags = [],
        python = None,
        **kwargs):
    """Runs pytest on `srcs` against the wheel of the default interpreter.

    A GPU test (see tags.bzl) runs with PJRT_DEVICE=GPU, others with CPU.

    Args:
      name: target.
      srcs: test files, `test_*.py`; conftest.py and helper modules of the
        same folder may be among them.
      data: files that the tests read.
      env: environment variables.
      size: of py_test; large, since importing torch_xla and compiling
        graphs take long on a small machine.
      tags: of tags.bzl.
      python: label of a file with the path of an environment's interpreter, to run
        in another than @xla_ops_env.
      **kwargs: further arguments of py_test.
    """
    gpu = check_tags(name, tags)
    tests = [s for s in srcs if s.split("/")[-1].startswith("test_")]
    if not tests:
        fail("%s: srcs must hold a test_*.py, got %s" % (name, srcs))
    site = "//xla_ops:site"
    native.py_test(
        name = name,
        srcs = ["//tools/build_defs:pytest_main.py"] + srcs,
        args = ["--site=$(rootpath %s)" % site] +
               (["--python=$(rootpath %s)" % python] if python else []) +
               ["$(rootpath %s)" % test for test in tests],
        data = [site, "//:pyproject.toml"] + ([python] if python else []) + data,
        env = dict({"PJRT_DEVICE": "GPU" if gpu else "CPU"}, **env),
        main = "//tools/build_defs:pytest_main.py",
        python_version = "PY3",
        size = size,
        tags = tags + (_GPU_EXECUTION if gpu else []),
        **kwargs
    )

def python_tests(host_only = [], by_hand = [], data = {}, env = {}):
    """Makes a target of every test_*.py of a folder below //tests.

    NAME runs on the CPU; NAME_gpu, tagged `gpu`, the same tests on a GPU.

    Args:
      host_only: tests of parts that are the same whatever the device.
      by_hand: tests that need what no lock file holds, tagged `manual`.
      data: test -> files that it reads.
      env: test -> environment variables.
    """
    helpers = ["//tests:helpers"] + native.glob(
        ["*.py"],
        exclude = ["test_*.py"],
    )
    tests = [path[:-len(".py")] for path in native.glob(["test_*.py"])]
    for test in host_only + by_hand + data.keys() + env.keys():
        if test not in tests:
            fail("//%s has no %s.py" % (native.package_name(), test))
    for test in tests:
        arguments = {
            "srcs": [test + ".py"] + helpers,
            "data": data.get(test, []),
        }
        environment = env.get(test, {})
        xla_ops_py_test(
            name = test,
            env = environment,
            tags = ["manual"] if test in by_hand else [],
            **arguments
        )
        if test not in host_only + by_hand:
            xla_ops_py_test(
                name = test + "_gpu",
                env = dict({"XLA_OPS_TEST_TORCH_CUDA": "1"}, **environment),
                tags = ["gpu"],
                **arguments
            )

def engine_tests(long = {}, by_hand = [], data = {}, env = {}, size = {}):
    """Makes a target of every test_*.py of a folder that tests vLLM's engine.

    They run in @xla_ops_vllm_env. NAME_long, tagged `manual`, is the same test with
    environment variables that make it longer.

    Args:
      long: test -> those environment variables.
      by_hand: tests that are too long for tools/test, tagged `manual`.
      data: test -> files that it reads.
      env: test -> environment variables.
      size: test -> size of py_test, where not large.
    """
    helpers = ["//tests:helpers"] + native.glob(
        ["*.py"],
        exclude = ["test_*.py"],
    )
    tests = [path[:-len(".py")] for path in native.glob(["test_*.py"])]
    for test in long.keys() + by_hand + data.keys() + env.keys() + size.keys():
        if test not in tests:
            fail("//%s has no %s.py" % (native.package_name(), test))
    for test in tests:
        variants = {test: ({}, ["manual"] if test in by_hand else [])}
        if test in long:
            variants[test + "_long"] = (long[test], ["manual"])
        for name, (more, tags) in variants.items():
            xla_ops_py_test(
                name = name,
                srcs = [test + ".py"] + helpers,
                data = data.get(test, []),
                env = dict(env.get(test, {}), **more),
                python = "@xla_ops_vllm_env//:python.txt",
                size = size.get(test, "large") if name == test else "enormous",
                tags = tags,
            )

def jax_tests(data = {}):
    """Makes two targets of every test_*.py of a folder that tests xla_ops.jax.

    NAME runs in @xla_ops_jax_env, with the oldest JAX, NAME_newest with the newest.

    Args:
      data: test -> files that it reads.
    """
    helpers = ["//tests:helpers"] + native.glob(
        ["*.py"],
        exclude = ["test_*.py"],
    )
    for path in native.glob(["test_*.py"]):
        test = path[:-len(".py")]
        for suffix in ("", "_newest"):
            xla_ops_py_test(
                name = test + suffix,
                srcs = [path] + helpers,
                data = data.get(test, []),
                python = "@xla_ops_jax%s_env//:python.txt" % suffix,
            )
