"""The closed set of test tags.

Tests that need a GPU carry exactly one of the capability tags, the lowest
compute capability on which they can run. They are chosen by a config
(.bazelrc) and never skip: a chosen test whose GPU is missing fails.

    gpu     any GPU that the kernels support
    sm80    8.0 and later (bf16 tensor cores, cp.async)
    sm89    8.9 and later (fp8 tensor cores)
    sm90    9.0 alone (wgmma, TMA)
    sm100   10.0 alone
    sm120   12.0 alone
"""

GPU_TAGS = ["gpu", "sm80", "sm89", "sm90", "sm100", "sm120"]

# Tags with a meaning to Bazel itself.
_BAZEL_TAGS = ["exclusive", "manual", "no-sandbox"]

def check_tags(name, tags):
    """Fails for an unknown tag or two capability tags.

    Args:
      name: the test's name, for the message.
      tags: its tags.

    Returns:
      Whether the test needs a GPU.
    """
    for tag in tags:
        if tag not in GPU_TAGS + _BAZEL_TAGS:
            fail("%s: tags must be of %s, got %s" % (
                name,
                GPU_TAGS + _BAZEL_TAGS,
                tag,
            ))
    capabilities = [tag for tag in tags if tag in GPU_TAGS]
    if len(capabilities) > 1:
        fail("%s: tags must hold at most one of %s, got %s" % (
            name,
            GPU_TAGS,
            capabilities,
        ))
    return bool(capabilities)
