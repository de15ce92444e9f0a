"""`token_cross_entropy`: cross-entropy of frames against tokens, where logits are minus distances to codes.

This is the self-distillation loss of VQScore: the tokens are the nearest codes of the clean
frames, the logits minus the Euclidean distance of a frame to all codes. The matrix of frames x
codes is never stored: a running log-sum-exp goes over tiles of codes. The backward pass makes
the tiles anew and needs one number per frame, `rest`: the log-sum-exp over all codes but the
target t. Back ends: see `speechloss.kernels.backends`.

With `h` minus the logits the loss is `softplus(h_t + rest)`, and the gradient in `h` is
`w_t = sigmoid(h_t + rest)` at the target and minus the probability elsewhere: no difference of
two nearly equal numbers, however sure the frame is of its token. In the squared distances it is
`u = w h'`, and in a frame `2 x sum_j u_j - 2 u C`, a matrix product.
"""
import torch
from torch import Tensor

from . import token_loss_torch
from .backends import check_temperature, choose, working_dtype
from .frames_and_codes import anchor, check, counted_frames, described, flattened, unit
from .token_loss_torch import LEFT_OUT, METRICS



def token_cross_entropy(
    frames: Tensor,                 # (N, D) or (B, F, D), any float dtype
    codes: Tensor,                  # (K, D)
    targets: Tensor,                # frames.shape[:-1], integers in [0, K), or ignore_index
    *,
    temperature: float = 1.,        # logits are minus distance / temperature
    metric: str = 'euclidean',      # VQScore's; or 'squared' (Euclidean), or 'cosine' (1 - cosine)
    ignore_index: int = -1,         # a target to leave out, as `nearest_code` gives padded frames
    lengths: Tensor | None = None,  # (B,) frames that count, of (B, F, D)
    mask: Tensor | None = None,     # frames.shape[:-1], bool: True counts
    backend: str = 'auto',          # 'auto', 'torch', 'triton' or 'reference'
) -> Tensor:                        # frames.shape[:-1], >= 0; 0 for what does not count
    """Return `-log softmax(-distance(frame, codes) / temperature)[target]` of every frame.

    'euclidean' is the distance itself (`nearest_code` has its square unless told otherwise); its
    gradient on a code that the frame coincides with is 0. A frame that lies on another code than its own has
    that one distance to half the digits (1e-4 of its length), as with `torch.cdist`.
    Computed in float32 (float64 if an input is), inside autocast too. Differentiable once in
    frames and codes; backend='reference' twice. Raises ValueError or TypeError where shapes,
    dtypes, devices, options or targets do not fit.

    >>> token_cross_entropy(torch.zeros(1, 2), torch.tensor([[3., 4.], [0., 5.]]), torch.tensor([1]))
    tensor([0.6931])
    """
    if metric not in METRICS:
        raise ValueError(f'metric is {metric!r}: choose one of {", ".join(METRICS)}')
    check_temperature(temperature, "scale frames and codes, with a metric other than 'cosine'")
    check(frames, codes)
    _check_targets(frames, codes, targets, ignore_index)
    valid, ignored = counted_frames(frames, lengths, mask), targets == ignore_index
    valid = ~ignored if valid is None else valid & ~ignored
    # where values are not checked, an index out of range is not read: its loss is NaN, without a gradient
    wrong = valid & ((targets < 0) | (targets >= len(codes)))
    valid = valid & ~wrong
    tokens, c = targets.long().masked_fill(~valid, LEFT_OUT).flatten(), codes.to(working_dtype(codes, frames))
    chosen = choose(backend, frames, c)
    # the operator itself reads no frame that is left out, and so keeps no masked copy of the frames
    x = flattened(frames, valid if chosen == 'reference' or metric == 'cosine' else None, codes)
    if metric == 'cosine':
        x, c = unit(x), unit(c)
    scale = (.5 if metric == 'cosine' else 1) / float(temperature)  # 1 - a.b of unit vectors: half of -2 a.b
    if chosen == 'reference':
        loss = token_loss_torch.reference(x, c, tokens, scale, metric)
    else:
        loss = _token_loss(x, c, tokens, scale, metric, chosen)[0]
    return loss.view(valid.shape) + torch.where(wrong, torch.nan, 0.)    # a sum keeps nothing for backward


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::token_loss', mutates_args=())
def _token_loss(frames: Tensor, codes: Tensor, targets: Tensor, scale: float, metric: str, backend: str
               ) -> tuple[Tensor, Tensor]:
    "Loss (N,) and `rest` (N,), which backward needs; the logits are `-scale * distance`"
    with torch.autocast(frames.device.type, enabled=False):
        if backend == 'triton':
            from . import token_loss_triton   # here, since it needs triton
            return token_loss_triton.forward(*_prepared(frames, codes, metric), targets, scale, metric)
        return token_loss_torch.forward(*_prepared(frames, codes, metric), targets, scale, metric)


@torch.library.custom_op('speechloss::token_loss_backward', mutates_args=())
def _token_loss_backward(
    grad: Tensor, frames: Tensor, codes: Tensor, targets: Tensor, rest: Tensor, scale: float, metric: str,
    backend: str, need: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients (N, D) and (K, D), of frames and of codes; one that is not needed is empty.

    It has no derivative of its own: a second one is an error, not a silent zero.
    """
    with torch.autocast(frames.device.type, enabled=False):
        prepared = _prepared(frames, codes, metric)
        if backend == 'triton':
            from . import token_loss_triton
            return token_loss_triton.backward(*prepared, targets, scale, metric, rest, grad, need)
        return token_loss_torch.backward(*prepared, targets, scale, metric, rest, grad, need)


@_token_loss.register_fake
def _(frames, codes, targets, scale, metric, backend):
    return frames.new_empty(len(frames)), frames.new_empty(len(frames))


@_token_loss_backward.register_fake
def _(grad, frames, codes, targets, rest, scale, metric, backend, need):
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in zip((frames, codes), need))


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, ctx.metric, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    need = list(ctx.needs_input_grad[:2])
    grads = _token_loss_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.metric, ctx.backend, need)
    return *(g if wanted else None for g, wanted in zip(grads, need)), None, None, None, None


_token_loss.register_autograd(_backward, setup_context=_keep)


def _prepared(frames: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "Frames, codes, the point (D,) to take from frames, and |code|^2 (K,)"
    frames, codes = frames.contiguous(), codes.contiguous()
    if metric == 'cosine':
        return frames, codes, torch.zeros_like(codes[0]), torch.zeros_like(codes[:, 0])
    shift = anchor(codes)
    codes = codes - shift
    return frames, codes, shift, codes.square().sum(-1)


# ---------------------------------------------------------------------------------- checks

def _check_targets(frames: Tensor, codes: Tensor, targets: Tensor, ignore_index: int) -> None:
    "Raise TypeError or ValueError where targets are not tokens of these frames and codes"
    if not isinstance(targets, Tensor) or targets.shape != frames.shape[:-1]:
        raise ValueError(f'targets is {described(targets)}: give integers of shape {tuple(frames.shape[:-1])}')
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f'targets is {targets.dtype}: give integers, indices of codes')
    if targets.device != frames.device:
        raise ValueError(f'targets is on {targets.device} and frames on {frames.device}: move one of them')
    if targets.is_cpu and not torch.compiler.is_compiling() and targets.numel():
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= len(codes)))]
        if len(wrong):
            raise ValueError(f'targets holds {int(wrong[0])}: give indices in [0, {len(codes)}), '
                             f'or {ignore_index} to leave a frame out')
