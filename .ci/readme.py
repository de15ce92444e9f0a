"""README.md from the executed front page."""
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from pages import INDEX, ROOT, config, filtered, shown
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
    "The executed front page as markdown, its links to the site, to be read on GitHub and PyPI alike"
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    hide = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['hide_input']))
    body, resources = MarkdownExporter(config=hide).from_notebook_node(shown(filtered(path)))
    if resources['outputs']:
        raise SystemExit('README: an output of the front page is a picture; refer to a file instead')
    body = re.sub(r'<audio[^>]*>(.*?)</audio>', r'<div>\1</div>', body)    # both show no players
    body = re.sub(r'(\]\()([^)\s]+)(\))', absolute, body)
    body = re.sub(r'((?:src|href)=")([^"]+)(")', absolute, body)
    body = re.sub(r'<!-- WARNING.*?-->', f'<!-- made from {INDEX} by `make readme` -->', body)
    return re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def absolute(match):
    "A link of the front page with its address: pages and files on the site, the text of the repository on GitHub"
    url, site = urlsplit(match[2]), config()['website']
    if url.scheme or not url.path: return match[0]
    path = os.path.normpath(os.path.join('nbs', url.path))
    base = f'{site["repo-url"]}/blob/main' if path.endswith('.md') else site['site-url']
    path = re.sub(r'\.ipynb$', '.html', path) + (f'#{url.fragment}' if url.fragment else '')
    return f'{match[1]}{base}/{path}{match[3]}'


def make(root=ROOT):
    "Run the front page and write README.md"
    write(run(root/INDEX), root/INDEX)
    (root/'README.md').write_text(text(root/INDEX), encoding='utf-8')
