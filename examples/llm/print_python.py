"""Prints the interpreter of Bazel's test environment; tools/demo asks for it."""

import sys

print(sys.executable)
