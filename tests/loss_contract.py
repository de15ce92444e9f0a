"""What every loss of the package promises, as tests that a new loss passes with one line.

    class TestMine(LossContract):
        cases = [Case('mine', MyLoss), Case('mine-sum', partial(MyLoss, option=2))]

A case is data: how to make the loss, its value at identity, and the promises it is exempt from,
each of which its docstring has to state.
"""
import copy
import io
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import helpers
import pytest
import torch
from helpers import close_grad
from torch import Tensor, nn

from speechloss.features import Frozen

B, T = 3, 2003                  # a prime number of samples
LENGTHS = (T, 1301, 1700)       # the shortest legal wave at n_fft 2048 has 1025
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RTOL, ATOL = 1e-4, 1e-6         # float32, other order of summation


@dataclass(frozen=True)
class Case:
    "A loss to be tested"
    name: str
    make: Callable               # make(reduction=...) gives the loss
    identity: float = 0.         # its value at enhanced == clean
    compiles: str = ''           # backend with which it promises torch.compile(fullgraph=True)
    state: tuple = ()            # its own keys of state_dict(); running statistics
    noisy: bool = False          # does it look at the noisy wave?
    blind: tuple = ()            # hard inputs, of HARD, on which its gradient may vanish
    atol: float = ATOL           # of a value

    def __str__(self): return self.name


# --- waves ---

def waves(batch: int = B, **options) -> tuple:
    "Enhanced, clean and noisy `(batch, T)`: those of `helpers`, shorter"
    return helpers.waves(batch, T, **options)


def _noise(db: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 10 ** (db / 20) * torch.randn(B, T, generator=draw)


def _impulse(at: Tensor) -> Tensor:
    return torch.zeros(B, T).index_fill_(1, at, 1.)


def hard_inputs() -> dict:
    "Enhanced and clean waves that break careless losses"
    enhanced, clean, _ = waves()
    zero, voiced = torch.zeros_like(clean), clean.abs().amin(0).argmax()
    return {
        'silent clean': (enhanced, zero),
        'silent enhanced': (zero, clean),
        'both silent': (zero, zero),
        'identity': (clean, clean),
        'DC offset': (enhanced + .5, clean),
        'DC alone': (torch.full_like(clean, .5), clean),
        'DC target': (enhanced, torch.full_like(clean, .5)),
        'clipped': ((30 * enhanced).clamp(-1, 1), (30 * clean).clamp(-1, 1)),
        '-120 dBFS': (_noise(-120, 1), _noise(-120, 2)),
        '-120 dBFS enhanced': (_noise(-120, 1), clean),
        '-120 dBFS clean': (enhanced, _noise(-120, 2)),
        'int16': (32768 * enhanced, 32768 * clean),
        'impulse enhanced': (_impulse(voiced), clean),
        'impulse clean': (enhanced, _impulse(voiced)),
        'pauses': tuple(w * (torch.arange(T) % 1000 < 400) for w in (enhanced, clean)),
    }


HARD = tuple(hard_inputs())
AT_REST = ('both silent', 'identity')    # a minimum has no gradient


# --- helpers ---

def build(case: Case, reduction: str = 'none') -> nn.Module:
    "The loss of a case, to do anything with; running statistics are primed and then held by `eval()`"
    return copy.deepcopy(_built(case, reduction))      # a copy shares nothing, see `test_copies`


@cache
def _built(case: Case, reduction: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):            # the same, whichever test asks first
        torch.manual_seed(0)
        loss = case.make(reduction=reduction)
        if case.state:
            call(case, loss, *waves(seed=99))
            loss.eval()
        return loss


def call(case: Case, loss, enhanced, clean, noisy=None, **options) -> Tensor:
    "Call a loss, with the noisy wave where it wants one"
    return loss(enhanced, clean, noisy=noisy if case.noisy else None, **options)


def value_and_grad(case: Case, loss, enhanced, clean, noisy=None, **options):
    "The value of each utterance and the gradient of their sum"
    enhanced = enhanced.detach().clone().requires_grad_()
    value = call(case, loss, enhanced, clean, noisy, **options)
    value.sum().backward()
    return value.detach(), enhanced.grad


@cache
def plain(case: Case) -> tuple:
    "The value and gradient of `waves()`, to which other calls are held"
    return value_and_grad(case, build(case), *waves())


@contextmanager
def about(what: str):
    "Say in the message of a failure what it was about"
    try: yield
    except Exception as error:
        error.add_note(f'that was: {what}')
        raise


def close(case: Case, found, wanted, rtol: float = RTOL):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=case.atol)


