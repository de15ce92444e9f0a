"""Kernels for the losses that are worth one, and whether this machine can run them.

Each family is a module of its own: the call, a readable reference, and its algorithm in
torch; the Triton back end lies beside it in `triton_*.py` and is imported when it is to
serve. Needs torch alone; with Triton and a GPU the same calls run there.
"""
from .backends import BACKENDS, available, why_not

__all__ = ['BACKENDS', 'available', 'why_not']
