"""A loss outside of the package: the log-likelihood ratio of linear prediction, in torch.

    speechloss judge benchmarks.envelope:Envelope

Itakura's distance: by how much the envelope of the enhanced frame predicts the clean one worse than its own does. Level
and phase do not count. The metric `llr` is the same in numpy (Quackenbush, Barnwell and Clements, *Objective measures
of speech quality*, 1988). `floor` says how far below the level of a frame a valley of its spectrum still counts.
"""
import torch

from speechloss.losses import Loss
from speechloss.signal.spectra import stft

N_FFT, HOP, FRAME = 1024, 120, 480    # samples at 16 kHz; frames of 30 ms
LEAST, RESIDUAL = 1e-9, 1e-12         # power, in place of nothing


class Envelope(Loss):
    "Compare spectral envelopes by the residual of linear prediction; zero at identity, level does not count"
    def __init__(self, *, order: int = 16, floor: float = 1e-6, reduction: str = 'mean'):
        super().__init__(reduction=reduction)
        self.order, self.floor = order, floor

    def predict(self, wave):     # (N, T) -> Toeplitz matrices (N, frames, order + 1, order + 1), filters
        power = stft(wave.double(), N_FFT, HOP, FRAME).abs().square()
        r = torch.fft.irfft(power + 0j)[..., :self.order + 1]
        r = torch.cat([r[..., :1] * (1 + self.floor) + LEAST, r[..., 1:]], -1)
        lag = torch.arange(self.order + 1)
        matrix = r[..., (lag[:, None] - lag).abs()]
        filters = -torch.linalg.solve(matrix[..., 1:, 1:], r[..., 1:])
        return matrix, torch.cat([torch.ones_like(filters[..., :1]), filters], -1)

    def values(self, waves):
        (_, enhanced), (matrix, clean) = self.predict(waves.enhanced), self.predict(waves.clean)
        residual = [torch.einsum('nfi,nfij,nfj->nf', a, matrix, a).clamp_min(RESIDUAL) for a in (enhanced, clean)]
        ratio = (residual[0] / residual[1]).log()
        kept = ratio.sort(1).values[:, :max(round(.95 * ratio.shape[1]), 1)]      # as in the metric
        return dict(envelope=kept.mean(1).to(waves.enhanced.dtype))
