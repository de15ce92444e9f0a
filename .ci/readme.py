"""README.md from the executed front page."""
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from pages import INDEX, ROOT, filtered, shown
from running import run


def write(nb, path):
    "Save a notebook as `nbdev_clean` leaves it"
    from execnb.nbio import write_nb
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.execution_count = None
    write_nb(nb, path)
    clean = Path(sys.executable).with_name('nbdev_clean')
    subprocess.run([clean, '--fname', path], check=True, cwd=path.parent)


def text(path):
    "The executed front page as markdown, its links seen from the root"
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    hide = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['hide_input']))
    body, resources = MarkdownExporter(config=hide).from_notebook_node(shown(filtered(path)))
    if resources['outputs']:
        raise SystemExit('README: an output of the front page is a picture; refer to a file instead')

    def from_root(match):
        url = urlsplit(match[2])
        if url.scheme or not url.path: return match[0]
        path = os.path.normpath(os.path.join('nbs', url.path))
        if path.endswith('.html'): path = path.removesuffix('.html') + '.ipynb'    # a name that nbdev linked
        return f'{match[1]}{path}{match[3]}'
    body = re.sub(r'(\]\()([^)\s]+)(\))', from_root, body)
    body = re.sub(r'((?:src|href)=")([^"]+)(")', from_root, body)
    body = re.sub(r'<!-- WARNING.*?-->', f'<!-- made from {INDEX} by `make readme` -->', body)
    return re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def make(root=ROOT):
    "Run the front page and write README.md"
    write(run(root/INDEX), root/INDEX)
    (root/'README.md').write_text(text(root/INDEX), encoding='utf-8')
