"""The module extension through which MODULE.bazel declares repositories.

A file of its own, because Bazel 4 knows no `module_extension`.
"""

load("//third_party:repositories.bzl", "xla_ops_repositories")

def _xla_ops_impl(_module_ctx):
    xla_ops_repositories()

xla_ops = module_extension(
    implementation = _xla_ops_impl,
    doc = "Repositories of //third_party:repositories.bzl.",
)
