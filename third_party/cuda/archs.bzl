"""The flag //third_party/cuda:archs, parsed and checked."""

# What a kernel's file may have before .cu.cc, and the compute capability that
# it is for alone. (For tcgen05 10.0 has to become 10.0f: here, in the flag's
# default and in .bazelrc.)
CAPABILITY_OF_SUFFIX = {
    "sm90": "9.0a",
    "sm100": "10.0",
}

CudaArchsInfo = provider(
    doc = "The CUDA architectures to build for.",
    fields = {
        "archs": "list of structs of text (\"12.0+PTX\"), capability " +
                 "(\"12.0\"), sm (\"120\"), ptx (bool)",
    },
)

def _parse(text, owner):
    ptx = text.endswith("+PTX")
    capability = text[:-len("+PTX")] if ptx else text
    suffix = capability[-1:] if capability[-1:] in ["a", "f"] else ""
    number = capability[:-1] if suffix else capability
    major, dot, minor = number.partition(".")
    if not (dot and major.isdigit() and len(minor) == 1 and minor.isdigit()):
        fail(("%s must be `none` or a comma-separated list of compute " +
              "capabilities such as 8.0,9.0a,12.0+PTX, got %s") % (owner, text))
    if int(major) < 7:
        fail("%s must hold capabilities from 7.0, got %s" % (owner, text))
    return struct(
        text = text,
        capability = capability,
        sm = major + minor + suffix,
        ptx = ptx,
    )

def archs_of_capability(archs, capability, owner):
    """The architectures of the flag that sources for one capability are for.

    Args:
      archs: CudaArchsInfo.archs.
      capability: such as "9.0a".
      owner: the label of the sources, for the message.

    Returns:
      The archs of that capability: none where the flag has no such GPU. Fails
      where it has, but in another form: 9.0 for 9.0a.
    """
    chosen = [arch for arch in archs if arch.capability == capability]
    if chosen:
        return chosen
    number = capability.rstrip("af")
    for arch in archs:
        if arch.capability.rstrip("af") == number:
            fail("//third_party/cuda:archs must hold %s, not %s: %s is for %s" %
                 (capability, arch.text, owner, capability))
    return []

def _cuda_archs_impl(ctx):
    value = ctx.build_setting_value
    if value == "none":
        return [CudaArchsInfo(archs = [])]
    archs = [_parse(text, ctx.label) for text in value.split(",")]
    if len(archs) > 1 and "7.0" in [arch.capability for arch in archs]:
        fail("%s must hold 7.0 alone, since CUDA 13 cannot build it, got %s" %
             (ctx.label, value))
    return [CudaArchsInfo(archs = archs)]

cuda_archs = rule(
    implementation = _cuda_archs_impl,
    build_setting = config.string(flag = True),
    doc = "The build setting that holds the architectures.",
)

def _cuda_archs_define_impl(ctx):
    archs = ctx.attr._archs[CudaArchsInfo].archs
    text = " ".join([arch.text for arch in archs])
    return [CcInfo(
        compilation_context = cc_common.create_compilation_context(
            defines = depset(["XLA_OPS_CUDA_ARCHS=\"%s\"" % text]),
        ),
    )]

cuda_archs_define = rule(
    implementation = _cuda_archs_define_impl,
    attrs = {
        "_archs": attr.label(
            default = "//third_party/cuda:archs",
            providers = [CudaArchsInfo],
        ),
    },
    doc = "Defines XLA_OPS_CUDA_ARCHS for what depends on it.",
    provides = [CcInfo],
)

def _cuda_built_define_impl(ctx):
    capabilities = [a.capability for a in ctx.attr._archs[CudaArchsInfo].archs]
    return [CcInfo(
        compilation_context = cc_common.create_compilation_context(
            defines = depset([
                "XLA_OPS_BUILT_%s=%d" %
                (suffix.upper(), 1 if capability in capabilities else 0)
                for suffix, capability in CAPABILITY_OF_SUFFIX.items()
            ]),
        ),
    )]

cuda_built_define = rule(
    implementation = _cuda_built_define_impl,
    attrs = {
        "_archs": attr.label(
            default = "//third_party/cuda:archs",
            providers = [CudaArchsInfo],
        ),
    },
    doc = "Defines XLA_OPS_BUILT_SM90 and its like, 0 or 1, for what depends " +
          "on it: whether sources for that architecture are built.",
    provides = [CcInfo],
)

def _cuda_archs_file_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    archs = ctx.attr._archs[CudaArchsInfo].archs
    ctx.actions.write(out, " ".join([arch.text for arch in archs]))
    return [DefaultInfo(
        files = depset([out]),
        runfiles = ctx.runfiles(files = [out]),
    )]

cuda_archs_file = rule(
    implementation = _cuda_archs_file_impl,
    attrs = {
        "_archs": attr.label(
            default = "//third_party/cuda:archs",
            providers = [CudaArchsInfo],
        ),
    },
    doc = "A text file with the architectures, for tests; empty for none.",
)
