"""The Triton backend: the same operator for GPUs, NVIDIA's and AMD's, where there is no compiler.

``launch`` has the operator, which ``ops.resolve`` imports when it is asked for: importing Triton takes a while.
"""
