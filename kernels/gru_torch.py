"""`forward` and `backward`: a layer of gated recurrent units in torch, with its gradient written out.

With states h, gates r (reset), z (update) and n (new), and m the inner part of the new gate:

    r, z = sigmoid(W x + b + U h)      m = U h + c      n = tanh(W x + b + r m)      h' = n + z (h - n)

Both directions run in one loop, the way back on reversed frames. `reference` is torch's own.
"""
import torch
from torch import Tensor, nn

from .framing import frame_mask
from .workers import keep_memory


def reference(
    x: Tensor,                  # (B, T, in)
    parameters: list[Tensor],   # 4 or 8, as of nn.GRU
    lengths: Tensor | None,     # (B,) valid frames
) -> Tensor:                    # (B, T, D H)
    "Run nn.GRU with these parameters"
    both = len(parameters) == 8
    layer = nn.GRU(x.shape[2], parameters[1].shape[1], batch_first=True, bidirectional=both).to(x)
    names = [name for name, _ in layer.named_parameters()]

    def run(given): return torch.func.functional_call(layer, dict(zip(names, parameters)), (given,))[0]

    if lengths is None: return run(x)
    rows = [nn.functional.pad(run(row[None, :size])[0], (0, 0, 0, x.shape[1] - size))
            for row, size in zip(x, lengths.tolist())]
    return torch.stack(rows)


