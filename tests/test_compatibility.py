"""What was made before the code was put into packages still serves: keys, saved networks, operators, kept runs."""
import json
from pathlib import Path

import pytest
import torch

from speechloss.features import CodecFeatures, VQFeatures
from speechloss.models import load_enhancer
from speechloss.reproduce import protocol_of, shared_recipe
from speechloss.training import CodecTraining, Pretraining, Recipe, VQTraining

BEFORE = Path(__file__).parent / 'data/before_packages'
RECORD = json.loads((BEFORE / 'record.json').read_text(encoding='utf-8'))
WAVE = torch.sin(torch.arange(4096) * .05)[None] * .3

TERMS = dict(
    ssl=dict(name='ssl', layers='later'), ssl_random=dict(name='ssl', random_seed=0), codec=dict(name='codec'),
    codec_r=dict(name='codec', random_seed=0), vq=dict(name='vq'), vq_r=dict(name='vq', random_seed=1),
    contrastive=dict(name='contrastive'), contrastive2=dict(name='contrastive', features='vq'),
    mal=dict(name='model_as_loss', rule='dynamic'), mrstft=dict(name='multi_resolution_stft'))


def recipes() -> dict[str, Recipe]:
    "Recipes whose keys were recorded"
    shared = {f'stage1/{scale}': shared_recipe(protocol_of(scale), 0) for scale in ('smoke', 'laptop', 'paper')}
    terms = {f'term/{name}': Recipe(objective=dict(terms=dict(x=term))) for name, term in TERMS.items()}
    return shared | terms | dict(vq=VQTraining().recipe(), codec=CodecTraining().recipe(), pre0=Pretraining().round(0))


def test_recipes_have_the_keys_they_had():
    "A trained model lies in the cache under the key of its recipe: another key would train it anew"
    assert {name: recipe.key for name, recipe in recipes().items()} == RECORD['keys']


@pytest.mark.parametrize('kind, seen', [
    ('enhancer', lambda folder: load_enhancer(folder)(WAVE).square().mean()),
    ('codec', lambda folder: CodecFeatures(str(folder))(WAVE)[0].abs().mean()),
    ('vqvae', lambda folder: VQFeatures(str(folder))(WAVE)[-1].abs().mean())])
def test_saved_networks_open_and_give_what_they_gave(kind, seen):
    with torch.no_grad(): assert float(seen(BEFORE / kind)) == pytest.approx(RECORD['values'][kind], rel=1e-5)


def test_operators_have_the_names_they_had():
    "Compiled graphs and profiles hold them"
    import speechloss.kernels  # noqa: F401
    for name in ('contrastive', 'contrastive_backward', 'info_nce', 'info_nce_backward', 'nearest_index',
                 'stft_distance', 'stft_distance_backward', 'token_loss', 'token_loss_backward'):
        assert hasattr(torch.ops.speechloss, name)
