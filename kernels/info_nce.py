"""`info_nce`: cross-entropy of the key that belongs to a query, among all the other keys.

A large matrix of similarities is never stored: it is worked on a tile at a time, with a running
log-sum-exp, and the backward pass computes the tiles again, from four numbers kept for each row. On a
CPU a small one is kept, which is faster.
Back ends: see `speechloss.kernels.backends`.
"""
import torch
from torch import Tensor

from . import info_nce_torch
from .backends import check_floating, check_temperature, choose, working_dtype


def info_nce(
    queries: Tensor,                          # (N, D), floating point
    keys: Tensor,                             # (N, D); key i belongs to query i
    *,
    temperature: float = 0.1,                 # at least 1e-6; scores are divided by it
    extra_negatives: Tensor | None = None,    # (M, D), further keys that belong to no query
    groups: Tensor | None = None,             # (N,) integers; pairs within a group are ignored
    normalize: bool = True,                   # cosine similarity instead of the inner product
    backend: str = 'auto',                    # see speechloss.kernels.backends
) -> Tensor:                                  # (N,) >= 0, nats
    """Return the cross-entropy of each query's own key among all keys.

    `-ln(exp(s_ii) / sum_j exp(s_ij))` with `s = cos(queries, keys) / temperature`. The sum goes
    over all keys and extra negatives but for other members of the query's own group, such as
    the other frames of its utterance. Gradients reach queries, keys and extra negatives: detach
    what should not move. Shorter types are computed in float32, also under autocast; float64 in
    float64. Rows to normalize may be as long as 1e37, or 1e19 in Triton: longer ones count
    as silence. A second derivative needs `backend='reference'`. The temperature is a number: to
    learn one, scale the queries and pass `normalize=False, temperature=1.`. Raises
    ValueError and TypeError for what cannot be computed, before anything is.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.)
    tensor([0.3133, 0.3133])
    """
    if not (isinstance(queries, Tensor) and isinstance(keys, Tensor) and queries.ndim == 2 and queries.numel()
            and queries.shape == keys.shape and queries.is_floating_point() and keys.is_floating_point()
            and queries.device == keys.device and groups is extra_negatives is None):
        _check(queries, keys, extra_negatives, groups)
    check_temperature(temperature, 'scale the queries and pass normalize=False, temperature=1.')
    others = keys if extra_negatives is None else torch.cat([keys, extra_negatives])   # (N + M, D)
    chosen = choose(backend, queries, others)
    if chosen == 'reference':
        with torch.autocast(queries.device.type, enabled=False):
            return info_nce_torch.reference(queries, others, groups, temperature, normalize)
    options = queries, others, groups, float(temperature), normalize, chosen
    # the price of an operator is that of a small matrix: there the same two functions are called directly
    if chosen == 'torch' and not torch.compiler.is_compiling() and info_nce_torch.fits(
            queries.shape[0], others.shape[0], working_dtype(queries, others).itemsize):
        return _Direct.apply(*options)
    return _info_nce(*options)[0]


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::info_nce', mutates_args=())
def _info_nce(queries: Tensor, keys: Tensor, groups: Tensor | None, temperature: float, normalize: bool,
              backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "Loss (N,), and three tensors that the backward pass needs"
    with torch.autocast(queries.device.type, enabled=False):
        if backend == 'triton':
            from . import info_nce_triton   # here, since it needs triton
            return info_nce_triton.forward(queries, keys, groups, temperature, normalize)
        return info_nce_torch.forward(queries, keys, groups, temperature, normalize)


@_info_nce.register_fake
def _(queries, keys, groups, temperature, normalize, backend):
    (pairs, dims), count = queries.shape, len(keys)
    new = queries.new_empty(pairs, dtype=working_dtype(queries, keys))
    if backend == 'torch' and info_nce_torch.fits(pairs, count, new.dtype.itemsize):
        shapes = info_nce_torch.whole_shapes(pairs, count, dims, new.dtype, normalize)
    else: shapes = (pairs,), (pairs,), (count,)
    return new, *(new.new_empty(shape) for shape in shapes)


@torch.library.custom_op('speechloss::info_nce_backward', mutates_args=())
def _info_nce_backward(grad: Tensor, queries: Tensor, keys: Tensor, groups: Tensor | None, saved: list[Tensor],
                       temperature: float, normalize: bool, need: list[bool],
                       backend: str) -> tuple[Tensor, Tensor]:
    "Gradients of queries and keys, empty where not needed; they have no derivative of their own"
    with torch.autocast(queries.device.type, enabled=False):
        if backend == 'triton':
            from . import info_nce_triton
            return info_nce_triton.backward(grad, queries, keys, groups, saved, temperature, normalize, need)
        found = info_nce_torch.backward(grad, queries, keys, groups, saved, temperature, normalize, need)
        return found[0], found[1].clone() if found[1].storage_offset() else found[1]   # no result within another


@_info_nce_backward.register_fake
def _(grad, queries, keys, groups, saved, temperature, normalize, need, backend):
    return tuple(x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip((queries, keys), need))


def _keep(ctx, inputs, output):
    queries, keys, groups, *ctx.options = inputs
    ctx.save_for_backward(queries, keys, groups, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    if grad is None: return (None,) * 6
    queries, keys, groups, *saved = ctx.saved_tensors
    temperature, normalize, backend = ctx.options
    need = list(ctx.needs_input_grad[:2])
    grads = _info_nce_backward(grad, queries, keys, groups, saved, temperature, normalize, need, backend)
    return *(g if wanted else None for g, wanted in zip(grads, need)), None, None, None, None


_info_nce.register_autograd(_backward, setup_context=_keep)


class _Direct(torch.autograd.Function):
    "`_info_nce` in plain torch with the matrix in memory, without the operator"
    @staticmethod
    def forward(ctx, *inputs):   # with `_keep` inside: apart from it torch looks at signatures, which takes its time
        if torch.is_autocast_enabled(inputs[0].device.type):
            with torch.autocast(inputs[0].device.type, enabled=False):
                output = info_nce_torch.whole_forward(*inputs[:-1])
        else: output = info_nce_torch.whole_forward(*inputs[:-1])
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        # a second derivative is an error of the operator
        if grad is None or torch.is_grad_enabled(): return _backward(ctx, grad)
        queries, keys, groups, *saved = ctx.saved_tensors
        temperature, normalize, _ = ctx.options
        need = ctx.needs_input_grad
        options = grad, queries, keys, groups, saved, temperature, normalize, need
        if torch.is_autocast_enabled(queries.device.type):
            with torch.autocast(queries.device.type, enabled=False): grads = info_nce_torch.backward(*options)
        else: grads = info_nce_torch.backward(*options)
        return grads[0] if need[0] else None, grads[1] if need[1] else None, None, None, None, None


# ---------------------------------------------------------------------------------- checks

def _check(queries: Tensor, keys: Tensor, extra_negatives: Tensor | None, groups: Tensor | None) -> None:
    named = dict(queries=queries, keys=keys)
    if extra_negatives is not None: named['extra_negatives'] = extra_negatives
    for name, x in named.items():
        check_floating(name, x)
        if x.ndim != 2 or not x.shape[1] or (not len(x) and name != 'extra_negatives'):
            raise ValueError(f'{name} has shape {tuple(x.shape)}: give (rows, dims), at least one of each')
        if x.device != queries.device:
            raise ValueError(f'{name} is on {x.device} and queries on {queries.device}: move them to one device')
        if x.shape[1] != queries.shape[1]:
            raise ValueError(f'{name} has {x.shape[1]} dims and queries have {queries.shape[1]}: '
                             'the two must be equal')
    if len(keys) != len(queries):
        raise ValueError(f'there are {len(keys)} keys and {len(queries)} queries: give one key for each query; '
                         'further ones go to extra_negatives')
    if groups is None: return
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f'groups is {got}: give integers, one per query')
    if groups.shape != (len(queries),) or groups.device != queries.device:
        raise ValueError(f'groups has shape {tuple(groups.shape)} on {groups.device}: give {len(queries)} '
                         f'integers on {queries.device}, one per query')