def forward(
    x: Tensor,                  # (B, T, in)
    parameters: list[Tensor],   # 4 for each of D directions
    lengths: Tensor | None,     # (B,) valid frames
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output (B, T, D H) and what `backward` needs.

    That is the states (T + 1, D, B, H), the gates r and z side by side (T, D, B, 2 H), n and m (T, D, B, H), in the
    order in which they were computed.
    """
    keep_memory()
    (batch, frames, _), ways, width = x.shape, len(parameters) // 4, parameters[1].shape[1]
    turned = _turned(x, ways, lengths)
    gates, new, inner = (x.new_empty(frames, ways, batch, size) for size in (2 * width, width, width))
    for d, way in enumerate(turned):
        weight, _, bias, recurrent_bias = parameters[4 * d:4 * d + 4]
        flat, cut = way.flatten(0, 1), 2 * width
        _from_input(gates[:, d], flat, weight[:cut], bias[:cut] + recurrent_bias[:cut])
        _from_input(new[:, d], flat, weight[cut:], bias[cut:])
    states = x.new_zeros(frames + 1, ways, batch, width)
    _run(states, gates, new, inner, torch.stack(parameters[1::4]), torch.stack(parameters[3::4]))
    return _output(states, lengths), states, gates, new, inner


def _from_input(place: Tensor, flat: Tensor, weight: Tensor, bias: Tensor) -> None:
    "Put what the input, (T B, in), has in some gates, (T, B, ...), where they are kept"
    if place.is_contiguous(): torch.addmm(bias, flat, weight.T, out=place.view(len(flat), -1))   # saves a copy
    else: place.copy_(torch.addmm(bias, flat, weight.T).view(place.shape))


def _run(states: Tensor, gates: Tensor, new: Tensor, inner: Tensor, recurrent: Tensor, bias: Tensor) -> None:
    "Go through the frames; `gates` and `new` come in as the part that the input has in them"
    width = new.shape[-1]
    to_gates, to_inner = (part.mT.contiguous() for part in recurrent.split((2 * width, width), 1))
    offset = bias[:, None, 2 * width:].expand_as(new[0]).contiguous()
    reset, update = gates.chunk(2, -1)
    # views made all at once cost half of views made one by one
    each = states.unbind(0)
    for before, after, both, r, z, n, m in zip(each, each[1:], *(
            part.unbind(0) for part in (gates, reset, update, new, inner))):
        both.baddbmm_(before, to_gates).sigmoid_()
        torch.baddbmm(offset, before, to_inner, out=m)
        n.addcmul_(r, m).tanh_()
        torch.lerp(n, before, z, out=after)


def backward(
    grad: Tensor,               # (B, T, D H), of the output
    x: Tensor,                  # (B, T, in)
    parameters: list[Tensor],   # 4 for each of D directions
    lengths: Tensor | None,     # (B,) valid frames
    saved: list[Tensor],        # what `forward` returned behind the output
    need: list[bool],           # of x, of the parameters
) -> list[Tensor]:              # of x and of each parameter, empty where not needed
    "Return the gradients"
    keep_memory()
    states, gates, new, inner = saved
    frames, ways, batch, width = new.shape
    into = new.new_empty(frames + 1, ways, batch, width)           # gradients of the states
    into[0] = 0
    if lengths is not None: grad = grad * frame_mask(lengths, frames)[..., None]
    for d, way in enumerate(_turned(grad, ways, lengths, split=True)): into[1:, d] = way
    slopes, slope_new = _slopes(states, gates, new, inner)
    _run_back(into, slopes, gates[..., width:], torch.stack(parameters[1::4]))
    slope_new *= into[1:]
    given = [_to_input(slopes[:, d], slope_new[:, d], parameters[4 * d]) for d in range(ways)] if need[0] else []
    found = [grad for d, way in enumerate(_turned(x, ways, lengths))
             for grad in _to_parameters(slopes[:, d], slope_new[:, d], states[:-1, d], way)] if need[1] else []
    return [_turned_back(given, lengths) if need[0] else x.new_empty(0),
            *(found or [x.new_empty(0) for _ in parameters])]


def _to_input(outer: Tensor, by_new: Tensor, weight: Tensor) -> Tensor:
    "Gradient of what one way takes in, (T, B, in)"
    frames, batch, cut = *by_new.shape[:2], len(weight) * 2 // 3
    return torch.mm(outer.flatten(0, 1)[:, :cut], weight[:cut]).addmm_(
        by_new.flatten(0, 1), weight[cut:]).view(frames, batch, -1)


def _to_parameters(outer: Tensor, by_new: Tensor, before: Tensor, x: Tensor) -> list[Tensor]:
    "Gradients of the four parameters of one way"
    outer, by_new, before, x = (part.flatten(0, 1) for part in (outer, by_new, before, x))
    cut, bias = 2 * by_new.shape[1], outer.sum(0)
    weight = x.new_empty(len(bias), x.shape[1])
    torch.mm(outer[:, :cut].T, x, out=weight[:cut])
    torch.mm(by_new.T, x, out=weight[cut:])
    return [weight, outer.T @ before, torch.cat([bias[:cut], by_new.sum(0)]), bias]


def _slopes(states: Tensor, gates: Tensor, new: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    "Slopes of a state in what U h adds to r, z and m (T, D, B, 3 H), and in what W x adds to n (T, D, B, H)"
    width = new.shape[-1]
    r, z = gates.chunk(2, -1)
    slopes = new.new_empty(*new.shape[:-1], 3 * width)
    by_r, by_z, by_m = slopes.chunk(3, -1)
    by_n = (new * new).sub_(1).mul_(z - 1)                          # (1 - z) (1 - n²)
    torch.mul(states[:-1] - new, torch.addcmul(z, z, z, value=-1), out=by_z)
    torch.mul(by_n, inner, out=by_r).mul_(torch.addcmul(r, r, r, value=-1))
    torch.mul(by_n, r, out=by_m)
    return slopes, by_n


def _run_back(into: Tensor, slopes: Tensor, update: Tensor, recurrent: Tensor) -> None:
    "Go back through the frames: `into` becomes the gradients of the states, `slopes` those of what U h adds"
    by_gate, states = slopes.unflatten(-1, (3, -1)), into.unbind(0)
    steps = zip(states, states[1:], *(part.unbind(0) for part in (by_gate, into[1:].unsqueeze(3), update, slopes)))
    for before, after, each, spread, z, outer in reversed(list(steps)):
        each.mul_(spread)
        before.addcmul_(after, z).baddbmm_(outer, recurrent)


# ------------------------------------------------------------------------- frames in their order

def _turned(x: Tensor, ways: int, lengths: Tensor | None, *, split: bool = False) -> list[Tensor]:
    "Frames first, `(T, B, dim)` for each way, the second reversed; `split`: each way has its own share of dim"
    parts = x.chunk(ways, -1) if split else [x] * ways
    turned = [part.transpose(0, 1) for part in parts]
    return turned[:1] + [_reversed(part, lengths) for part in turned[1:]]


def _turned_back(parts: list[Tensor], lengths: Tensor | None) -> Tensor:   # (T, B, dim) each -> (B, T, dim)
    "Sum of what each way gives, frames in the order of the input"
    total = parts[0] if len(parts) == 1 else parts[0] + _reversed(parts[1], lengths)
    return total.transpose(0, 1).contiguous()


def _output(states: Tensor, lengths: Tensor | None) -> Tensor:   # (T + 1, D, B, H) -> (B, T, D H)
    ways = [states[1:, 0], *(_reversed(states[1:, d], lengths) for d in range(1, states.shape[1]))]
    output = torch.cat([way.transpose(0, 1) for way in ways], -1)
    return output if lengths is None else output * frame_mask(lengths, output.shape[1])[..., None]


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:   # (T, B, dim)
    "Valid frames of each sequence in reverse; padding stays behind them"
    if lengths is None: return x.flip(0)
    place = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(place < lengths, lengths - 1 - place, place)        # (T, B)
    return x.gather(0, source[..., None].expand_as(x))
