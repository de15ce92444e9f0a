"""Cross-entropy of frames against tokens, with minus the distance to every code as logits.

The self-distillation loss of VQScore: the tokens are the nearest codes of the clean frames, the
logits minus the Euclidean distance of a frame to all codes. The matrix of frames x codes is
never stored: a running log-sum-exp goes over tiles of codes, the backward makes the tiles anew
and needs one number per frame, `rest`: the log-sum-exp over all codes but the target t.

With `h` minus the logits the loss is `softplus(h_t + rest)`, and the gradient in `h` is
`w_t = sigmoid(h_t + rest)` at the target and minus the probability elsewhere: no difference of
two nearly equal numbers, however sure the frame is of its token. In the squared distances it is
`u = w h'`, and in a frame `2 x sum_j u_j - 2 u C`, a matrix product.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import check_temperature, choose
from .nearest_code import anchor, check, counted, described, flat, unit, working

METRICS = ('euclidean', 'squared', 'cosine')
#: Frames and codes of a tile
ROWS, COLUMNS, MATES = 256, 2048, 16
#: The token of a frame that does not count: no loss, no gradient, whatever the frame holds
LEFT_OUT = -1


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
    """`-log softmax(-distance(frame, codes) / temperature)[target]` of every frame.

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
    check_targets(frames, codes, targets, ignore_index)
    valid, ignored = counted(frames, lengths, mask), targets == ignore_index
    valid = ~ignored if valid is None else valid & ~ignored
    # where values are not checked, an index out of range is not read: its loss is NaN, without a gradient
    wrong = valid & ((targets < 0) | (targets >= len(codes)))
    valid = valid & ~wrong
    tokens, c = targets.long().masked_fill(~valid, LEFT_OUT).flatten(), working(codes, frames)
    serve = choose(backend, frames, c)
    # the operator itself reads no frame that is left out, and so keeps no masked copy of the frames
    x = flat(frames, valid if serve == 'reference' or metric == 'cosine' else None, codes)
    if metric == 'cosine':
        x, c = unit(x), unit(c)
    scale = (.5 if metric == 'cosine' else 1) / float(temperature)  # 1 - a.b of unit vectors: half of -2 a.b
    if serve == 'reference':
        loss = F.cross_entropy(-distances(x, c, metric) * scale, tokens, reduction='none', ignore_index=LEFT_OUT)
    else:
        loss = token_loss(x, c, tokens, scale, metric, serve == 'triton')[0]
    return loss.view(valid.shape) + torch.where(wrong, torch.nan, 0.)    # a sum keeps nothing for backward


def distances(x: Tensor, c: Tensor, metric: str) -> Tensor:
    "All of them, (N, K): squared, or their root, or -2 x.c: what nobody should store"
    product = -2 * (x @ c.T)
    if metric == 'cosine':
        return product
    square = (x.square().sum(-1, keepdim=True) + product + c.square().sum(-1)).clamp_min(0)
    return square if metric == 'squared' else torch.where(square > 0, square, 1.).sqrt() * (square > 0)


def check_targets(frames: Tensor, codes: Tensor, targets: Tensor, ignore_index: int) -> None:
    "Raise where targets are not tokens of these frames and codes"
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


# ---- the operator

@torch.library.custom_op('speechloss::token_loss', mutates_args=())
def token_loss(frames: Tensor, codes: Tensor, targets: Tensor, scale: float, metric: str, triton: bool
               ) -> tuple[Tensor, Tensor]:
    "Loss (N,) and `rest` (N,), which backward needs; the logits are `-scale * distance`"
    with torch.autocast(frames.device.type, enabled=False):
        if triton:
            from .token_loss_triton import forward as fast
            return fast(*prepared(frames, codes, metric), targets, scale, metric)
        return forward(*prepared(frames, codes, metric), targets, scale, metric)


