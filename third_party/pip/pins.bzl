"""Cuts requirements.lock into one file per section.

The other repositories depend on their own section only, so that a new version
of one package does not install everything else again.
"""

def _pip_pins_impl(ctx):
    text = ctx.read(ctx.path(ctx.attr.lock))
    found = {}
    for part in text.split("\n# [")[1:]:
        name, _, requirements = part.partition("]\n")
        found[name] = requirements.strip() + "\n"
    if sorted(found.keys()) != sorted(ctx.attr.sections):
        fail("%s must hold the sections %s, got %s; run %s" % (
            ctx.attr.lock,
            sorted(ctx.attr.sections),
            sorted(found.keys()),
            "third_party/update_lock.py",
        ))
    for name, requirements in found.items():
        ctx.file(name + ".txt", requirements, executable = False)
    ctx.file("BUILD", "exports_files(glob([\"*.txt\"]))\n", executable = False)

pip_pins = repository_rule(
    implementation = _pip_pins_impl,
    attrs = {
        "lock": attr.label(allow_single_file = True, mandatory = True),
        "sections": attr.string_list(mandatory = True),
    },
    doc = "Makes @NAME//:SECTION.txt for each section of a lock file.",
)
