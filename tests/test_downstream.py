"""Judges from the hub in miniature, the packaged ones for real, and batches in which everything goes wrong."""
import json
import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.common.libraries import transformers_module
from speechloss.features import MelFeatures
from speechloss.judges import (
    TASKS, task_table, Jury, judge, fit_probe, recogniser, word_errors, verifier)
from speechloss.judges.cards import DEFAULT_TASKS, classifier, task_cards
from speechloss.judges.jury import pool_rates, probe_task
from speechloss.judges.listener import Listener, mono_16k
from speechloss.judges.probes import frame_labels, frames_of, phone_segments, pooled_frames
from speechloss.judges.voice import equal_error_rate, pitch_counts

if lacking := [p for p in ('transformers', 'jiwer', 'pocketsphinx', 'resemblyzer', 'silero_vad', 'torchcrepe')
               if find_spec(p) is None]:
    pytest.skip(f'without {", ".join(lacking)}', allow_module_level=True)

RATE = 16_000
TINY = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
    conv_kernel=(10, 8), conv_stride=(5, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2)
WAVES = [.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (4000, 3000, 4000)]


def buzz(pitch: float, seconds: float = .6) -> torch.Tensor:
    t = torch.arange(int(seconds * RATE)) / RATE
    rhythm = (torch.sin(2 * math.pi * 2 * t) > -.5)
    return .1 * rhythm * sum(torch.sin(2 * math.pi * n * pitch * t) / n for n in range(1, 15))


@pytest.fixture
def extractor(tmp_path):
    transformers_module().Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ctc(tmp_path):
    tr = transformers_module()
    vocab = {c: k for k, c in enumerate(['<pad>', '<s>', '</s>', '<unk>', '|', *'ABCDEFGH'])}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    tokenizer = tr.Wav2Vec2CTCTokenizer(tmp_path / 'vocab.json')
    tr.Wav2Vec2Processor(tr.Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**TINY, vocab_size=len(vocab))).save_pretrained(tmp_path)
    return tmp_path


def whisper(folder, *, multilingual: bool):
    tr = transformers_module()
    letters = [*'abcdefgh', 'Ġ']
    special = ['<|endoftext|>', '<|startoftranscript|>', '<|en|>', '<|transcribe|>', '<|notimestamps|>']
    vocab = {c: k for k, c in enumerate([*letters, *special])}
    tokenizer = tr.WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens(dict(additional_special_tokens=special[1:]))
    ear = tr.WhisperFeatureExtractor(chunk_length=2, feature_size=80)
    tr.WhisperProcessor(ear, tokenizer).save_pretrained(folder)
    end, start, en, transcribe, plain = (vocab[s] for s in special)
    model = tr.WhisperForConditionalGeneration(tr.WhisperConfig(
        vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=100,
        max_target_positions=40, decoder_start_token_id=start, eos_token_id=end, pad_token_id=end,
        bos_token_id=end, begin_suppress_tokens=None))
    spoken = dict(lang_to_id={'<|en|>': en}, task_to_id={'transcribe': transcribe}) if multilingual else {}
    model.generation_config = tr.GenerationConfig(
        decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, bos_token_id=end,
        no_timestamps_token_id=plain, is_multilingual=multilingual, **spoken)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize('multilingual', [False, True])
def test_whisper_writes_letters_and_refuses_what_it_would_cut(tmp_path, multilingual):
    ear = recogniser(whisper(tmp_path, multilingual=multilingual))
    texts = ear.transcribe(WAVES, RATE)
    assert all(set(text) <= set('abcdefgh ') for text in texts)
    assert ear.transcribe(WAVES[1:], RATE) == texts[1:], 'batch mates have no say'
    with pytest.raises(SpeechLossError, match='lasts 3.0 s: Whisper hears 2 s'):
        ear.transcribe([torch.zeros(3 * RATE)], RATE)


def test_a_ctc_model_writes_letters(ctc):
    ear = recogniser(str(ctc))
    texts = ear.transcribe(WAVES, RATE)
    assert all(set(text) <= set('ABCDEFGH |<unk>/s') for text in texts)
    assert [ear.transcribe([w], RATE)[0] for w in WAVES] == texts


def test_models_that_are_no_recogniser(tmp_path, ctc):
    with pytest.raises(SpeechLossError, match="'no/such' cannot be loaded"): recogniser('no/such')
    with pytest.raises(SpeechLossError, match='cannot be loaded'): recogniser(str(tmp_path / 'empty'))
    with pytest.raises(SpeechLossError, match='no trained weights for classifier'): classifier(str(ctc))
    tr = transformers_module()
    tr.BertConfig().save_pretrained(tmp_path / 'bert')
    with pytest.raises(SpeechLossError, match='of type bert'): recogniser(str(tmp_path / 'bert'))


