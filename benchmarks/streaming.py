"""How much of one core a causal enhancer takes for sound as it comes.

    python -m benchmarks.streaming [--seconds S]        -> benchmarks/streaming.csv

One thread. `step`: one hop after the other in torch; `Stream`: pieces of 16 ms; `onnxruntime`: the exported step;
`whole file`: the wave at once, for comparison. The enhancer that comes with the package, and untrained models of the
presets, on noise; time does not depend on the weights.
The real-time factor is the time of the work over that of the sound: below one it keeps up. Times are of the processor,
so that what waits does not count; a machine with nothing else to do gives the best. The providers take turns.
"""
import os

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ[name] = '1'                # before numpy is imported

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import onnxruntime
import torch

from speechloss.models import SpectralEnhancer, Stream, enhancer, export_onnx, load_enhancer

from .common import ROOT, machine

MODELS = ('default', 'tiny', 'small', 'base')
BLOCK = .016         # s, of the pieces that a stream gets
TURNS = 3            # through the sound, for each provider, after a short one that is not counted
COLUMNS = ('model', 'weights', 'provider', 'latency_ms', 'hop_ms', 'ms_p50', 'ms_p99', 'rtf', 'seconds', 'cpu', 'torch',
           'onnxruntime', 'date')

Run = Callable[[torch.Tensor], Iterator]   # goes through a wave (1, T), and yields where a piece is done


def by_step(model: SpectralEnhancer) -> Run:
    @torch.no_grad()
    def run(wave):
        state = model.initial_state()
        for frame in wave.split(model.hop_length, -1):
            enhanced, state = model.step(frame, state)
            yield enhanced
    return run


def by_stream(model: SpectralEnhancer) -> Run:
    def run(wave):
        stream = Stream(model)
        for piece in wave.split(round(BLOCK * model.sample_rate), -1): yield stream(piece)
    return run


def by_graph(model: SpectralEnhancer) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(str(export_onnx(model, f'{folder}/step.onnx')), options,
                                               providers=['CPUExecutionProvider'])

    def run(wave):
        held = {name: tensor.numpy() for name, tensor in model.initial_state().items()}
        for frame in wave.split(model.hop_length, -1):
            enhanced, *after = session.run(None, held | {'frame': frame.numpy()})
            held = dict(zip(held, after))
            yield enhanced
    return run


def by_whole(model: SpectralEnhancer) -> Run:
    @torch.no_grad()
    def run(wave): yield model(wave)
    return run


PROVIDERS = {'step': by_step, 'Stream': by_stream, 'onnxruntime': by_graph, 'whole file': by_whole}


def times(run: Run, wave: torch.Tensor) -> list[float]:
    "Milliseconds of each piece of a wave"
    found, start = [], time.process_time()
    for _ in run(wave):
        now = time.process_time()
        found.append(1e3 * (now - start))
        start = now
    return found


def measure(name: str, seconds: float) -> list[dict]:
    "The rows of a model"
    torch.manual_seed(0)
    model = load_enhancer() if name == 'default' else enhancer({'preset': name, 'causal': True}).eval()
    hops = round(seconds * model.sample_rate / model.hop_length)
    wave = .1 * torch.randn(1, hops * model.hop_length)
    runs, found = {each: make(model) for each, make in PROVIDERS.items()}, {each: [] for each in PROVIDERS}
    for turn in range(TURNS + 1):
        for provider, run in runs.items():
            if turn: found[provider].append(times(run, wave))
            else: times(run, wave[:, :50 * model.hop_length])
    rows, where, length = [], machine(), wave.shape[-1] / model.sample_rate
    for provider, turns in found.items():
        p50, p99 = np.percentile(np.concatenate(turns), (50, 99))
        rows.append(dict(
            model=name, weights=sum(p.numel() for p in model.parameters()), provider=provider,
            latency_ms='' if provider == 'whole file' else 1e3 * model.n_fft / model.sample_rate,
            hop_ms=1e3 * model.hop_length / model.sample_rate, ms_p50=p50, ms_p99=p99,
            rtf=float(np.median([sum(turn) for turn in turns])) / 1e3 / length, seconds=length, cpu=where['gpu'],
            torch=torch.__version__, onnxruntime=version('onnxruntime'), date=where['date']))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=10., help='of sound in a turn')
    given = parser.parse_args()
    if given.seconds < 1: parser.error('--seconds must be 1 or more')
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in measure(name, given.seconds)]
    with open(ROOT / 'benchmarks/streaming.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        for row in rows:
            row = {name: f'{value:.4g}' if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(row)
            print('  '.join(f'{name} {row[name]}' for name in COLUMNS[:8]), flush=True)


if __name__ == '__main__':
    main()
