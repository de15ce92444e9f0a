"""README and site from the notebooks.

pages.py readme   run nbs/index.ipynb, keep its outputs, write README.md
pages.py check    can every page of _quarto.yml be shown, and does every link lead somewhere?
pages.py site     check, then build the site with Quarto where it is installed
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pypandoc
import yaml

ROOT = Path(__file__).resolve().parents[1]
INDEX = 'nbs/index.ipynb'
NOT_COPIED = ('.git', '.venv', '.cache', 'runs', 'build', 'dist', '_site', '.quarto',
              '__pycache__', '*.egg-info', '.*_cache', '.hypothesis', '.ipynb_checkpoints')


# --- what the site is made of ---

def config(root=ROOT):
    "The content of `_quarto.yml`"
    return yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))


def pages(root=ROOT):
    "Every page of the site, as paths from the root"
    return config(root)['project']['render']


def sidebar(items):
    "Every file named in a (nested) sidebar"
    for item in items:
        if isinstance(item, str): yield item
        elif 'href' in item: yield item['href']
        else: yield from sidebar(item.get('contents', []))


def notebooks(root=ROOT):
    "Every notebook of the repository, as paths from the root"
    found = (root/'nbs').rglob('*.ipynb')
    return sorted(p.relative_to(root).as_posix() for p in found
                  if '.ipynb_checkpoints' not in p.parts)


def copy(dst, root=ROOT):
    "A copy of the sources, without what is built from them"
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    return Path(shutil.copytree(root, dst, ignore=ignore, dirs_exist_ok=True))


# --- one page ---

def filtered(path):
    "The notebook as `nbdev_filter` hands it to Quarto"
    from nbdev.cli import nbdev_filter
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nb = json.loads(nbdev_filter(fname=str(path), printit=False))
    for cell in nb['cells']:
        extra = set(cell) - {'cell_type', 'id', 'metadata', 'source', 'outputs'}
        for key in extra: cell.pop(key)
        if cell['cell_type'] != 'code': continue
        cell['execution_count'] = None
        for output in cell.setdefault('outputs', []):
            output.pop('execution_count', None)
            if output['output_type'] == 'execute_result': output['output_type'] = 'display_data'
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    nbformat.validate(nb)
    nb.metadata['language_info'] = {'name': 'python'}
    return nb


def shown(nb):
    "Without the sources that `echo: false` hides, and without the other directives"
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        if re.search(r'^#\| *echo: *false', cell.source, re.M):
            cell.metadata['tags'] = ['hide_input']
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return nb


def html(path, media):
    "The page as pandoc shows it"
    options = [f'--extract-media={media}', '--mathml', '--fail-if-warnings', '--wrap=none']
    if path.suffix != '.ipynb':
        return pypandoc.convert_file(str(path), 'html', format='gfm', extra_args=options)
    nb = shown(filtered(path))
    for cell in nb.cells:
        if 'hide_input' in cell.metadata.get('tags', ()): cell.source = ''
    return pypandoc.convert_text(nbformat.writes(nb), 'html', format='ipynb', extra_args=options)


class Links(HTMLParser):
    "The links, pictures and anchors of a page"
    def __init__(self, text):
        super().__init__()
        self.to, self.anchors, self.headings = [], set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'a' and attrs.get('href'): self.to.append(attrs['href'])
        if tag in ('img', 'audio', 'source') and attrs.get('src'): self.to.append(attrs['src'])
        if attrs.get('id'): self.anchors.add(attrs['id'])
        self.headings += tag == 'h1'


# --- the whole site ---

def structure(root=ROOT):
    "What is wrong with the list of pages: a sentence each"
    render, cfg = pages(root), config(root)['website']
    named = [*sidebar(cfg['sidebar']['contents']), *sidebar(cfg['navbar'].get('left', []))]
    for page in sorted({*render, *named}):
        if not (root/page).is_file(): yield f'_quarto.yml names {page}, which does not exist'
    for page in sorted(set(named) - set(render)):
        yield f'_quarto.yml shows {page} in its menus and does not render it'
    for page in sorted(set(render) - set(named)):
        yield f'_quarto.yml renders {page}, and no menu leads to it'
    for notebook in notebooks(root):
        if notebook not in render: yield f'_quarto.yml does not know {notebook}'


def own_page(url, root=ROOT):
    "The source of a page of our own site, None for another address"
    base = config(root)['website']['site-url'].rstrip('/') + '/'
    if not url.startswith(base): return None
    place = urlsplit(url[len(base):]).path
    return next((p for p in pages(root) if Path(p).with_suffix('.html') == Path(place)), place)


def broken(page, text, root=ROOT, anchors=None):
    "Links of a page that lead nowhere: a sentence each"
    links, render = Links(text), set(pages(root))
    for url in links.to:
        parts = urlsplit(url)
        if own := own_page(url, root): target = own
        elif parts.scheme or parts.netloc or url.startswith('data:'): continue
        elif not parts.path: target = page
        else: target = os.path.normpath(Path(page).parent/unquote(parts.path))
        if Path(target).is_absolute():
            if not Path(target).exists(): yield f'{page}: no file for {url}'
        elif not (root/target).exists(): yield f'{page}: {url} leads to no file'
        elif target not in render and Path(target).suffix in ('.ipynb', '.md', '', '.py'):
            yield f'{page}: {url} is not a page of the site, link to the repository instead'
        elif parts.fragment and anchors and parts.fragment not in anchors[target]:
            yield f'{page}: {url} names a heading that is not there'


def problems(root=ROOT):
    "Everything that is wrong with the site: a sentence each"
    wrong = list(structure(root))
    if wrong: return wrong
    with tempfile.TemporaryDirectory() as media:
        texts = {}
        for page in pages(root):
            try: texts[page] = html(root/page, media)
            except Exception as error:  # nbdev and pandoc raise what they like
                wrong.append(f'{page}: cannot be shown ({error.__cause__!r}). The documentation '
                             'runs the cells that import or export, and only those: give imports '
                             f'a cell of their own. {error}')
        parsed = {page: Links(text) for page, text in texts.items()}
        anchors = {page: links.anchors for page, links in parsed.items()}
        for page, text in texts.items():
            if not parsed[page].headings: wrong.append(f'{page}: no title')
            if page.endswith('.ipynb') and re.search(r'#\|\s*(hide|export|default_exp)', text):
                wrong.append(f'{page}: a directive is visible')
            wrong += broken(page, text, root, anchors)
    return wrong


# --- the commands ---

def execute(path, root=ROOT):
    "Run a notebook, leaving out the cells that `nbdev_test` leaves out"
    from nbclient import NotebookClient
    from nbdev.config import get_config
    nb = nbformat.read(path, as_version=4)
    flags = '|'.join([r'eval: *false', *get_config().tst_flags.split()])
    left_out = [c for c in nb.cells
                if c.cell_type == 'code' and re.search(rf'^#\| *({flags})\b', c.source, re.M)]
    for cell in left_out: cell.cell_type = 'raw'
    client = NotebookClient(nb, timeout=600, kernel_name='python3',
                            extra_arguments=['--log-level=ERROR'],
                            resources={'metadata': {'path': str(root/'nbs')}})
    client.execute()
    for cell in left_out: cell.cell_type = 'code'
    return nb


def write(nb, path):
    "Save a notebook as `nbdev_clean` leaves it"
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        for output in cell.outputs:
            if 'execution_count' in output: output.execution_count = None
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python',
                                  'name': 'python3'}}
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n',
                    encoding='utf-8')
    clean = Path(sys.executable).with_name('nbdev_clean')
    subprocess.run([clean, '--fname', path], check=True, cwd=path.parent)


def readme_text(path):
    "The executed front page as markdown, its links seen from the root"
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    hide = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['hide_input']))
    text, resources = MarkdownExporter(config=hide).from_notebook_node(shown(filtered(path)))
    if resources['outputs']: raise SystemExit('README: no pictures in the outputs, please')

    def from_root(match):
        url = match[2]
        if urlsplit(url).scheme or url.startswith('#'): return match[0]
        return f'{match[1]}({os.path.normpath(os.path.join("nbs", url))})'
    text = re.sub(r'(\])\(([^)\s]+)\)', from_root, text)
    text = re.sub(r'<!-- WARNING.*?-->', f'<!-- made from {INDEX} by `make readme` -->', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def readme():
    write(execute(ROOT/INDEX), ROOT/INDEX)
    (ROOT/'README.md').write_text(readme_text(ROOT/INDEX), encoding='utf-8')


def check():
    if wrong := problems(): raise SystemExit('\n'.join(wrong))
    print(f'{len(pages())} pages can be shown, and their links lead somewhere.')


def site():
    check()
    if not shutil.which('quarto'):
        return print('The site itself is built by Quarto, which is not on the PATH: get it from '
                     'https://quarto.org/docs/get-started/ and run `make docs` again.')
    place = ROOT/'build/site'
    shutil.rmtree(place, ignore_errors=True)
    copy(place, ROOT)
    for page in pages(ROOT):  # the pictures of the chapters are drawn now, and never committed
        nb = nbformat.read(place/page, 4) if page.endswith('.ipynb') else None
        if nb and '#| default_exp' in str(nb): nbformat.write(execute(place/page, place), place/page)
    subprocess.run(['quarto', 'render', place], check=True)
    shutil.rmtree(ROOT/'_site', ignore_errors=True)
    shutil.move(place/'_site', ROOT/'_site')
    print('The site is in _site: open _site/index.html')


if __name__ == '__main__':
    commands = dict(readme=readme, check=check, site=site)
    if len(sys.argv) != 2 or sys.argv[1] not in commands: raise SystemExit(__doc__)
    commands[sys.argv[1]]()
