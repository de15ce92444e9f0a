"""`reference` and `search`: the nearest code in plain torch, and in tiles that fit the cache."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .workers import PIECES, side_by_side

#: Frames and codes of a tile: its scores, 2 MB in float32, stay in the cache
ROWS, COLUMNS = 256, 2048
#: Codes whose best score is found first: a maximum is fast where an arg-max is not
GROUP = 64
#: The frames of a tile are a multiple of this, or the BLAS rounds a row by how many rows there are
MATES = 16


def reference(
    frames: Tensor,   # (N, D)
    codes: Tensor,    # (K, D); of length one, as the frames, for 'cosine'
    metric: str,      # one of `nearest_code.METRICS`
) -> Tensor:          # (N,) int64
    "Find the nearest code of each frame in the matrix of all distances, which is large"
    product = frames @ codes.T
    if metric == 'cosine':
        return (1 - product).argmin(-1)
    square = frames.square().sum(-1, keepdim=True) - 2 * product + codes.square().sum(-1)
    return square.clamp_min(0).argmin(-1)   # the root has its least value at the same code


def search(
    frames: Tensor,  # (N, D)
    codes: Tensor,   # (K, D) less the shift, contiguous
    half: Tensor,    # (K,) to take from the products
    shift: Tensor,   # (D,) to take from the frames
) -> Tensor:         # (N,) int64
    "Find the code of the best score of each frame, the lowest index of equals; some frames on each core"
    index, first = _search(frames, codes, half, shift), _first_copies(codes)
    return index if first is None else first[index]


def _search(frames: Tensor, codes: Tensor, half: Tensor, shift: Tensor) -> Tensor:
    spare = -len(codes) % GROUP
    codes, half = F.pad(codes, (0, 0, 0, spare)), F.pad(half, (0, spare), value=torch.inf)
    pieces = frames.split(-(-len(frames) // (ROWS * PIECES)) * ROWS or 1)
    return torch.cat(side_by_side(lambda x: _search_rows(x, codes, half, shift), pieces, cpu=frames.is_cpu))


def _search_rows(frames: Tensor, codes: Tensor, half: Tensor, shift: Tensor) -> Tensor:
    "The search for the frames of one core, in tiles of ROWS frames x COLUMNS codes"
    index = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
    scores = codes.new_empty(ROWS * min(COLUMNS, len(codes)))
    for k in range(0, len(frames), ROWS):
        x = frames[k:k + ROWS] - shift
        rows = len(x)
        x = F.pad(x, (0, 0, 0, -rows % MATES))
        best, found = x.new_full((len(x),), -torch.inf), index.new_zeros(len(x))
        for j in range(0, len(codes), COLUMNS):
            c = codes[j:j + COLUMNS]
            tile = scores[:len(x) * len(c)].view(len(x), len(c))
            torch.addmm(half[j:j + COLUMNS], x, c.T, beta=-1, out=tile)
            high, at = _first_highest(tile)
            better = high > best                     # not >=: a tie stays with the lower index
            best, found = torch.where(better, high, best), torch.where(better, at + j, found)
        index[k:k + ROWS] = found[:rows]
    return index


def _first_highest(tile: Tensor) -> tuple[Tensor, Tensor]:
    "Highest value of each row and its first place: in the first such group, the first such member"
    groups = tile.view(len(tile), -1, GROUP)
    high, group = groups.amax(-1).max(-1)
    members = groups.gather(1, group[:, None, None].expand(-1, 1, GROUP)).squeeze(1)
    return high, members.argmax(-1) + group * GROUP


def _first_copies(codes: Tensor) -> Tensor | None:
    """The first index (K,) that holds the same code as each of the codes (K, D); None if no two are equal.

    On a CPU, equal codes may have scores that differ by one rounding, by their place in the
    tile: the BLAS does that in float64. On a GPU they have equal scores.
    """
    if not codes.is_cpu: return None
    # first a number for each code, which different codes hardly ever share: comparing all codes as they
    # are would cost more than the search itself
    weights = torch.arange(1, codes.shape[1] + 1, dtype=torch.float64).sqrt()
    _, group, count = (codes.double() * weights).sum(-1).unique(return_inverse=True, return_counts=True)
    alike = (count[group] > 1).nonzero()[:, 0]
    if not len(alike): return None
    copies = torch.unique(codes[alike], dim=0, return_inverse=True)[1]
    first = torch.full_like(alike, len(codes)).scatter_reduce(0, copies, alike, 'amin')[copies]
    return torch.arange(len(codes)).index_copy(0, alike, first)
