"""Triton kernels for the losses that are worth one, and whether this machine can run them.

Imports on any machine: torch and triton are looked at when asked, not before. Where the
Triton back end cannot serve, every loss runs on its torch back end, with equal results.
"""
import os
from importlib.util import find_spec

__all__ = ['available', 'why_not']


def why_not() -> str:
    """Why the Triton back end cannot serve, in a phrase; empty when it can.

    `TRITON_INTERPRET=1` counts as a device: the kernels then run, slowly, on the CPU.
    """
    if find_spec('triton') is None:
        return 'triton is not installed'
    if os.environ.get('TRITON_INTERPRET') == '1':
        return ''
    import torch
    if torch.version.cuda is None and torch.version.hip is None:
        return f'torch {torch.__version__} is built for the CPU alone'
    if not torch.cuda.is_available():
        return 'torch sees no GPU'
    if torch.version.cuda and torch.cuda.get_device_capability() < (7, 0):
        return f'{torch.cuda.get_device_name()} is older than compute capability 7.0'
    return ''


def available() -> bool:
    "Whether the Triton back end can serve on this machine."
    return not why_not()
