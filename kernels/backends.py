"""`choose`, `available` and `why_not`: which back end serves a call, and why Triton cannot.

A call names one of four:

    reference   plain torch in a few lines; what tests compare with, and the only one that has
                second derivatives
    torch       the algorithm of the kernel in torch, with its gradient, on any device
    triton      the same in Triton, for float32 and shorter types on a GPU
    auto        triton where it can serve, else torch

Beside them stand the checks of arguments that several kernels share.
"""
import math
import os
from importlib.util import find_spec
from numbers import Real

import torch
from torch import Tensor

BACKENDS = ('auto', 'torch', 'triton', 'reference')
#: Least temperature: with a smaller one scores of ordinary rows overflow
LEAST_TEMPERATURE = 1e-6


def why_not() -> str:
    """Return why the Triton back end cannot serve, in a phrase; empty when it can.

    `TRITON_INTERPRET=1` counts as a device: the kernels then run, slowly, on the CPU.
    """
    if find_spec('triton') is None:
        return 'triton is not installed'
    if interpreted():
        return ''
    if torch.version.cuda is None and torch.version.hip is None:
        return f'torch {torch.__version__} is built for the CPU alone'
    if not torch.cuda.is_available():
        return 'torch sees no GPU'
    if torch.version.cuda and torch.cuda.get_device_capability() < (7, 0):
        return f'{torch.cuda.get_device_name()} is older than compute capability 7.0'
    return ''


def interpreted() -> bool:
    "Return whether Triton kernels run in its interpreter, on the CPU"
    return os.environ.get('TRITON_INTERPRET') == '1'


def available() -> bool:
    "Return whether the Triton back end can serve on this machine"
    return not why_not()


def choose(
    backend: str,      # one of BACKENDS
    *tensors: Tensor,  # what the call works on
) -> str:              # 'torch', 'triton' or 'reference'
    """Return the back end that serves a call.

    Raises ValueError for an unknown name, and RuntimeError where Triton was asked for by name
    and cannot serve, or where forward-mode differentiation is under way.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend is {backend!r}: choose one of {", ".join(BACKENDS)}')
    if backend != 'reference' and _forward_mode() and any(_has_tangent(t) for t in tensors):
        raise RuntimeError("the kernels have no forward-mode derivative: use backend='reference'")
    if backend in ('torch', 'reference'):
        return backend
    if backend == 'auto' and tensors[0].is_cpu:
        return 'torch'
    double = working_dtype(*tensors) == torch.float64
    on_gpu = all(t.is_cuda for t in tensors)
    if backend == 'auto':
        return 'triton' if on_gpu and not double and available() else 'torch'
    if reason := why_not():
        raise RuntimeError(f"backend 'triton' cannot serve: {reason}; use backend='auto'")
    if double:
        raise RuntimeError("backend 'triton' works in float32 and the tensors are float64: use backend='torch'")
    if not on_gpu and not interpreted():
        raise RuntimeError(f"backend 'triton' wants tensors on a GPU, these are on {tensors[0].device}: "
                           "move them, or use backend='auto'")
    return 'triton'


def _forward_mode() -> bool:
    "Whether forward-mode differentiation is under way, for which a custom operator would give zero without a word"
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def _has_tangent(tensor: Tensor) -> bool:
    "Whether forward-mode differentiation goes through a tensor"
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def wants_grad(*tensors: Tensor) -> bool:
    "Return whether autograd will ask for a gradient of one of these"
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    "Return float64 if one of the tensors is, else float32, in which shorter types are computed"
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_floating(name: str, value: object) -> None:
    "Raise TypeError for what is not a real floating point tensor"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f'{name} is {got}: give a real floating point tensor')


def check_temperature(
    temperature: float,
    learned: str,         # what to do for a temperature that is learned, for the message
) -> None:
    "Raise TypeError for what is not a number and ValueError for one below LEAST_TEMPERATURE or infinite"
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f'temperature is a {type(temperature).__name__}: give a number; to learn one, {learned}')
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f'temperature is {temperature}: give a number of at least {LEAST_TEMPERATURE}')
