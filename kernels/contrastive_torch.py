"""`reference`, `sums` and `gradients`: the contrastive ratio in plain torch, and a block at a time.

`sums` reads every layer of every utterance once, in blocks that fit the cache of a CPU, and
keeps what `gradients` needs. What is kept for the backward pass, and where, is the same for the
Triton back end: see `regions`.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

#: Added to inner products and squared norms of frames, which keeps silence apart from 0 / 0: a
#: frame behaves as if it had one more dim that holds sqrt(EPS)
EPS = 1e-8
#: Comparisons whose signs share a byte
PACKED = 4
#: Elements worked on at a time on a CPU: many enough to hide the calls, few enough for the cache
BLOCK = 1 << 18

#: Utterances, frames, dims of a layer
Shape = tuple[int, int, int]
#: Utterances and frames of a block
_Place = tuple[slice, slice]


# ------------------------------------------------------------------------------ the reference

def reference(
    enhanced: list[Tensor],    # layers (B, frames, dim)
    clean: list[Tensor],       # the same layers
    negatives: list[Tensor],   # the layers of all negatives, end to end
    frames: Tensor | None,     # (layers, B) valid frames
    distance: str,             # one of `contrastive.DISTANCES`
    dtype: torch.dtype,        # of the numerics
) -> tuple[Tensor, Tensor]:    # (B, layers, 1 + K), (B, layers)
    "Compute the distances to clean and to each negative, and the size of clean"
    layers, distances, sizes = len(enhanced), [], []
    for l in range(layers):
        stack = torch.stack([x.to(dtype) for x in (enhanced[l], clean[l], *negatives[l::layers])])
        valid = stack.new_full(stack.shape[1:2], stack.shape[2]) if frames is None else frames[l]     # (B,)
        # `where`, not a product: padding may hold anything, NaN included
        inside = torch.arange(stack.shape[2], device=stack.device) < valid[:, None]                   # (B, T)
        e, *others = torch.where(inside[..., None], stack, 0)
        each = [_FRAME_DISTANCES[distance](e, x) for x in others]
        if distance != 'cosine': each.append(_FRAME_DISTANCES[distance](others[0], torch.zeros_like(e)))
        means = torch.stack([torch.where(inside, x, 0).sum(1) / valid for x in each], -1)
        distances.append(means[:, :len(others)])
        sizes.append(means[:, -1] if distance != 'cosine' else torch.ones_like(means[:, 0]))
    return torch.stack(distances, 1), torch.stack(sizes, 1)


def _one_less_cosine(a: Tensor, b: Tensor) -> Tensor:   # (B, T, D) twice -> (B, T)
    dot, aa, bb = ((x * y).sum(-1) + EPS for x, y in ((a, b), (a, a), (b, b)))
    return 1 - dot / (aa.sqrt() * bb.sqrt())


_FRAME_DISTANCES = dict(
    l1=lambda a, b: (a - b).abs().mean(-1),
    l2=lambda a, b: (a - b).square().mean(-1),
    cosine=_one_less_cosine)


# ------------------------------------------------- what is kept, by this back end and by Triton

def regions(shapes: list[Shape], comparisons: int, distance: str) -> list[slice]:
    """Return where each layer lies in the flat tensor that is kept for the backward pass.

    For l1 it holds packed signs, (groups, B, T, D) bytes; for cosine two numbers a frame,
    (comparisons, 2, B, T); for l2 nothing.
    """
    found, start = [], 0
    for B, T, D in shapes:
        size = B * T * dict(l1=-(-comparisons // PACKED) * D, l2=0, cosine=2 * comparisons)[distance]
        found.append(slice(start, start + size))
        start += size
    return found


def kept_dtype(distance: str) -> torch.dtype | None:
    "Return the type of what is kept; None: that of the numerics"
    return torch.uint8 if distance == 'l1' else None


# ------------------------------------------------------------------------------------ forward

def sums(
    enhanced: list[Tensor],    # layers (B, frames, dim)
    clean: list[Tensor],       # the same layers
    negatives: list[Tensor],   # the layers of all negatives, end to end
    frames: Tensor | None,     # (layers, B) valid frames
    distance: str,             # one of `contrastive.DISTANCES`
    keep: bool,                # for a backward pass
    dtype: torch.dtype,        # of the numerics
) -> tuple[Tensor, Tensor, Tensor]:   # (B, layers, 1 + K), (B, layers), see `regions`
    "Compute the distances to clean and to each negative, the size of clean, and what is to be kept"
    layers, shapes = len(enhanced), [shape_of(e) for e in enhanced]
    comparisons = 1 + len(negatives) // layers
    places = regions(shapes, comparisons, distance)
    total = enhanced[0].new_zeros(shapes[0][0], layers, comparisons + 1)
    total = total.to(torch.float64 if total.is_cpu else dtype)      # elsewhere a layer is one block
    kept = _new(places[-1].stop if keep else 0, kept_dtype(distance) or dtype, total.device, frames)
    for l, shape in enumerate(shapes):
        others, valid = (clean[l], *negatives[l::layers]), None if frames is None else frames[l]
        for at, inside in _blocks(shape, total.device, valid):
            e, *parts = (_part(x, at, inside, dtype) for x in (enhanced[l], *others))
            found, values = _BLOCK_SUMS[distance](e, parts, keep)
            if values:
                own = kept[places[l]].view(-1, *shape[:values[0].ndim])
                for to, value in zip(own, values): to[at] = value
            total[at[0], l, :len(found)] += torch.stack(found, -1)
        total[:, l] /= _counts(shape, valid, total, distance)[:, None]
    if distance == 'cosine': total[..., -1] = 1
    # copies: what a custom op returns may not share memory
    means, sizes = (x.to(dtype, copy=True, memory_format=torch.contiguous_format)
                    for x in (total[..., :-1], total[..., -1]))
    return means, sizes, kept


# What a block (b, t, D) adds: for each comparison a sum (b,), behind them the size of clean except
# for cosine; and, to keep, what `regions` says.
_BlockSums = tuple[list[Tensor], list[Tensor]]


def _l1_block(e: Tensor, others: list[Tensor], keep: bool) -> _BlockSums:
    "Sums of |e - x|, and their signs as base 4 digits, 0 for - and 2 for +, PACKED in a number"
    found: list[Tensor] = []
    codes: list[Tensor] = []
    for m, x in enumerate(others):
        difference = e - x
        found.append(difference.abs().sum((1, 2)))
        if not keep: continue
        sign = difference.sign_()
        if m % PACKED == 0: codes.append(sign.add_(sum(4 ** k for k in range(PACKED))))
        else: codes[-1].add_(sign, alpha=4 ** (m % PACKED))
    return [*found, others[0].abs().sum((1, 2))], codes


def _l2_block(e: Tensor, others: list[Tensor], keep: bool) -> _BlockSums:
    "Sums of (e - x)²; there is nothing to keep"
    return [*((e - x).square_().sum((1, 2)) for x in others), others[0].square().sum((1, 2))], []


def _cosine_block(e: Tensor, others: list[Tensor], keep: bool) -> _BlockSums:
    """Sums of 1 - cos over frames; for each comparison its gradient, slope (close e - x) + turn e.

    Where e is close to x all comes from the difference, |e| |x| (1 - cos) =
    (|e - x|² - (|e| - |x|)²) / 2, so that nothing cancels and identity is exactly 0. Elsewhere
    the difference hides the smaller of the two, and the inner product serves. A slope is above
    0, and is kept below 0 where e is not close: two numbers (b, t) a comparison.
    """
    found: list[Tensor] = []
    slopes: list[Tensor] = []
    ee = e.square().sum(-1) + EPS
    for x in others:
        apart, dot, xx = (e - x).square_().sum(-1), (e * x).sum(-1) + EPS, x.square().sum(-1) + EPS
        e_norm, x_norm = ee.sqrt(), xx.sqrt()
        slope = 1 / (e_norm * x_norm)
        close = apart < e_norm * x_norm
        longer = (ee - xx) / (e_norm + x_norm)
        cos = dot * slope
        away = torch.where(close, (apart - longer.square()) * slope / 2, 1 - cos).clamp_min_(0)
        found.append(away.sum(1))
        if keep: slopes += [torch.where(close, slope, -slope), torch.where(close, -longer / x_norm - away, cos) / ee]
    return found, slopes


_BLOCK_SUMS = dict(l1=_l1_block, l2=_l2_block, cosine=_cosine_block)


# ----------------------------------------------------------------------------------- backward

def gradients(
    features: list[Tensor],    # layers of enhanced, clean and all negatives, end to end; none for l1
    kept: Tensor,              # by `sums`
    shapes: list[Shape],       # of the layers
    coefficients: Tensor,      # (B, layers, 1 + K), derivative of the loss in each distance
    frames: Tensor | None,     # (layers, B) valid frames
    distance: str,             # one of `contrastive.DISTANCES`
    dtype: torch.dtype,        # of the gradients
) -> list[Tensor]:
    "Compute the gradients of the enhanced layers"
    layers, places = len(shapes), regions(shapes, coefficients.shape[2], distance)
    return [_GRADIENTS[distance](shape, features[l::layers], kept[places[l]], coefficients[:, l],
                                 None if frames is None else frames[l], dtype)
            for l, shape in enumerate(shapes)]


def _l1_gradient(shape: Shape, features: list[Tensor], codes: Tensor, coefficients: Tensor, frames: Tensor | None,
                 dtype: torch.dtype) -> Tensor:
    "Gradient of one layer from packed signs (groups, B, T, D) and coefficients (B, 1 + K)"
    result = _new(shape, dtype, codes.device, frames)
    coefficients = coefficients / _counts(shape, frames, coefficients, 'l1')[:, None]
    tables = [_table(coefficients[:, k:k + PACKED]) for k in range(0, coefficients.shape[1], PACKED)]
    codes = codes.view(-1, *shape)
    for at, inside in _blocks(shape, codes.device, frames):
        rows = 256 * torch.arange(at[0].stop - at[0].start, dtype=torch.int32, device=codes.device)
        parts = []
        for table, group in zip(tables, codes):
            index = group[at].to(torch.int32).add_(rows[:, None, None])
            parts.append(table[at[0]].flatten().index_select(0, index.flatten()).view(index.shape))
        total = _added(parts)
        result[at] = total if inside is None else torch.where(inside, total, 0)
    return result


def _table(coefficients: Tensor) -> Tensor:   # (B, up to PACKED) -> (B, 256)
    "What each byte of signs contributes to the gradient; summed in a fixed order"
    byte = torch.arange(256, device=coefficients.device)
    return _added([c[:, None] * ((byte >> 2 * k & 3) - 1) for k, c in enumerate(coefficients.T)])


def _l2_gradient(shape: Shape, features: list[Tensor], kept: Tensor, coefficients: Tensor, frames: Tensor | None,
                 dtype: torch.dtype) -> Tensor:
    "Gradient of one layer from its features, enhanced first, and coefficients (B, 1 + K)"
    result = _new(shape, dtype, coefficients.device, frames)
    coefficients = 2 * coefficients / _counts(shape, frames, coefficients, 'l2')[:, None]
    for at, inside in _blocks(shape, result.device, frames):
        e, *parts = (_part(x, at, inside, coefficients.dtype) for x in features)
        total = torch.zeros_like(e)
        for c, x in zip(coefficients[at[0]].T, parts): total.addcmul_(e - x, c[:, None, None])
        result[at] = total
    return result


def _cosine_gradient(shape: Shape, features: list[Tensor], slopes: Tensor, coefficients: Tensor,
                     frames: Tensor | None, dtype: torch.dtype) -> Tensor:
    "Gradient of one layer from its features, enhanced first, slopes (1 + K, 2, B, T) and coefficients (B, 1 + K)"
    result = _new(shape, dtype, coefficients.device, frames)
    coefficients = coefficients / _counts(shape, frames, coefficients, 'cosine')[:, None]
    slopes = slopes.view(-1, 2, *shape[:2], 1)
    for at, inside in _blocks(shape, result.device, frames):
        e, *parts = (_part(x, at, inside, coefficients.dtype) for x in features)
        total, turns = torch.zeros_like(e), []
        here = slopes[(slice(None), slice(None), *at)]                               # (1 + K, 2, b, t, 1)
        for c, (slope, turn), x in zip(coefficients[at[0]].T[..., None, None], here, parts):
            total.addcmul_(torch.addcmul(x, e, (slope > 0).to(e.dtype), value=-1), slope.abs() * -c)
            turns.append(c * turn)
        total.addcmul_(e, _added(turns))
        result[at] = total if inside is None else torch.where(inside, total, 0)
    return result


_GRADIENTS = dict(l1=_l1_gradient, l2=_l2_gradient, cosine=_cosine_gradient)


# ------------------------------------------------------------------------------------- blocks

def shape_of(layer: Tensor) -> Shape:
    "Return the shape of a layer"
    B, T, D = layer.shape
    return B, T, D


def _blocks(shape: Shape, device: torch.device, frames: Tensor | None) -> Iterator[tuple[_Place, Tensor | None]]:
    """Give the place of each block of a layer, and its mask (b, t, 1) or None.

    On a CPU a block is a part of one utterance, of its valid frames alone; elsewhere it is the
    layer, since reading `frames` would wait for the device.
    """
    B, T, D = shape
    if device.type != 'cpu':
        inside = None if frames is None else (torch.arange(T, device=device) < frames[:, None])[..., None]
        yield (slice(0, B), slice(0, T)), inside
        return
    step = max(1, BLOCK // D)
    for b, valid in enumerate([T] * B if frames is None else frames.tolist()):
        for t in range(0, valid, step):
            yield (slice(b, b + 1), slice(t, min(t + step, valid))), None


def _part(x: Tensor, at: _Place, inside: Tensor | None, dtype: torch.dtype) -> Tensor:
    "A block of a layer in the type of the numerics, zero outside"
    x = x[at].to(dtype)
    return x if inside is None else torch.where(inside, x, 0)


def _new(shape: Shape | int, dtype: torch.dtype, device: torch.device, frames: Tensor | None) -> Tensor:
    "Memory for results: with valid frames it starts as zeros, since nothing is written to the padding"
    return (torch.empty if frames is None else torch.zeros)(shape, dtype=dtype, device=device)


def _counts(shape: Shape, frames: Tensor | None, like: Tensor, distance: str) -> Tensor:
    "How many numbers a mean is taken over, (B,)"
    B, T, D = shape
    valid = like.new_full((B,), T) if frames is None else frames.clamp(1, T).to(like.dtype)
    return valid if distance == 'cosine' else valid * D


def _added(parts: list[Tensor]) -> Tensor:
    "The sum of the parts, in their order"
    total = 0 + parts[0]
    for part in parts[1:]: total = total + part
    return total
