"""What each of two processes does in `test_losses.py`; a module of its own, light to import."""
import torch
from helpers import waves
from torch import nn

from speechloss.features import RandomFeatures
from speechloss.losses import CompressedComplexLoss, FeatureDistance, Objective, WaveL2Loss


def train_step(balance: str, rows: slice):
    "Value and gradient of two steps of a small enhancer on some rows of a batch"
    torch.manual_seed(1)
    model = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 1, 9, padding=4), nn.Flatten())
    objective = Objective(dict(cc=CompressedComplexLoss(), deep=FeatureDistance(RandomFeatures()),
                               l2=WaveL2Loss()), balance=balance)
    if torch.distributed.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    found = []
    for seed in range(2):
        enhanced, clean, _ = (w[rows] for w in waves(4, 1500, seed=seed))
        model.zero_grad()
        value = objective(model(enhanced), clean)
        value.backward()
        found += [value.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]
    return found


def run(rank: int, folder: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store',
                                         rank=rank, world_size=2)
    result = {b: train_step(b, slice(2 * rank, 2 * rank + 2)) for b in ('none', 'mean', 'grad')}
    torch.save(result, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()
