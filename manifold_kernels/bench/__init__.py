"""The benchmark: a step by every method against ``torch.optim.SGD(momentum=0.9, fused=True)``. It asserts nothing.

``workloads`` (of ``networks``) say what is stepped, ``methods`` and ``peers`` by what; ``cases`` combines them,
``measure`` takes the time, ``report`` keeps the figures with machine, versions and commit, ``plots`` draws them.
"""
