#!/usr/bin/env python3
"""Adds up Bazel's test.xml files below a folder: test_summary.py DIR.

Prints a line a target that failed and, last, "N passed, N failed". Exit status 1 if a
case failed or none ran.
"""

import pathlib
import sys
from xml.etree import ElementTree


def count(file):
    """Returns (cases, failures) of one test.xml."""
    cases = failures = 0
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        cases += 1
        failures += any(child.tag in ("failure", "error") for child in case)
    return cases, failures


def main():
    passed = failed = 0
    root = pathlib.Path(sys.argv[1])
    for file in sorted(root.rglob("test.xml")):
        cases, failures = count(file)
        passed += cases - failures
        failed += failures
        if failures:
            print(f"{file.parent.relative_to(root)}: {failures} of {cases} failed")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