@torch.library.custom_op('speechloss::token_loss_backward', mutates_args=())
def token_loss_backward(
    grad: Tensor, frames: Tensor, codes: Tensor, targets: Tensor, rest: Tensor, scale: float, metric: str,
    triton: bool, of_frames: bool, of_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients (N, D) and (K, D); one that is not asked for is empty.

    It has no derivative of its own: a second one is an error, not a silent zero.
    """
    with torch.autocast(frames.device.type, enabled=False):
        if triton:
            from .token_loss_triton import backward as fast
            return fast(*prepared(frames, codes, metric), targets, scale, metric, rest, grad,
                        of_frames, of_codes)
        return backward(*prepared(frames, codes, metric), targets, scale, metric, rest, grad,
                        of_frames, of_codes)


@token_loss.register_fake
def _(frames, codes, targets, scale, metric, triton):
    return frames.new_empty(len(frames)), frames.new_empty(len(frames))


@token_loss_backward.register_fake
def _(grad, frames, codes, targets, rest, scale, metric, triton, of_frames, of_codes):
    return frames.new_empty(frames.shape if of_frames else 0), codes.new_empty(codes.shape if of_codes else 0)


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, ctx.metric, ctx.triton = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _back(ctx, grad, _):
    of_frames, of_codes = ctx.needs_input_grad[:2]
    frames, codes = token_loss_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.metric, ctx.triton,
                                        of_frames, of_codes)
    return frames if of_frames else None, codes if of_codes else None, None, None, None, None


token_loss.register_autograd(_back, setup_context=_keep)


def prepared(frames: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "Frames, codes, the point (D,) to take from frames, and |code|^2 (K,)"
    frames, codes = frames.contiguous(), codes.contiguous()
    if metric == 'cosine':
        return frames, codes, torch.zeros_like(codes[0]), torch.zeros_like(codes[:, 0])
    shift = anchor(codes)
    codes = codes - shift
    return frames, codes, shift, codes.square().sum(-1)


# ---- in torch

def forward(frames, codes, shift, norms, targets, scale, metric) -> tuple[Tensor, Tensor]:
    "Running log-sum-exp over tiles of ROWS frames x COLUMNS codes, the targets left out"
    own = own_distances(frames, codes, shift, targets, metric)
    rest = torch.empty_like(own)
    for rows, x, tiles in walk(frames, codes, shift, norms, targets, metric):
        low = x.new_full((len(x), 1), torch.finfo(x.dtype).max)          # least h so far
        total = torch.zeros_like(low)                                    # sum of exp(low - h)
        for _, tile, _ in tiles:
            logit = tile.mul_(-scale)
            least = torch.minimum(low, -logit.amax(-1, keepdim=True))
            total = total * (least - low).exp() + logit.add_(least).exp_().sum(-1, keepdim=True)
            low = least
        rest[rows] = (total.log() - low)[:rows.stop - rows.start, 0]
    z = own * scale + rest
    return (z.clamp_min(0) + (-z.abs()).exp().log1p()).masked_fill(targets < 0, 0), rest


def backward(frames, codes, shift, norms, targets, scale, metric, rest, grad, of_frames, of_codes
             ) -> tuple[Tensor, Tensor]:
    "The tiles once more, as gradients"
    own = own_distances(frames, codes, shift, targets, metric)
    euclidean = metric == 'euclidean'
    lse, at_target, grad = shares(own, rest, targets, scale, metric, grad)
    grad_frames = torch.empty_like(frames) if of_frames else frames.new_empty(0)
    grad_codes = torch.zeros_like(codes) if of_codes else codes.new_empty(0)
    mass = torch.zeros_like(norms)                                       # (K,) sum of u over frames
    for rows, x, tiles in walk(frames, codes, shift, norms, targets, metric):
        count = rows.stop - rows.start
        log, weight, mine = (F.pad(t[rows, None], (0, 0, 0, len(x) - count)) for t in (lse, grad, at_target))
        sums, product = x.new_zeros(len(x), 1), x.new_zeros(x.shape)
        for columns, tile, (place, here) in tiles:
            flank = slope(tile, scale) if euclidean else scale
            u = tile.mul_(-scale).sub_(log).exp_().mul_(-weight).mul_(flank)
            u.scatter_add_(1, place, mine * here)                        # it was 0 there
            if of_frames:
                product.addmm_(u, codes[columns])
                sums += u.sum(-1, keepdim=True)
            if of_codes:
                grad_codes[columns].addmm_(u.T, x, alpha=-2)
                mass[columns] += u.sum(0)
        if of_frames:
            grad_frames[rows] = (2 * x * sums - 2 * product if euclidean else -2 * product)[:count]
    if of_codes and metric != 'cosine':
        grad_codes.addcmul_(codes, mass[:, None], value=2)
    return grad_frames, grad_codes


def own_distances(frames, codes, shift, targets, metric) -> Tensor:
    "Distance (N,) of frames from their targets, with nothing that cancels; 0 for the left out"
    own = []
    for x, t in zip(frames.split(ROWS), targets.split(ROWS)):
        x, c = x - shift, codes[t.clamp_min(0)]
        own.append(-2 * (x * c).sum(-1) if metric == 'cosine' else (x - c).square().sum(-1))
    own = torch.cat([frames.new_empty(0), *own]).masked_fill(targets < 0, 0)
    return own.sqrt() if metric == 'euclidean' else own


def shares(own, rest, targets, scale, metric, grad) -> tuple[Tensor, Tensor, Tensor]:
    "Per frame: log-sum-exp of all logits, the gradient `u` at the target, and grad, 0 for the left out"
    z, grad = own * scale + rest, grad.masked_fill(targets < 0, 0)
    both = (-z.abs()).exp().log1p()  # of exp and log1p alone: torch rounds its sigmoid by where a value lies
    at_target = grad * (z.clamp_max(0) - both).exp()
    at_target = at_target * (slope(own, scale) if metric == 'euclidean' else scale)
    return torch.maximum(rest, -own * scale) + both, at_target, grad


def slope(distance: Tensor, scale: float) -> Tensor:
    "Derivative of `scale * distance` by the square of the distance; 0 at 0"
    return torch.where(distance > 0, .5 * scale / distance, 0.)


def walk(frames, codes, shift, norms, targets, metric):
    "For some rows at a time: their slice, the frames, and an iterator over their tiles"
    buffer = codes.new_empty(ROWS * min(COLUMNS, len(codes)))
    for k in range(0, len(frames), ROWS):
        rows = slice(k, min(k + ROWS, len(frames)))
        spare = (0, -(rows.stop - k) % MATES)
        x = (frames[rows] - shift).masked_fill(targets[rows, None] < 0, 0)
        x, target = F.pad(x, (0, 0, *spare)), F.pad(targets[rows], spare)
        yield rows, x, tiled(x, codes, norms, target[:, None], metric, buffer)


def tiled(x, codes, norms, target, metric, buffer):
    """Distances of some frames to all codes, in tiles: the slice of codes, the tile, infinite at
    targets, and for each frame a column (rows, 1) and whether its target is there."""
    square = x.square().sum(-1, keepdim=True)
    for j in range(0, len(codes), COLUMNS):
        columns = slice(j, min(j + COLUMNS, len(codes)))
        width = columns.stop - j
        tile = buffer[:len(x) * width].view(len(x), width)
        torch.addmm(norms[columns], x, codes[columns].T, alpha=-2, out=tile)
        if metric != 'cosine':
            tile.add_(square).clamp_min_(0)
        place, here = (target - j).clamp(0, width - 1), (target >= j) & (target < j + width)
        tile.scatter_(1, place, torch.where(here, torch.inf, tile.gather(1, place)))
        yield columns, tile.sqrt_() if metric == 'euclidean' else tile, (place, here)
