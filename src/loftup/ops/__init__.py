"""Kernels, each beside its plain reference; they know nothing of models, and choose nothing.

``reference`` says what each Triton kernel computes; ``triton_*`` are the kernels, as ``torch.library`` operators.
``attention``, ``cpu`` and ``winograd`` put PyTorch's own operations together.
"""
