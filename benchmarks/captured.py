"""A function's time on the device alone: what is left when the host's launches are captured once."""

import torch


def captured(run):
    """The replay of a CUDA graph of a function: its time without that of the host's launches."""
    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    if not torch.equal(out, expected):
        raise RuntimeError("the graph's output is not that of the call it was captured from")
    return graph.replay