def networks(loss: nn.Module) -> list[nn.Module]:
    "The frozen networks that a loss holds"
    return [m.net for m in loss.modules() if isinstance(m, Frozen)]


# --- the contract ---

class LossContract:
    "Subclass, and give `cases`"
    cases: list[Case] = []

    def pytest_generate_tests(self, metafunc):
        if 'case' in metafunc.fixturenames:
            cases = self.cases
            if metafunc.function.__name__ == 'test_compiles':
                slow = dict(inductor=[pytest.mark.slow])      # it calls a C++ compiler
                cases = [pytest.param(c, marks=slow.get(c.compiles, ()))
                         for c in cases if c.compiles]
            metafunc.parametrize('case', cases, ids=str)

    # shapes, types, layouts

    def test_shapes(self, case):
        loss = build(case)
        value, grad = value_and_grad(case, loss, *waves(4))
        assert value.shape == (4,)
        one, one_grad = value_and_grad(case, loss, *(w[0] for w in waves(4)))
        assert one.shape == ()
        close(case, one, value[0])
        close_grad(one_grad, grad[0])
        stereo, stereo_grad = value_and_grad(
            case, loss, *(w.reshape(2, 2, T) for w in waves(4)))
        close(case, stereo, value.reshape(2, 2).mean(1))
        close_grad(stereo_grad, grad.reshape(2, 2, T) / 2)

    def test_dtypes(self, case):
        loss = build(case)
        for dtype in DTYPES:
            given, scale = waves(dtype=dtype), 2 ** 12     # a gradient per sample is small for float16
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            wanted, wanted_grad = value_and_grad(case, loss, *(w.to(wide) for w in given))
            enhanced = given[0].clone().requires_grad_()
            with about(str(dtype)):
                value = call(case, loss, enhanced, *given[1:])
                assert value.dtype == wide
                assert value.equal(wanted)
                (value.sum() * scale).backward()
                assert enhanced.grad.dtype == dtype
                close_grad(enhanced.grad.double() / scale, wanted_grad, 1e-2)

    def test_double_agrees_with_float(self, case):
        loss, (value, grad) = build(case), plain(case)
        exact, exact_grad = value_and_grad(case, build(case).double(), *waves(dtype=torch.float64))
        assert exact.dtype == torch.float64
        close(case, value.double(), exact)
        close_grad(grad, exact_grad)
        mixed, _ = value_and_grad(case, loss, waves()[0],
                                  *waves(dtype=torch.float64)[1:])
        assert mixed.dtype == torch.float64

    def test_layouts(self, case):
        loss, given = build(case), waves()
        value, grad = plain(case)
        layouts = dict(
            strided=lambda w: torch.stack([w, w], -1).flatten(1)[:, ::2],
            transposed=lambda w: w.t().contiguous().t(),
            offset=lambda w: torch.cat([w[:1] * 3, w])[1:],
            sliced=lambda w: torch.cat([w * 2, w, w], 1)[:, T:2 * T])
        for name, layout in layouts.items():
            leaf = given[0].clone().requires_grad_()
            laid_out = layout(leaf)
            assert name == 'offset' or not laid_out.is_contiguous()
            with about(name):
                other = call(case, loss, laid_out, *map(layout, given[1:]))
                close(case, other, value)
                other.sum().backward()
                close_grad(leaf.grad, grad)
        expanded = call(case, loss, *(w[:1].expand(B, T) for w in given))
        close(case, expanded, value[:1].expand(B))

    def test_grad_output(self, case):
        "Expanded (from a sum), strided, and of one utterance alone"
        loss, (enhanced, *rest) = build(case), waves()
        _, grad = plain(case)
        for weight in (torch.ones(()).expand(B), torch.arange(1., 1 + 2 * B)[::2],
                       torch.eye(B)[1]):
            leaf = enhanced.clone().requires_grad_()
            call(case, loss, leaf, *rest).backward(weight)
            close_grad(leaf.grad, grad * weight[:, None])

    def test_reductions(self, case):
        given, (each, grad) = waves(), plain(case)
        for reduction, share in (('mean', 1 / B), ('sum', 1)):
            value, reduced = value_and_grad(case, build(case, reduction), *given)
            assert value.shape == ()
            close(case, value, getattr(each, reduction)())
            close_grad(reduced, grad * share)
        with pytest.raises(ValueError, match='median.*choose one of mean, sum, none'):
            case.make(reduction='median')

    def test_terms(self, case):
        for reduction in ('mean', 'sum', 'none'):
            loss, given = build(case, reduction), waves()
            options = dict(noisy=given[2] if case.noisy else None, lengths=torch.tensor(LENGTHS))
            terms = loss.terms(*given[:2], **options)
            assert terms and all(isinstance(name, str) for name in terms)
            close(case, sum(terms.values()), loss(*given[:2], **options))

    # one utterance is nobody else's business

    def test_batch_mates(self, case):
        loss, given = build(case), waves()
        value, grad = plain(case)
        for i in range(B):
            alone, alone_grad = value_and_grad(case, loss, *(w[i:i + 1] for w in given))
            close(case, alone[0], value[i])
            close_grad(alone_grad[0], grad[i])
        order = torch.tensor([2, 0, 1])
        moved, moved_grad = value_and_grad(case, loss, *(w[order] for w in given))
        close(case, moved, value[order])
        close_grad(moved_grad, grad[order])

    def test_bad_batch_mate(self, case):
        loss, (value, grad), keep = build(case), plain(case), [0, 2]
        for mate, change in dict(loud=1e3, silent=0., nan=torch.nan).items():
            given = [torch.cat([w[:1], w[1:2] * change, w[2:]]) for w in waves()]
            other, other_grad = value_and_grad(case, loss, *given)
            with about(f'a batch mate that is {mate}'):
                close(case, other[keep], value[keep])
                close_grad(other_grad[keep], grad[keep])

    # lengths

    def test_padding_does_not_count(self, case):
        "The value and gradient of each utterance are those of the utterance cut to its length"
        loss, given = build(case), waves()
        alone = [value_and_grad(case, loss, *(w[i:i + 1, :n] for w in given)) for i, n in enumerate(LENGTHS)]
        for padding, fill in dict(zero=0., noise=5., nan=torch.nan).items():
            for i, n in enumerate(LENGTHS):
                for w in given: w[i, n:] = fill * torch.randn(T - n)
            value, grad = value_and_grad(case, loss, *given, lengths=torch.tensor(LENGTHS))
            for i, n in enumerate(LENGTHS):
                with about(f'padding of {padding}, {n} samples'):
                    close(case, value[i], alone[i][0][0])
                    close_grad(grad[i, :n], alone[i][1][0])
                    assert (grad[i, n:] == 0).all()

    def test_full_lengths_are_no_lengths(self, case):
        loss, given = build(case), waves()
        value, grad = plain(case)
        for lengths in (torch.full((B,), T), [T] * B, torch.full((B,), T, dtype=torch.int32)):
            full, full_grad = value_and_grad(case, loss, *given, lengths=lengths)
            close(case, full, value)
            close_grad(full_grad, grad)

    def test_lengths_of_channels(self, case):
        loss, lengths = build(case), torch.tensor([T, 1500])
        stereo = [w.reshape(2, 2, T) for w in waves(4)]
        value, _ = value_and_grad(case, loss, *stereo, lengths=lengths)
        flat, _ = value_and_grad(case, loss, *waves(4), lengths=lengths.repeat_interleave(2))
        close(case, value, flat.reshape(2, 2).mean(1))
        alone, _ = value_and_grad(case, loss, *(w[0] for w in waves(4)), lengths=[1500])
        cut, _ = value_and_grad(case, loss, *(w[0, :1500] for w in waves(4)))
        close(case, alone, cut)

    # values

    def test_identity(self, case):
        _, clean, noisy = waves()
        value, grad = value_and_grad(case, build(case), clean, clean, noisy)
        atol = 1e-5 if case.identity == 0 else .01 * abs(case.identity)
        torch.testing.assert_close(value, torch.full((B,), case.identity), rtol=0, atol=atol)
        assert grad.isfinite().all()

    def test_identity_is_the_minimum(self, case):
        loss, (enhanced, clean, noisy) = build(case), waves()
        at_clean = call(case, loss, clean, clean, noisy)
        assert (call(case, loss, enhanced, clean, noisy) > at_clean).all()
        assert (call(case, loss, torch.zeros_like(clean), clean, noisy) > at_clean).all()

    def test_hard_inputs(self, case):
        "All in one batch: an utterance is nobody else's business"
        enhanced, clean = (torch.cat(waves) for waves in zip(*hard_inputs().values()))
        values, grads = value_and_grad(
            case, build(case), enhanced, clean, waves()[2].repeat(len(HARD), 1))
        for name, value, grad in zip(HARD, values.split(B), grads.split(B), strict=True):
            with about(name):
                assert value.isfinite().all(), value
                assert grad.isfinite().all()
                if name not in AT_REST + case.blind:
                    assert (grad.abs().amax(-1) > 0).all(), 'the gradient vanishes'
                if name == 'both silent' and 'both silent' not in case.blind:
                    torch.testing.assert_close(
                        value, torch.full((B,), case.identity), rtol=0, atol=max(1e-5, case.atol))

    def test_silence_alone(self, case):
        "A batch without one sound in it, where nothing loud stands beside the silence"
        value, grad = value_and_grad(case, build(case), *(torch.zeros_like(w) for w in waves()))
        assert value.isfinite().all() and grad.isfinite().all()

    def test_nan_propagates(self, case):
        loss = build(case)
        for which in range(3 if case.noisy else 2):
            given = [w.clone() for w in waves()]
            given[which][1, 700] = torch.nan
            value = call(case, loss, *given)
            assert value.isnan().tolist() == [False, True, False]

    def test_deterministic(self, case):
        loss, given = build(case), waves()
        runs = [value_and_grad(case, loss, *given, lengths=LENGTHS) for _ in range(3)]
        for value, grad in runs[1:]:
            assert value.equal(runs[0][0]) and grad.equal(runs[0][1])

    # gradient, state and mode

    def test_gradient_reaches_enhanced_only(self, case):
        loss = build(case, 'mean')
        enhanced, clean, noisy = (w.requires_grad_() for w in waves())
        loss(enhanced, clean, noisy=noisy).backward()
        assert enhanced.grad.abs().sum() > 0
        assert clean.grad is None and noisy.grad is None
        assert not list(loss.parameters())
        for net in networks(loss):
            assert all(p.grad is None and not p.requires_grad for p in net.parameters())
        assert not loss(enhanced.detach(), clean, noisy=noisy).requires_grad
        with torch.no_grad():
            assert not loss(enhanced, clean, noisy=noisy).requires_grad

    def test_inputs_are_left_alone(self, case):
        given = waves()
        value_and_grad(case, build(case), *given, lengths=LENGTHS)
        assert all(w.equal(before) for w, before in zip(given, waves()))

    def test_noisy_is_optional(self, case):
        loss, (enhanced, clean, noisy) = build(case), waves()
        if case.noisy:
            with pytest.raises(ValueError, match='noisy'): loss(enhanced, clean)
        else:
            assert loss(enhanced, clean, noisy=noisy).equal(loss(enhanced, clean))

    def test_train_mode(self, case):
        "A parent's `train()` wakes no frozen network and changes no value"
        loss, given = build(case), waves()
        before = call(case, loss, *given)
        nn.ModuleDict(dict(loss=loss)).train()
        for net in networks(loss):
            for module in net.modules():
                # a recurrent layer trains on CUDA only in training mode; it has no dropout
                assert not module.training or isinstance(module, nn.RNNBase) and not module.dropout
        if not case.state:       # running statistics move in training mode
            assert call(case, loss, *given).equal(before)

    def test_state_dict(self, case):
        loss, given = build(case), waves()
        assert set(loss.state_dict()) == set(case.state)
        file = io.BytesIO()
        torch.save(loss.state_dict(), file)
        file.seek(0)
        other = case.make(reduction='none')
        other.load_state_dict(torch.load(file, weights_only=True))
        other.eval()
        assert call(case, other, *given).equal(call(case, loss, *given))

    def test_copies(self, case):
        loss, given = build(case), waves()
        value = call(case, loss, *given)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert call(case, other, *given).equal(value)
            other.double()       # a copy shares nothing
            assert call(case, loss, *given).equal(value)

    def test_moves(self, case):
        loss, given = build(case), waves()
        value = call(case, loss, *given)
        assert loss.double() is loss
        tensors = [t for m in (loss, *networks(loss)) for t in m.state_dict().values()]
        assert all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
        moved = call(case, loss, *given)
        assert moved.dtype == torch.float32
        close(case, moved, value)
        close(case, call(case, loss.float(), *given), value)
        for net in networks(loss.to('meta')):
            assert all(t.is_meta for t in net.state_dict().values())

    # autocast, compile

    def test_autocast(self, case):
        loss, given = build(case), waves()
        value, grad = plain(case)
        enhanced = given[0].clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            inside = call(case, loss, enhanced, *given[1:])
        assert inside.dtype == torch.float32
        assert inside.equal(value)
        inside.sum().backward()
        assert enhanced.grad.equal(grad)

    def test_compiles(self, case):
        # float64: a quiet bin turns the rounding of another FFT into 1e-3 of a log's gradient
        loss, given = build(case), waves(dtype=torch.float64)
        torch._dynamo.reset()
        fast = torch.compile(loss, fullgraph=True, backend=case.compiles)
        for options in ({}, dict(lengths=torch.tensor(LENGTHS))):
            value, grad = value_and_grad(case, loss, *given, **options)
            compiled, compiled_grad = value_and_grad(case, fast, *given, **options)
            close(case, compiled, value, 1e-9)
            close_grad(compiled_grad, grad, 1e-9)

    # wrong input

    def test_wrong_shapes(self, case):
        loss = build(case)
        wave = torch.zeros(B, T)
        wrong = {
            r'clean .*\(1, 2003\).*\(3, 2003\)': (wave, wave[:1]),
            r'clean .*\(3, 2002\).*\(3, 2003\)': (wave, wave[:, 1:]),
            r'clean .*\(2003,\).*\(3, 2003\)': (wave, wave[0]),
            r'enhanced .*\(1, 1, 3, 2003\).*\(B, T\)': (wave[None, None], wave[None, None]),
            r'enhanced .*\(3, 0\)': (wave[:, :0], wave[:, :0]),
            r'enhanced .*\(0, 2003\)': (wave[:0], wave[:0]),
            r'enhanced .*\(\)': (wave[0, 0], wave[0, 0]),
        }
        for message, given in wrong.items():
            self._fails(ValueError, message, loss, *given)
        self._fails(ValueError, r'noisy .*\(3, 2001\).*\(3, 2003\)', loss, wave, wave,
                    noisy=wave[:, 2:])

    def test_wrong_types(self, case):
        loss, wave = build(case), torch.zeros(B, T)
        for other in (wave.int(), wave.cfloat(), wave.numpy(), wave.tolist(), None):
            self._fails(TypeError, 'enhanced', loss, other, wave)
            self._fails(TypeError, 'clean', loss, wave, other)
            if other is not None:
                self._fails(TypeError, 'noisy', loss, wave, wave, noisy=other)
        self._fails(ValueError, 'clean is on meta', loss, wave, wave.to('meta'))

    def test_wrong_lengths(self, case):
        loss, wave = build(case), torch.zeros(B, T)
        for lengths in ([T], [T] * 4, T, [[T] * B], [float(T)] * B, [T, T, 0], [T, -1, T],
                        [T, T + 1, T]):
            self._fails(ValueError, 'lengths', loss, wave, wave, lengths=lengths)

    @staticmethod
    def _fails(error, message, loss, *given, **options):
        with pytest.raises(error, match=message) as caught:
            loss(*given, **{'noisy': given[1], **options})
        assert '\n' not in str(caught.value)
