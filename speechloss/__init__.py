"""Losses for speech enhancement beyond L1 and multi-resolution STFT, and the papers behind them.

Packages, from the ground up; each names what is public, and an import only goes down:

    common      errors, files, weights, tables, progress
    signal      waves, their files, levels and spectra
    corpora     recordings, splits, mixtures
    features    what a loss looks at
    losses      the losses: the reason for all the rest
    models      enhancers
    metrics     scores, and the statistics of their differences
    training    from a recipe to a model
    judges      downstream judges: recognition, speakers, pitch, phones
    reproduce   a paper from its notebook to verdicts
    trials      a loss without a training: what it wants, whether it hears what people hear
    cli         the command `speechloss`

and `kernels`, which the losses call and which stands by itself. They are opened when they are asked
for: `import speechloss; speechloss.losses.SSLLoss()`.
"""
from importlib import import_module

__version__ = "0.1.0"

__all__ = ['common', 'corpora', 'features', 'judges', 'kernels', 'losses', 'metrics', 'models', 'reproduce', 'signal',
           'training', 'trials']


def __getattr__(name: str):
    if name in __all__: return import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
