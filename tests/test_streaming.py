"""Streaming: hop by hop a causal model gives what it gives for the whole file, for hours, in a pipe and as a graph."""
import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from typer.testing import CliRunner

from speechloss.cli.app import app
from speechloss.common.errors import SpeechLossError
from speechloss.models import BandSplitEnhancer, SpectralAutoencoder, SpectralEnhancer, Stream, enhancer, export_onnx
from speechloss.models.catalogue import MODEL_PRESETS
from speechloss.models.mask_network import add_to_mean, mean_so_far
from speechloss.models.streaming import hop_tables

KINDS = {'preset': {}, 'deep': dict(layers=2, kernel=2), 'hop 1/4': dict(n_fft=128, hop_length=32),
         'hop 1/8': dict(n_fft=256, hop_length=32, kernel=1), 'odd hop': dict(n_fft=128, hop_length=50),
         'half is odd': dict(n_fft=250, hop_length=100), 'forgets': dict(memory=.3),
         'bands': dict(kind='band_split', n_fft=128, hop_length=32, channels=8, blocks=2, memory=.3)}
WAVES = {
    'noise': lambda size: torch.randn(2, size) / 10,
    'silence first': lambda size: torch.cat([torch.zeros(2, size // 2), torch.randn(2, size - size // 2)], -1),
    'silence': lambda size: torch.zeros(2, size),
    'constant': lambda size: torch.ones(2, size),
    'clipped': lambda size: torch.randn(2, size).sign(),
    'tone': lambda size: torch.sin(torch.arange(size) * torch.tensor([[.3], [1.7]])),
    'click': lambda size: F.one_hot(torch.tensor([0, 700]), size).float(),
    'loud, then quiet': lambda size: torch.randn(2, size) * torch.logspace(0, -6, size),
}


def causal(**options) -> SpectralEnhancer | BandSplitEnhancer:
    torch.manual_seed(0)
    if 'kind' not in options: options = dict(preset='tiny') | options
    return enhancer(dict(causal=True) | options).eval()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def net(request): return causal(**request.param)


@torch.no_grad()
def stepped(net, wave: torch.Tensor) -> torch.Tensor:
    "What `step` gives for a wave and the zeros that flush it, (B, as many hops as that takes)"
    hops = -(-(wave.shape[-1] + net.delay) // net.hop_length)
    padded = F.pad(wave, (0, hops * net.hop_length - wave.shape[-1]))
    state, found = net.initial_state(len(wave)), []
    for frame in padded.split(net.hop_length, -1):
        enhanced, state = net.step(frame, state)
        found.append(enhanced)
    return torch.cat(found, -1)


# ------------------------------------------------------------------------------------ the step

@pytest.mark.parametrize('make', WAVES.values(), ids=WAVES)
@torch.no_grad()
def test_step_is_the_whole_file_late(net, make):
    "In float32 to 1e-5 of full scale and in float64 to 1e-9, from the first sample to the last; before it nothing"
    for size in (1, net.n_fft - 1, 4001):
        wave = make(4001)[:, :size]
        for model, like, close in ((net, wave, 1e-5), (copy.deepcopy(net).double(), wave.double(), 1e-9)):
            late = stepped(model, like)
            assert late.dtype == like.dtype and late[:, :net.delay].eq(0).all()
            assert (late[:, net.delay:][:, :size] - model(like)).abs().max() <= close


def test_delay():
    for n_fft, hop, wanted in ((512, 256, 256), (512, 128, 384), (128, 50, 114)):
        assert causal(n_fft=n_fft, hop_length=hop).delay == wanted
    assert enhancer({'preset': 'small', 'causal': True}).delay == 256


def test_a_model_that_looks_ahead_cannot():
    net = enhancer('tiny')
    for use in (lambda: net.delay, net.initial_state, lambda: net.step(torch.zeros(1, 128), {}), lambda: Stream(net),
                lambda: export_onnx(net, 'absent/step.onnx')):
        with pytest.raises(SpeechLossError, match='causal=True') as caught: use()
        assert '\n' not in str(caught.value)
    for use in (lambda: Stream(SpectralAutoencoder()), lambda: export_onnx(SpectralAutoencoder(), 'absent/step.onnx')):
        with pytest.raises(SpeechLossError, match='SpectralAutoencoder.*causal=True'): use()
    assert not Path('absent').exists()


@pytest.mark.parametrize('frame', [torch.zeros(1, 127), torch.zeros(128), torch.zeros(2, 128),
                                   torch.zeros(1, 128).long()])
def test_wrong_frames(frame):
    net = causal()
    with pytest.raises(SpeechLossError, match='give the next 128 samples of 1 streams'):
        net.step(frame, net.initial_state())


@torch.no_grad()
def test_state_is_nothing_but_tensors():
    "Streams of unequal age go on in one batch, and a saved state goes on elsewhere; `step` changes none that it gets"
    net = causal(hop_length=32)
    noisy = torch.randn(2, 64 * 32)
    alone = [stepped(net, row[None])[:, :64 * 32] for row in noisy]
    old, young = net.initial_state(), net.initial_state()
    for frame in noisy[:1, :20 * 32].split(32, -1): _, old = net.step(frame, old)
    kept = {name: tensor.clone() for name, tensor in old.items()}
    both = {name: torch.cat([old[name], young[name]]) for name in old}
    for k in range(30):
        frame = torch.stack([noisy[0, (20 + k) * 32:(21 + k) * 32], noisy[1, k * 32:(k + 1) * 32]])
        enhanced, both = net.step(frame, both)
        assert torch.allclose(enhanced[:1], alone[0][:, (20 + k) * 32:(21 + k) * 32], atol=1e-6)
        assert torch.allclose(enhanced[1:], alone[1][:, k * 32:(k + 1) * 32], atol=1e-6)
    assert all(isinstance(tensor, torch.Tensor) and tensor.equal(kept[name]) for name, tensor in old.items())
    assert {name: tensor.shape[1:] for name, tensor in both.items()} == {
        name: tensor.shape[1:] for name, tensor in old.items()}


def test_gradient_goes_through_steps():
    "A model can be trained step by step"
    net = causal(n_fft=32, hop_length=16, bands=8, channels=4).double()
    wave = torch.randn(1, 64, dtype=torch.double, requires_grad=True)

    def run(wave):
        state, found = net.initial_state(), []
        for frame in wave.split(16, -1):
            enhanced, state = net.step(frame, state)
            found.append(enhanced)
        return torch.cat(found, -1)

    assert torch.autograd.gradcheck(run, wave)


@pytest.mark.parametrize('n_fft, hop', [(512, 256), (512, 128), (250, 100), (64, 1)])
def test_tables_are_the_fast_transform(n_fft, hop):
    analysis, synthesis, gain = hop_tables(n_fft, hop, torch.float64, torch.device('cpu'))
    frame, window = torch.randn(n_fft, dtype=torch.double), torch.hann_window(n_fft, dtype=torch.double)
    assert torch.complex(*(frame @ analysis).chunk(2, -1)).allclose(torch.fft.rfft(frame * window))
    spec = torch.randn(n_fft // 2 + 1, dtype=torch.complex128)
    assert (torch.cat([spec.real, spec.imag]) @ synthesis).allclose(torch.fft.irfft(spec, n_fft) * window)
    assert gain.isfinite().all() and (gain >= 0).all() and (gain[-1] > 0).all()


# ------------------------------------------------------------------------------------- for hours

@pytest.mark.parametrize('size', [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_mean_of_a_million_frames(size):
    "The sum stays right in float32, where a plain one drifts; so does the whole-file mean"
    frames = torch.rand(size, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 100
    total, counts = torch.zeros(1, 2, 1), torch.arange(1., size + 1).view(-1, 1, 1, 1)
    for x, count in zip(frames, counts): mean, total = add_to_mean(total, x, count)
    right, plain = frames.double().mean(), np.cumsum(frames.flatten().numpy())[-1] / size
    assert abs(mean - right) <= 1e-7 * right < abs(plain - right)
    assert abs(mean_so_far(frames.view(1, -1, 1), True)[0, -1] - right) <= 2e-7 * right


@pytest.mark.slow
@torch.no_grad()
def test_a_quarter_of_an_hour():
    "56,250 frames of noise, as many as 15 minutes have at 16 ms, are those of the offline formula"
    net = causal(n_fft=32, hop_length=16, bands=8, channels=4)
    wave = torch.randn(1, 56_250 * 16, generator=torch.Generator().manual_seed(0)) / 10
    whole = copy.deepcopy(net).double()(wave.double())[0]
    late = stepped(net, wave)[0, net.delay:][:wave.shape[-1]]
    assert (late - whole).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_memory_is_flat():
    "A stream holds as much after a thousand hops as after two"
    stream, sizes = Stream(causal()), []
    for _ in range(1000):
        stream(torch.randn(128))
        sizes.append(sum(x.untyped_storage().nbytes() for x in (*stream._state.values(), stream._rest)))
    assert max(sizes[1:]) == sizes[1] < 1e5


# ---------------------------------------------------------------------------------------- Stream

@given(sizes=st.lists(st.integers(0, 700), max_size=12), flat=st.booleans())
def test_pieces_of_any_size(sizes, flat):
    net = causal(hop_length=100)
    wave = torch.randn(sum(sizes)) if flat else torch.randn(3, sum(sizes))
    stream = Stream(net)
    for _ in range(2):      # after a flush it begins anew
        pieces = [stream(part) for part in wave.split(sizes, -1)]
        pieces.append(stream.flush())
        joined = torch.cat([piece for piece in pieces if piece.numel()] or [wave], -1)
        assert joined.shape == wave.shape and not joined.requires_grad
        if sum(sizes): assert torch.allclose(joined, net(wave), atol=1e-5)


def test_a_stream_refuses_and_goes_on():
    net, wave = causal(), torch.randn(1000)
    stream = Stream(net)
    pieces = [stream(wave[:500])]
    for bad, said in ((torch.full((3,), torch.nan), 'NaN'), (torch.zeros(2, 5), 'began with'),
                      (torch.zeros(5).int(), 'give'), (torch.zeros(1, 1, 5), 'give')):
        with pytest.raises(SpeechLossError, match=said) as caught: stream(bad)
        assert '\n' not in str(caught.value)
    pieces += [stream(wave[500:]), stream.flush()]
    assert torch.allclose(torch.cat(pieces), net(wave), atol=1e-5)
    assert stream.flush().shape == (0,)


def test_a_stream_keeps_types():
    net = causal()
    for dtype in (torch.float64, torch.bfloat16):
        stream = Stream(net)
        found = torch.cat([stream(torch.ones(1, 300, dtype=dtype)), stream.flush()], -1)
        assert found.dtype == dtype and found.shape == (1, 300)
    with torch.autocast('cpu', torch.bfloat16):
        stream, wave = Stream(net), torch.randn(1000)
        found = torch.cat([stream(wave), stream.flush()])
    assert torch.allclose(found, net(wave), atol=1e-5)


# ------------------------------------------------------------------------------------------ ONNX

def session_of(path):
    runtime = pytest.importorskip('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('options', [dict(MODEL_PRESETS['small']), dict(hop_length=32, layers=2, kernel=1, memory=2.),
                                     dict(kind='band_split', channels=8, blocks=2, memory=2.)],
                         ids=['small', 'deep, hop 1/8', 'bands'])
@torch.no_grad()
def test_onnx_is_the_step(options, tmp_path):
    "200 hops of two streams to 1e-4, names and metadata; the sums keep what rounding took from them"
    pytest.importorskip('onnxscript')
    import onnx
    net = causal(**options)
    path = export_onnx(net, tmp_path / 'deep/er' / 'step.onnx', batch=2)
    session, state = session_of(path), net.initial_state(2)
    names = list(state)
    assert [put.name for put in session.get_inputs()] == ['frame', *names]
    assert [put.name for put in session.get_outputs()] == ['enhanced', *(f'next_{name}' for name in names)]
    about = session.get_modelmeta().custom_metadata_map
    assert {name: int(text) for name, text in about.items()} == dict(
        sample_rate=16000, hop_length=net.hop_length, n_fft=net.n_fft, delay=net.delay, opset=18)
    assert onnx.load(path).opset_import[0].version == 18 and [p.name for p in path.parent.iterdir()] == ['step.onnx']
    held = {name: tensor.numpy() for name, tensor in state.items()}
    for _ in range(200):
        frame = torch.randn(2, net.hop_length) / 10
        enhanced, state = net.step(frame, state)
        found, *after = session.run(None, held | {'frame': frame.numpy()})
        held = dict(zip(names, after))
        assert np.abs(found - enhanced.numpy()).max() <= 1e-4
    old = {name: tensor.clone() for name, tensor in state.items()}
    old['means'][:, 0] = 1e6
    _, state = net.step(frame, old)
    again = session.run(None, {name: tensor.numpy() for name, tensor in old.items()} | {'frame': frame.numpy()})
    taken = again[1 + names.index('means')][:, 1]
    assert np.abs(taken).max() > 1e-3 and np.abs(taken - state['means'][:, 1].numpy()).max() < 1e-4


def test_onnx_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(SpeechLossError, match=r"needs onnxscript: pip install '.\[onnx\]'"):
        export_onnx(causal(), tmp_path / 'step.onnx')
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- the command

PCM = 32768


def raw(wave: torch.Tensor) -> bytes: return (wave * PCM).round().clamp(-PCM, PCM - 1).numpy().astype('<i2').tobytes()


def heard(data: bytes) -> torch.Tensor: return torch.from_numpy(np.frombuffer(data, '<i2').astype('float32') / PCM)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('causal')
    causal(hop_length=64).save_pretrained(path)
    return path


@pytest.fixture(scope='module')
def noisy(): return heard(raw(torch.randn(20_001, generator=torch.Generator().manual_seed(0)) / 10))


def started(*args, **more) -> subprocess.Popen:
    "`speechloss enhance --stream` in a pipe"
    return subprocess.Popen([sys.executable, '-m', 'speechloss', 'enhance', '--stream', *map(str, args)],
                            **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | more)


@torch.no_grad()
def test_pipe(folder, noisy):
    "Odd pieces of bytes go in while sound comes out, before the input ends; in all it is the whole-file result"
    net, data = causal(hop_length=64), raw(noisy)
    with started('--model', folder) as process:
        process.stdin.write(data[:10_001])         # five thousand samples and a half
        process.stdin.flush()
        first = process.stdout.read(2 * (5000 // 64 * 64 - net.delay))     # blocks unless they come now
        process.stdin.write(data[10_001:])
        rest, said = process.communicate()
    assert process.returncode == 0 and len(first + rest) == len(data)
    assert (heard(first + rest) - net(noisy)).abs().max() <= 1 / PCM
    assert said.decode().splitlines() == ['speechloss: ready for 16-bit little-endian mono PCM at 16000 Hz; the sound '
                                          'comes 16 ms late']


@torch.no_grad()
def test_pipe_in_blocks(folder, noisy):
    with started('--model', folder, '--block', '40', '--quiet') as process:
        out, said = process.communicate(raw(noisy) + b'!')
    assert said.decode() == 'speechloss: the input ended in half a sample, which was left out\n'
    assert len(out) == 2 * len(noisy) and (heard(out) - causal(hop_length=64)(noisy)).abs().max() <= 1 / PCM


def test_nothing_in_nothing_out(folder):
    with started('--model', folder, '-q') as process: assert process.communicate(b'') == (b'', b'')


def test_a_closed_pipe_is_no_error(folder):
    with open('/dev/zero', 'rb') as zeros, started('--model', folder, '-q', stdin=zeros) as process:
        assert len(process.stdout.read(1000)) == 1000
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b''


@pytest.mark.parametrize('args, said', [
    (['--stream', 'a.wav'], 'a.wav was given too'), (['--stream', '--skip-existing'], '--skip-existing was given too'),
    (['--stream', '--block', '0'], 'less than a sample'), (['--stream', '--model', 'absent'], 'absent'),
    (['--stream', '--model', 'looks ahead'], 'causal=True'), ([], 'no file was given'),
    (['a.wav'], 'a.wav and no target'), (['a.wav', 'b.wav', '--block', '5'], 'without --stream')])
def test_command_refuses(args, said, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enhancer('tiny').save_pretrained('looks ahead')
    done = CliRunner().invoke(app, ['enhance', '--model', str(folder), *args])
    assert done.exit_code == 2 and done.stdout == '' and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
