"""The flag //third_party/cuda:archs, parsed and checked."""

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
