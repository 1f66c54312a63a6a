"""Unpacks pinned wheels into a repository, for headers and tools."""

load("//third_party/pip:pip.bzl", "pip_python", "run_pip_install")

# One fixed target instead of the interpreter that happens to run pip: the
# repository's content depends on the lock file alone. pip does not expand a
# platform to the older ones that it includes, hence the list.
WHEEL_TARGET = [
    "--implementation=cp",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_27_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
    "--platform=manylinux_2_12_x86_64",
    "--platform=manylinux2010_x86_64",
    "--platform=manylinux1_x86_64",
]

def _pip_wheels_impl(ctx):
    # One call for all wheels: pip then merges those that share a folder,
    # such as the parts of nvidia/cu13.
    run_pip_install(
        ctx,
        pip_python(ctx),
        ctx.path(ctx.attr.requirements),
        ctx.attr.target + ["--no-compile", "--target", str(ctx.path("wheels"))],
    )
    for folder in ctx.attr.keep:
        target = folder.split("/")[-1]
        result = ctx.execute(["mv", "wheels/" + folder, target])
        if result.return_code:
            fail("the wheels of %s hold no %s" % (ctx.name, folder))
    ctx.delete("wheels")

    # Wheels made without Unix permissions lose the run bit.
    for folder in ctx.attr.executable:
        result = ctx.execute(["find", folder, "-type", "f", "-exec", "chmod", "+x", "{}", "+"])
        if result.return_code:
            fail("%s: %s" % (ctx.name, result.stderr))
    ctx.symlink(ctx.path(ctx.attr.build_file), "BUILD")

pip_wheels = repository_rule(
    implementation = _pip_wheels_impl,
    attrs = {
        "build_file": attr.label(
            allow_single_file = True,
            mandatory = True,
            doc = "BUILD file of the repository.",
        ),
        "executable": attr.string_list(
            doc = "Folders of the repository whose files are programs.",
        ),
        "keep": attr.string_list(
            mandatory = True,
            doc = "Folders of the wheels to keep, under their last name.",
        ),
        "requirements": attr.label(allow_single_file = True, mandatory = True),
        "target": attr.string_list(
            default = WHEEL_TARGET,
            doc = "pip's options that choose the wheels: another processor's, " +
                  "for files that are the same on all.",
        ),
    },
    environ = ["XLA_OPS_PYTHON"],
    doc = "Unpacks one section of requirements.lock.",
)
