"""The torch back end of the contrastive ratio: each layer of each utterance, a block at a time."""
import torch
from torch import Tensor

#: Added to inner products and squared norms of frames, which keeps silence apart from 0 / 0: a
#: frame behaves as if it had one more dim that holds sqrt(EPS)
EPS = 1e-8
#: Comparisons whose signs share a byte
PACKED = 4
#: Elements worked on at a time on a CPU: many enough to hide the calls, few enough for the cache
BLOCK = 1 << 18


def _blocks(shape, device, frames: Tensor | None):
    """Where each block of a layer lies, (utterances, frames), and its mask or None.

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


def _part(x: Tensor, at, inside, dtype) -> Tensor:
    x = x[at].to(dtype)
    return x if inside is None else torch.where(inside, x, 0)


def _new(shape, dtype, device, frames) -> Tensor:
    "Memory to be written; padding is not, and holds zeros"
    return (torch.empty if frames is None else torch.zeros)(shape, dtype=dtype, device=device)


def regions(shapes: list[tuple], comparisons: int, distance: str) -> list[slice]:
    """Where each layer lies in what is kept for the backward pass.

    Of l1 packed signs, (groups, B, T, D) bytes; of cosine two numbers a frame, (comparisons, 2,
    B, T); of l2 nothing.
    """
    found, start = [], 0
    for B, T, D in shapes:
        size = B * T * dict(l1=-(-comparisons // PACKED) * D, l2=0, cosine=2 * comparisons)[distance]
        found.append(slice(start, start + size))
        start += size
    return found


def kept_dtype(distance: str) -> torch.dtype | None:
    "Of what is kept; None: that of the numerics"
    return torch.uint8 if distance == 'l1' else None


def sums(enhanced, clean, negatives, frames, distance, keep, dtype):
    "Distances (B, layers, 1 + K), size of clean (B, layers) and, to keep, what the backward pass needs"
    layers, shapes = len(enhanced), [e.shape for e in enhanced]
    comparisons = 1 + len(negatives) // layers
    places = regions(shapes, comparisons, distance)
    total = enhanced[0].new_zeros(shapes[0][0], layers, comparisons + 1)
    total = total.to(torch.float64 if total.is_cpu else dtype)      # elsewhere a layer is one block
    kept = _new(places[-1].stop if keep else 0, kept_dtype(distance) or dtype, total.device, frames)
    for l, shape in enumerate(shapes):
        others, valid = (clean[l], *negatives[l::layers]), None if frames is None else frames[l]
        own = kept[places[l]] if keep else None
        for at, inside in _blocks(shape, total.device, valid):
            e, *parts = (_part(x, at, inside, dtype) for x in (enhanced[l], *others))
            if distance == 'l1':
                found, signs = _l1_block(e, parts, keep)
                if keep:
                    for group, code in zip(own.view(-1, *shape), signs): group[at] = code
            elif distance == 'l2':
                found = [(e - x).square_().sum((1, 2)) for x in parts]
            else:
                found, slopes = _cosine_block(e, parts, keep)
                if keep: own.view(-1, *shape[:2])[(slice(None), *at)] = torch.stack(slopes)
            if distance == 'l1': found.append(parts[0].abs().sum((1, 2)))
            if distance == 'l2': found.append(parts[0].square().sum((1, 2)))
            total[at[0], l, :len(found)] += torch.stack(found, -1)
        total[:, l] /= counts(shape, valid, total, distance)[:, None]
    if distance == 'cosine': total[..., -1] = 1
    # copies: what a custom op returns may not share memory
    own = dict(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    return total[..., :-1].to(**own), total[..., -1].to(**own), kept


def counts(shape, frames: Tensor | None, like: Tensor, distance: str) -> Tensor:
    "How many numbers a mean is taken over, (B,)"
    B, T, D = shape
    valid = like.new_full((B,), T) if frames is None else frames.clamp(1, T).to(like.dtype)
    return valid if distance == 'cosine' else valid * D


def _l1_block(e: Tensor, others: list[Tensor], keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    "Sums of |e - x|, and their signs as base 4 digits, 0 for - and 2 for +, PACKED in a number"
    found, codes = [], []
    for m, x in enumerate(others):
        difference = e - x
        found.append(difference.abs().sum((1, 2)))
        if not keep: continue
        sign = difference.sign_()
        if m % PACKED == 0: codes.append(sign.add_(sum(4 ** k for k in range(PACKED))))
        else: codes[-1].add_(sign, alpha=4 ** (m % PACKED))
    return found, codes


def _cosine_block(e: Tensor, others: list[Tensor], keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of 1 - cos over frames; for each comparison its gradient, slope (close e - x) + turn e.

    Where e is close to x all comes from the difference, |e| |x| (1 - cos) =
    (|e - x|² - (|e| - |x|)²) / 2, so that nothing cancels and identity is exactly 0. Elsewhere
    the difference hides the smaller of the two, and the inner product serves. A slope is above
    0, and is returned below 0 where e is not close: two numbers (B, t) a comparison.
    """
    found, slopes, ee = [], [], e.square().sum(-1) + EPS
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


