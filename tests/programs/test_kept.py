"""programs.kept: a program is taken from a folder only if it is that of the graph.

XLA's CPU client cannot load what it has written, so there the folder saves no time; who
may take what is the same.
"""

import subprocess
import sys

_PROGRAM = """
import sys, torch, torch_xla
import torch_xla.debug.metrics as met
from xla_ops.programs.kept import keep_programs
from xla_ops.programs.replay import replay

keep_programs(sys.argv[1])
device = torch_xla.device()
host = [torch.randn(9, 9) for _ in range(3)]
given = [t.to(device) for t in host]
# Which torch_xla cannot tell apart.
functions = {
    "first": lambda a, b, c: (a.T, b.T, c.T, a * b + c),
    "second": lambda a, b, c: (a.T, b.T, c.T, a * c + b),
}
for name in sys.argv[2:]:
    result = replay(functions[name])(*given)[-1].cpu()
    torch.testing.assert_close(result, functions[name](*host)[-1])
print("right")
"""


def execute(script, *arguments):
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run(folder, *names):
    done = execute(_PROGRAM, folder, *names)
    assert done.stdout.strip() == "right", done.stderr


def digests(folder):
    return sorted(path.read_text() for path in folder.glob("*.hlo-sha256"))


def test_another_process_finds_what_a_program_computes(tmp_path):
    run(tmp_path, "first")
    (first,) = digests(tmp_path)
    run(tmp_path, "second")
    assert len(digests(tmp_path)) == 2
    assert first in digests(tmp_path)
    run(tmp_path, "first", "second")
    run(tmp_path, "second", "first")
    assert len(digests(tmp_path)) == 2


def test_a_program_of_unknown_hlo_is_not_taken(tmp_path):
    run(tmp_path, "first")
    for path in tmp_path.glob("*.hlo-sha256"):
        path.unlink()
    run(tmp_path, "second")
    assert len(digests(tmp_path)) == 1


def test_programs_of_another_hlo_are_not_taken(tmp_path):
    run(tmp_path, "first")
    (path,) = tmp_path.glob("*.hlo-sha256")
    path.write_text("another")
    run(tmp_path, "first")
    assert path.read_text() == "another"
    assert len(digests(tmp_path)) == 2


_LATE = """
import sys, torch, torch_xla
from xla_ops.programs.kept import keep_programs

computed = torch.ones(1).to(torch_xla.device()) + 1
torch_xla.sync(wait=True)
try:
    keep_programs(sys.argv[1])
except RuntimeError as error:
    print(error)
"""


def test_too_late(tmp_path):
    done = execute(_LATE, tmp_path)
    done.check_returncode()
    assert done.stdout.startswith("keep_programs: must be called before anything is")


_FULL = """
import resource, sys, warnings, torch, torch_xla
from xla_ops.programs.kept import keep_programs
from xla_ops.programs.replay import replay

keep_programs(sys.argv[1])
x = torch.ones(3).to(torch_xla.device())
torch_xla.sync(wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    f = replay(lambda x, n: x * n)
    print([f(x, n).tolist() for n in (2, 2, 3)])
print(*(w.message for w in caught), sep=chr(10))
"""


def test_a_folder_that_is_full_keeps_nothing_and_stops_nothing(tmp_path):
    done = execute(_FULL, tmp_path)
    results, warning = done.stdout.splitlines()
    assert results == str([[2.0] * 3, [2.0] * 3, [3.0] * 3])
    assert warning.startswith("keep_programs: programs are not kept any more, because ")
    assert str(tmp_path) in warning and "File too large" in warning
    assert not digests(tmp_path) and not list(tmp_path.glob("*.[0-9]*"))