def test_a_head_in_miniature_counts_agreement_or_accuracy(extractor):
    tr = transformers_module()
    labels = {k: f'answer {k}' for k in range(24)}
    config = tr.HubertConfig(**TINY, num_labels=24, id2label=labels, classifier_proj_size=8)
    tr.HubertForSequenceClassification(config).save_pretrained(extractor)
    clips = [dict(id=k, speaker='a', clean=wave) for k, wave in enumerate(WAVES)]
    found = classifier(str(extractor))(WAVES)
    assert set(found) <= set(labels.values())
    for name in ('keyword', 'intent'):
        task = replace(TASKS[name], model=str(extractor))
        rows = judge(WAVES, clips, task)
        assert pool_rates(rows, task) == {f'{name}_accuracy': 1}
        assert {row[f'{name}_truth'] for row in rows} == {'clean wave'}
        rows = judge(WAVES, [clip | {name: 'another'} for clip in clips], task)
        assert pool_rates(rows, task) == {f'{name}_accuracy': 0} and rows[0][f'{name}_truth'] == name
    assert rows[0]['intent_heard'].count(' / ') == 2
    with pytest.raises(SpeechLossError, match='must add up'): classifier(str(extractor), slots=(3, 4))


def test_an_x_vector_head_verifies(extractor):
    tr = transformers_module()
    config = tr.Wav2Vec2Config(**TINY, tdnn_dim=(8, 8), tdnn_kernel=(3, 3), tdnn_dilation=(1, 1),
                               xvector_output_dim=6)
    tr.Wav2Vec2ForXVector(config).save_pretrained(extractor)
    vectors = np.stack(verifier(str(extractor))(WAVES))
    assert vectors.shape == (3, 6) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_a_batch_in_which_everything_goes_wrong():
    clean = [buzz(p) for p in (100, 104, 230, 240, 170)]
    clips = [dict(id=k, speaker=s, snr=5., clean=w, noisy=w, text='go on')
             for k, (w, s) in enumerate(zip(clean, 'aabbc'))]
    jury = Jury(clips, recogniser='pocketsphinx')
    waves = [clean[0], torch.full_like(clean[0], torch.nan), clean[2][:-2000], torch.zeros_like(clean[0]), clean[4]]
    seen = []
    rows = jury(waves, progress=lambda *event: seen.append(event))
    assert [event[1:] for event in seen] == [(k + 1, 20) for k in range(20)] and seen[0][0] == 'recognition'
    good, broken, short, silent, lonely = rows
    assert good['pitch_unlike'] == good['pitch_gross'] == good['voicing_error'] == 0 < good['pitch_voiced']
    assert good['speaker_cosine'] > .5 and len(good['speaker_others']) == 2 and good['words'] == 2
    assert good['recognition_truth'] == 'text' and isinstance(good['recognition_heard'], str)
    assert set(broken['reasons']) == {'wer', 'speaker_cosine', 'vad_f1', 'voicing_error', 'gross_pitch_error'}
    assert broken['words'] is None and math.isnan(broken['wer'])
    assert 'align and cut' in short['reasons']['voicing_error'] and short['words'] == 2
    assert silent['wer'] == 1 and silent['voicing_error'] > .5 and silent['pitch_voiced'] == 0
    assert 'no speaker' in silent['reasons']['speaker_cosine']
    assert 'second clip' in lonely['reasons']['speaker_cosine'] and lonely['voicing_error'] == 0
    assert 'noisy' not in good and good['snr'] == 5
    found = pool_rates(json.loads(json.dumps(rows)))
    assert set(found) == {c for name in DEFAULT_TASKS for c in TASKS[name].columns}
    assert found['wer'] == sum(r['word_errors'] for r in rows if r['words']) / 8
    own = [r['speaker_own'][0] for r in rows if r['speaker_own']]
    others = [s for r in rows if r['speaker_others'] for s in r['speaker_others']]
    assert found['speaker_eer'] == equal_error_rate(own, others)
    best = pool_rates(jury.of_clean())
    assert best['voicing_error'] == best['gross_pitch_error'] == 0


def test_a_clean_wave_that_cannot_be_heard_costs_its_own_row():
    clips = [dict(id=k, speaker='a', clean=buzz(100 + 5 * k)) for k in range(3)]
    clips[1]['clean'] = torch.full((9600,), torch.inf)
    rows = judge([buzz(100)] * 3, clips, ('speaker', 'pitch'))
    assert [bool(row['reasons']) for row in rows] == [False, True, False]
    assert 'infinite' in rows[1]['reasons']['voicing_error']
    assert rows[1]['speaker_cosine'] > .5, 'the enrolment came from the other clips'


def test_words_of_nothing_are_no_rate():
    task = replace(TASKS['recognition'], listener=lambda name: Listener(name, lambda b: [''] * len(b)))
    row, = judge([WAVES[0]], [dict(clean=WAVES[0], speaker='a')], task)
    assert 'holds no word' in row['reasons']['wer'] and math.isnan(pool_rates([row], task)['wer'])


