"""Prints the interpreter of the environment of tests."""

import sys

print(sys.executable)
