"""Packaging. The name and version come from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

# The losses need these three alone.
core = ['torch>=2.4', 'numpy', 'soundfile>=0.12', 'filelock']
# The command, the enhancer and VQScore: nothing that has to be compiled.
enhance = ['safetensors', 'soxr', 'typer', 'rich', 'huggingface_hub', 'scipy']
metrics = [*enhance, 'pesq>=0.0.4', 'pystoi>=0.4', 'speechmos>=0.0.1.1', 'onnxruntime', 'librosa', 'torchmetrics',
           'pyarrow', 'matplotlib']
train = [*enhance, 'accelerate>=1.0', 'tensorboard', 'pyroomacoustics', 'tqdm']
ssl = ['transformers>=4.56', 'torchaudio']
# Judges, each with its weights inside; resemblyzer reads pkg_resources, which setuptools 81 dropped.
downstream = [*ssl, 'jiwer', 'pocketsphinx>=5', 'resemblyzer', 'setuptools<81', 'silero-vad>=6', 'onnxruntime',
              'torchcrepe', 'librosa<1', 'scikit-learn', 'soxr']
codec = ['lameenc>=1.7', 'safetensors']
onnx = ['onnx', 'onnxscript', 'onnxruntime']    # to write an enhancer's step as a graph, and to run it
mos = ['distillmos>=0.9.1', 'torchaudio']   # opinions guessed by a network, whose weights are in the package
visqol = ['visqol-python>=3.8', 'numba', 'soxr']   # a part of it is compiled as it is installed: not in any other extra
reproduce = [*metrics, *train, *downstream, *codec, 'papermill>=2.6', 'ipykernel', 'pandas']
docs = ['nbdev>=2.4.14,<3', 'execnb<0.2', 'fastcore<2', 'ghapi<2', 'pypandoc-binary']
dev = [*reproduce, *docs, *onnx, *mos, 'pytest', 'pytest-xdist', 'hypothesis', 'ruff', 'mypy', 'pre-commit', 'jupyterlab',
       'auraloss', 'vector-quantize-pytorch', 'build', 'lightning', 'playwright',
       'triton; platform_system == "Linux"']   # a torch for GPUs brings it; for the CPU it runs the kernels' interpreter

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8') if (here / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    keywords=cfg['keywords'].split(),
    python_requires='>=' + cfg['min_python'],
    # The kernels and the paper notebooks live in folders of their own and install inside the package.
    packages=[*find_packages(include=['speechloss', 'speechloss.*']), 'speechloss.kernels', 'speechloss.papers'],
    package_dir={'speechloss.kernels': 'kernels', 'speechloss.papers': 'nbs/papers'},
    package_data={'speechloss': ['py.typed', 'data/*', 'data/*/*'], 'speechloss.papers': ['*.ipynb', '*.toml']},
    install_requires=core,
    extras_require=dict(enhance=enhance, metrics=metrics, reproduce=reproduce, ssl=ssl, downstream=downstream,
                        codec=codec, visqol=visqol, mos=mos, onnx=onnx, docs=docs, dev=dev),
    # By the second, nbdev links names in prose to the pages of the site.
    entry_points=dict(console_scripts=['speechloss = speechloss.__main__:main'],
                      nbdev=['speechloss = speechloss._modidx:d']),
    zip_safe=False,
)
