"""Where a training step goes, and what it cost at an earlier commit, on a CPU with one thread.

    python -m benchmarks.step parts                   the parts of a step    -> benchmarks/step_parts.csv
    python -m benchmarks.step before COMMIT [names]   steps side by side     -> benchmarks/step.csv

Batches of 8 waves of 4 s. `parts` times each part alone, forward and backward. `before` checks out
the earlier commit beside this one and lets the two take turns, each in processes of its own; the
weights after the same steps are compared, for the code may get faster and the result must stay.
Times are of the processor, so that what waits does not count; a machine with nothing else to do gives the best.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import torch
from torch import nn

from .common import ROOT, machine

BATCH, SAMPLES = 8, 64000
COLUMNS = ('step', 'provider', 'ms_p20', 'ms_p50', 'ms_p80', 'speed_up', 'weight_err', 'steps', 'cpu', 'torch', 'date')
PART_COLUMNS = ('model', 'part', 'ms', 'share', 'cpu', 'torch', 'date')
WARM = 3                  # steps that are not counted


def objectives() -> dict[str, tuple[dict, dict, dict | None, int]]:
    "By name: fields of the recipe, the loss beside the base loss, options that the code of today adds, steps to time"
    contrast = dict(name='contrastive', features=dict(name='ssl', layers='conv'))
    window = dict(window=1.)
    return {
        'base': ({}, {}, None, 50),
        'causal': (dict(model=dict(preset='small', causal=True)), {}, None, 50),
        'multi_resolution_stft': ({}, dict(name='multi_resolution_stft'), None, 20),
        'model_as_loss': ({}, dict(name='model_as_loss'), window, 20),
        'vq': ({}, dict(name='vq'), window, 12),
        'ssl': ({}, dict(name='ssl'), window, 8),
        'codec': ({}, dict(name='codec'), window, 8),
        'contrastive': ({}, contrast, window, 8),
    }


# ------------------------------------------------------------------------- one training, timed

def recipe_of(fields: dict, loss: dict, steps: int):
    from speechloss.training.recipe import BASE, Recipe
    objective = dict(terms=dict(base=BASE, extra=loss), weights=dict(extra=.1)) if loss else BASE
    return Recipe(**fields, objective=objective, steps=steps, batch_size=BATCH, device='cpu', eval_every=10**6,
                  save_every=10**6, steps_per_epoch=10**6, threads=1, workers=0)


def pairs(count: int) -> list[dict]:
    "Noisy and clean waves with pauses, `(SAMPLES,)`"
    draw = torch.Generator().manual_seed(0)
    pace = (torch.arange(SAMPLES) / 4000).sin().clamp_min(0)
    clean = [.1 * pace * torch.randn(SAMPLES, generator=draw) for _ in range(count)]
    return [dict(clean=wave, noisy=wave + .03 * torch.randn(SAMPLES, generator=draw)) for wave in clean]


def train_timed(fields: dict, loss: dict, steps: int, out: str) -> None:
    "Train for some steps, print the seconds of each as JSON, and leave the model in `out`"
    from speechloss.losses import build_objective
    from speechloss.training.enhancer import model_of
    from speechloss.training.loop import fit
    torch.set_num_threads(1)
    recipe, data, times = recipe_of(fields, loss, steps + WARM), pairs(2 * BATCH), []
    model = model_of(recipe)
    fit(model, build_objective(recipe.objective, model=model), data, data[:1], recipe, out,
        progress=lambda label, done, total: times.append(time.process_time()))
    print(json.dumps([after - before for before, after in zip(times, times[1:])][WARM:]))


def measured(place: Path, fields: dict, loss: dict, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    "Seconds of each step and the weights after them, with the code in `place`"
    from safetensors.torch import load_file
    with tempfile.TemporaryDirectory() as out:
        job = json.dumps([fields, loss, steps, out])
        done = subprocess.run([sys.executable, '-m', 'benchmarks.step', 'child', job],
                              env=os.environ | dict(OMP_NUM_THREADS='1'), cwd=place, capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1]), load_file(Path(out) / 'final' / 'model.safetensors')


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    "Give a folder with the code of a commit while the block runs"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / 'code'
        place.mkdir()
        archive = subprocess.run(['git', 'archive', commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(['tar', '-x'], cwd=place, input=archive, check=True)
        (place / 'speechloss' / 'kernels').symlink_to(place / 'kernels')   # where a built package has them
        shutil.copy(__file__, place / 'benchmarks')
        yield place


def compare(commit: str, names: list[str], rounds: int) -> list[dict]:
    rows = []
    with checked_out(commit) as before:
        for name in names:
            fields, loss, more, steps = objectives()[name]
            sides = {f'at {commit[:7]}': (before, loss), 'now': (ROOT, loss)}
            if more: sides[f'now, {", ".join(f"{k} {v:g}" for k, v in more.items())}'] = (ROOT, loss | more)
            times: dict[str, list[float]] = {side: [] for side in sides}
            weights = {}
            for _ in range(rounds):
                for side, (place, spec) in sides.items():
                    seconds, weights[side] = measured(place, fields, spec, steps)
                    times[side] += seconds
            first = next(iter(sides))
            for side in sides:
                rows.append(_row(name, side, times[side], times[first], steps + WARM, None if side not in (first, 'now')
                                 else distance(weights[side], weights[first])))
                print('{step:24} {provider:20} {ms_p50:8.1f} ms  x{speed_up:<5.2f} {weight_err}'.format(**rows[-1]),
                      flush=True)
    return rows


def _row(name: str, side: str, times: list[float], base: list[float], steps: int, error: float | None) -> dict:
    low, *_, high = quantiles(times, n=5)
    middle, first = (quantiles(each, n=2)[0] for each in (times, base))
    return dict(step=name, provider=side, ms_p20=low * 1e3, ms_p50=middle * 1e3, ms_p80=high * 1e3,
                speed_up=first / middle, weight_err=error, steps=steps, **here())


def distance(found: dict, wanted: dict) -> float:
    "Norm of the difference of all weights, over the norm of the wanted ones"
    flat = [torch.cat([weights[name].flatten().double() for name in sorted(wanted)]) for weights in (found, wanted)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def here() -> dict:
    where = machine()
    return dict(cpu=where['gpu'], torch=where['torch'], date=where['date'])


# ------------------------------------------------------------------------- the parts of a step

class _Passed(nn.Module):
    "In place of a recurrent layer, what it is given"
    def forward(self, x, frames=None): return x


def timed(call: Callable, repeats: int) -> float:
    "Median milliseconds of processor time"
    times = []
    for _ in range(repeats + WARM):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return quantiles(times[WARM:], n=2)[0] * 1e3


def parts(causal: bool, repeats: int) -> dict[str, float]:
    "Milliseconds of each part of a base step, forward and backward"
    from speechloss.losses import build_objective
    from speechloss.models.catalogue import enhancer
    from speechloss.models.mask_network import apply_mask
    from speechloss.training.recipe import BASE
    from speechloss.training.state import TrainingState
    torch.manual_seed(0)
    model = enhancer(dict(preset='small', causal=causal))
    objective = build_objective(BASE, model=model)
    state = TrainingState(model, objective, recipe_of({}, {}, 1))
    noisy, clean = (torch.stack([pair[name] for pair in pairs(BATCH)]) for name in ('noisy', 'clean'))

    def both(call: Callable, *leaves: torch.Tensor) -> Callable:
        def run():
            output = call(*leaves)
            output.backward(torch.ones_like(output))
            for leaf in leaves: leaf.grad = None
            model.zero_grad()
        return run

    def leaf(x): return x.detach().clone().requires_grad_()

    spec = model._spectrum(noisy, None)[0]
    shallow, bottleneck = model._encode(spec, None)
    mask = model.decoder(shallow, bottleneck)

    def masked(mask): return apply_mask(spec, mask, model.bands, model.hop_length, SAMPLES)

    found = {
        'spectrum of the noisy wave': timed(lambda: model._spectrum(noisy, None), repeats),
        'recurrent layers, 2': 2 * timed(both(model.encoder.gru, leaf(shallow)), repeats),
        'mask on the spectrum, wave': timed(both(masked, leaf(mask)), repeats)}
    for name, loss in objective.losses.items():
        found[f'loss: {name}'] = timed(both(lambda wave, loss=loss: loss(wave, clean), leaf(noisy)), repeats)
    objective(model(noisy), clean).backward()      # gives every weight a gradient
    found |= {'clipping': timed(lambda: nn.utils.clip_grad_norm_(state.trained, 1.), repeats),
              'optimiser': timed(state.optimizer.step, repeats), 'averaging': timed(state.average, repeats)}

    def whole():
        objective(model(noisy), clean).backward()
        nn.utils.clip_grad_norm_(state.trained, 1.)
        state.optimizer.step()
        state.average()
        state.optimizer.zero_grad(set_to_none=True)

    whole_step = timed(whole, repeats)
    model.encoder.gru = model.decoder.gru = _Passed()
    found['layers between them'] = timed(both(
        lambda: model.decoder(*model._encode(spec, None)).sum()), repeats)
    return found | {'whole step': whole_step}


def mixing(repeats: int) -> float | None:
    "Milliseconds to mix a batch of the corpus mini, None where it is not at hand"
    from speechloss.common.files import home
    from speechloss.corpora.corpus import get
    from speechloss.corpora.mixing import Mixtures
    if not (home() / 'corpora' / 'mini').is_dir(): return None
    data = Mixtures(get('mini'), 'train', clean_fraction=.05)
    for k in range(400): data[k]       # reads the recordings
    state = [400]

    def batch():
        for k in range(BATCH): data[state[0] + k]
        state[0] += BATCH
    return timed(batch, repeats)


def part_rows(repeats: int) -> list[dict]:
    mixed, rows = mixing(repeats), []
    for name, causal in (('small', False), ('small, causal', True)):
        found = parts(causal, repeats)
        whole = found.pop('whole step') + (mixed or 0)
        if mixed is not None: found = {'mixing': mixed} | found
        for part, ms in sorted(found.items(), key=lambda item: -item[1]) + [('whole step', whole)]:
            rows.append(dict(model=name, part=part, ms=ms, share=ms / whole, **here()))
            print(f'{name:16} {part:30} {ms:8.2f} ms {100 * ms / whole:6.1f} %', flush=True)
    return rows


# ------------------------------------------------------------------------------- the command

def write(path: Path, columns: tuple, rows: list[dict]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('parts', 'before'))
    parser.add_argument('commit', nargs='?', help='to compare with')
    parser.add_argument('names', nargs='*', help=f'some of {", ".join(objectives())}; default: all')
    parser.add_argument('--rounds', type=int, default=2, help='turns of each side')
    parser.add_argument('--repeats', type=int, default=30, help='of each part')
    parser.add_argument('--dry', action='store_true', help='print, and leave the tables alone')
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == 'parts':
        rows = part_rows(given.repeats)
        if not given.dry: write(ROOT / 'benchmarks' / 'step_parts.csv', PART_COLUMNS, rows)
        return
    if not given.commit: parser.error('give a commit to compare with')
    if unknown := set(given.names) - set(objectives()): parser.error(f'no step {min(unknown)!r}')
    rows = compare(given.commit, given.names or list(objectives()), given.rounds)
    if not given.dry: write(ROOT / 'benchmarks' / 'step.csv', COLUMNS, rows)


if __name__ == '__main__':
    if sys.argv[1:2] == ['child']: train_timed(*json.loads(sys.argv[2]))
    else: main()
