"""programs.replay where several threads are at work."""

import threading

import torch
import torch_xla

from xla_ops.programs.replay import replay


def test_threads_trace_once():
    f = replay(lambda x: (x * 3).exp())
    results = [None] * 4

    def run(i):
        with torch.no_grad():
            results[i] = f(torch.full((2,), float(i)).to(torch_xla.device())).cpu()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert f.num_programs == 1
    for i, result in enumerate(results):
        torch.testing.assert_close(result, torch.full((2,), 3.0 * i).exp())