def gradient_l1(shape, codes, coefficients, frames, dtype) -> Tensor:
    "Gradient of one layer from packed signs (groups, B, T, D) and coefficients (B, 1 + K)"
    result = _new(shape, dtype, codes.device, frames)
    coefficients = coefficients / counts(shape, frames, coefficients, 'l1')[:, None]
    tables = [_table(coefficients[:, k:k + PACKED]) for k in range(0, coefficients.shape[1], PACKED)]
    codes = codes.view(-1, *shape)
    for at, inside in _blocks(shape, codes.device, frames):
        rows = 256 * torch.arange(at[0].stop - at[0].start, dtype=torch.int32, device=codes.device)
        total = 0
        for table, group in zip(tables, codes):
            index = group[at].to(torch.int32).add_(rows[:, None, None])
            total = total + table[at[0]].flatten().index_select(0, index.flatten()).view(index.shape)
        result[at] = total if inside is None else torch.where(inside, total, 0)
    return result


def _table(coefficients: Tensor) -> Tensor:   # (B, up to PACKED) -> (B, 256)
    "What each byte of signs contributes to the gradient; summed in a fixed order"
    byte, table = torch.arange(256, device=coefficients.device), 0
    for k, coefficient in enumerate(coefficients.T): table = table + coefficient[:, None] * ((byte >> 2 * k & 3) - 1)
    return table


def gradient_l2(features, coefficients, frames) -> Tensor:
    "Gradient of one layer from its features, enhanced first, and coefficients (B, 1 + K)"
    result = _new(features[0].shape, features[0].dtype, features[0].device, frames)
    coefficients = 2 * coefficients / counts(result.shape, frames, coefficients, 'l2')[:, None]
    for at, inside in _blocks(result.shape, result.device, frames):
        e, *parts = (_part(x, at, inside, coefficients.dtype) for x in features)
        total = torch.zeros_like(e)
        for c, x in zip(coefficients[at[0]].T, parts): total.addcmul_(e - x, c[:, None, None])
        result[at] = total
    return result


def gradient_cosine(features, slopes, coefficients, frames) -> Tensor:
    "Gradient of one layer from its features, enhanced first, slopes (1 + K, 2, B, T) and coefficients (B, 1 + K)"
    result = _new(features[0].shape, features[0].dtype, features[0].device, frames)
    coefficients = coefficients / counts(result.shape, frames, coefficients, 'cosine')[:, None]
    slopes = slopes.view(-1, 2, *result.shape[:2], 1)
    for at, inside in _blocks(result.shape, result.device, frames):
        e, *parts = (_part(x, at, inside, coefficients.dtype) for x in features)
        total, turns = torch.zeros_like(e), 0
        here = slopes[(slice(None), slice(None), *at)]                               # (1 + K, 2, b, t, 1)
        for c, (slope, turn), x in zip(coefficients[at[0]].T[..., None, None], here, parts):
            total.addcmul_(torch.addcmul(x, e, (slope > 0).to(e.dtype), value=-1), slope.abs() * -c)
            turns = turns + c * turn
        total.addcmul_(e, turns)
        result[at] = total if inside is None else torch.where(inside, total, 0)
    return result