def test_names_models_and_the_table():
    assert task_cards('recognition', 'elsewhere')[0].model == 'elsewhere'
    assert task_cards(['pitch', TASKS['speaker']])[1] is TASKS['speaker']
    with pytest.raises(SpeechLossError, match="task 'asr' is unknown: choose one of recognition"): task_cards('asr')
    assert len(task_table().splitlines()) == len(TASKS) + 2
    columns = [c for t in TASKS.values() for c in (*t.columns, *t.counts)]
    assert len(set(columns)) == len(columns)
    assert {way for t in TASKS.values() for way in t.columns.values()} == {'higher', 'lower'}
    assert all(set(t.of_a_set) <= set(t.columns) for t in TASKS.values())


def test_a_missing_package_is_one_sentence(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'pocketsphinx', None)
    with pytest.raises(SpeechLossError, match=r"needs pocketsphinx: pip install '\.\[downstream\]'"):
        Jury([dict(clean=WAVES[0], speaker='a')], recogniser='pocketsphinx')(WAVES[:1])


@given(st.lists(st.sampled_from('abc'), max_size=6), st.lists(st.sampled_from('abc'), min_size=1, max_size=6))
def test_word_errors_are_a_distance_of_words(heard, said):
    heard, said = ([f'{c}x' for c in words] for words in (heard, said))
    errors, words = word_errors(' '.join(heard), ' '.join(said))
    assert words == len(said) and abs(len(heard) - len(said)) <= errors <= max(len(heard), len(said))
    assert (errors == 0) == (heard == said)


@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=30),
       st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=30))
def test_the_equal_error_rate_is_a_rate_and_has_a_mirror_image(targets, impostors):
    rate = equal_error_rate(targets, impostors)
    assert 0 <= rate <= 1
    flipped = equal_error_rate([-x for x in impostors], [-x for x in targets])
    assert rate == pytest.approx(flipped, abs=.5 / min(len(targets), len(impostors)) + 1e-9)
    assert equal_error_rate([x + 3 for x in targets], impostors) == 0


def test_pitch_counts_by_hand():
    clean = np.array([[100, 100, 100, 100.], [.9, .9, .9, .1]])
    heard = np.array([[100, 125, 119, 300.], [.9, .9, .1, .9]])
    assert pitch_counts(heard, clean) == dict(pitch_frames=4, pitch_unlike=2, pitch_voiced=2, pitch_gross=1)


def test_waves_are_resampled_for_every_judge():
    ear = Listener('length', lambda batch: [batch.shape[1]] * len(batch))
    assert ear(torch.zeros(2, 8000), 8000) == [16_000] * 2
    assert mono_16k(torch.zeros(800, dtype=torch.float64), 8000).dtype == torch.float32


def test_probe_of_frames_falls_when_the_wave_changes():
    mels = MelFeatures(sample_rate=RATE)
    waves = [buzz(p) for p in (100, 110, 220, 240)]
    kinds = ['low', 'low', 'high', 'high']
    frames = frames_of(mels, waves)
    clips = [dict(id=k, speaker='a', clean=w, register=np.array([kind] * len(f), dtype=object))
             for k, (w, kind, f) in enumerate(zip(waves, kinds, frames))]
    probe = fit_probe(np.concatenate(frames), np.concatenate([c['register'] for c in clips]))
    task = probe_task(probe, mels, 'register', by_frame=True)
    jury = Jury(clips, task)
    kept, lost = (pool_rates(jury(w), task)['register_probe_accuracy'] for w in (waves, waves[::-1]))
    assert kept > .7 > .3 > lost
    speaker = fit_probe([pooled_frames(f) for f in frames], kinds)
    assert speaker.predict([pooled_frames(frames[0])]).tolist() == ['low']


def test_phones_of_nothing_are_none():
    assert phone_segments([torch.zeros(RATE // 2)], texts=['one hundred thousand times over and over']) == [[]]
    assert frame_labels([], 3).tolist() == ['', '', '']


def cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    return isinstance(try_to_load_from_cache(name, 'model.safetensors'), str)


@pytest.mark.slow
def test_the_real_whisper_reads_a_real_voice():
    from speechloss.corpora.corpus import local_folders
    name = 'openai/whisper-tiny.en'
    if not cached(name) or not local_folders()['laptop']: pytest.skip('needs the model and the corpus')
    from speechloss.reproduce import corpus_of, protocol_of, test_clips
    scale = protocol_of('laptop')
    clip = next(c for c in test_clips(scale, corpus_of(scale)) if c['id'] == '1688-142285-0004')
    text, = recogniser(name).transcribe([clip['clean']])
    errors, words = word_errors(text, 'his statement of having been a shop boy was the thing I liked best of all')
    assert errors <= 1 and words == 16
    phones = phone_segments([clip['clean']], texts=[text])[0]
    assert len({p.label for p in phones}) > 15 and phones[-1].end <= 4.01
