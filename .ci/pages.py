"""What the site is made of: the list of pages, and each page as it is handed on to be shown."""
import hashlib
import html
import importlib
import inspect
import io
import json
import os
import re
import shutil
import warnings
from base64 import b64decode
from pathlib import Path

import nbformat
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
INDEX = 'nbs/index.ipynb'
NOT_COPIED = ('.git', '.venv', '.cache', 'runs', 'build', 'dist', '_site', '.quarto',
              '__pycache__', '*.egg-info', '.*_cache', '.hypothesis', '.ipynb_checkpoints')


# --- the list ---

def config(root=ROOT):
    "The content of `_quarto.yml`"
    return yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))


def pages(root=ROOT):
    "Every page of the site, as paths from the root"
    return config(root)['project']['render']


def address(page):
    "Where a page is in the site, as a path from its root"
    return Path(page).with_suffix('.html').as_posix()


def menu(items):
    "Every file named in a (nested) sidebar"
    for item in items:
        if isinstance(item, str): yield item
        else:
            if 'href' in item: yield item['href']
            yield from menu(item.get('contents', []))


def notebooks(root=ROOT):
    "Every notebook of the repository, as paths from the root"
    found = (root/'nbs').rglob('*.ipynb')
    return sorted(p.relative_to(root).as_posix() for p in found
                  if '.ipynb_checkpoints' not in p.parts)


def structure(root=ROOT):
    "What is wrong with the list of pages: a sentence each"
    render, site = pages(root), config(root)['website']
    named = [*menu(site['sidebar']['contents']), *menu(site['navbar'].get('left', []))]
    for page in sorted({*render, *named}):
        if not (root/page).is_file(): yield f'_quarto.yml names {page}, which does not exist'
    for page in sorted(set(named) - set(render)):
        yield f'_quarto.yml shows {page} in its menus and does not render it'
    for page in sorted(set(render) - set(named)):
        yield f'_quarto.yml renders {page}, and no menu leads to it'
    for notebook in notebooks(root):
        if notebook not in render: yield f'_quarto.yml does not know {notebook}'


def copy(dst, root=ROOT):
    "A copy of the sources, without what is built from them"
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    return Path(shutil.copytree(root, dst, ignore=ignore, dirs_exist_ok=True))


# --- one page ---

def directive(cell, name):
    "The value of `#| name: value`, None where it is not said"
    found = re.search(rf'^#\| *{name}: *(.*?) *$', cell.source, re.M)
    return found and (json.loads(found[1]) if found[1].startswith('"') else found[1])


def linked(text, page):
    """With the names that nbdev linked seen from this page, and fewer of them.

    A single lower-case word in backticks is oftener a value than a function; methods have no heading
    of their own and lead to their class.
    """
    from nbdev.config import get_config
    cfg = get_config()
    base = re.escape(f'{cfg.doc_host}{cfg.doc_baseurl}/')

    def turned(match):
        name, path, heading = match.groups()
        if re.fullmatch(r'_.*|[a-z0-9]+', name): return f'`{name}`'
        return f"[`{name}`]({os.path.relpath(f'nbs/{path}', Path(page).parent)}#{heading.split('.')[0]})"
    return re.sub(rf'\[`([^`]+)`\]\({base}([\w/]+\.html)#([^)]*)\)', turned, text)


def documented(text):
    """The Markdown of `show_doc` as a page shows it: examples and options of docstrings are code.

    In a block of code (a signature with its comments) a link would show its own markup.
    """
    text = re.sub(r'^>>> .*(?:\n.+)*', r'```python\n\g<0>\n```', text, flags=re.M)
    parts = re.split(r'^(```.*?^```$)', text, flags=re.M | re.S)
    parts[::2] = [re.sub(r'(`[^`]*`)|(?<![\w-])--[a-z][\w-]*', lambda m: m[1] or f'`{m[0]}`', prose)
                  for prose in parts[::2]]
    parts[1::2] = [re.sub(r'\[(`[^`\n]+`)\]\([^)\n]*\)', r'\1', code) for code in parts[1::2]]
    return ''.join(parts)


def thing_of(nb, cell):
    "What a cell of `show_doc` documents: the name in the module that the notebook exports, None where it is not there"
    found = (re.search(r'^#\| *default_exp +(\S+)', ''.join(c['source']), re.M) for c in nb['cells'])
    module = next((m[1] for m in found if m), None)
    name = re.search(r'show_doc\(([\w.]+)', ''.join(cell['source']))
    if not module or not name: return None
    thing = importlib.import_module(f'speechloss.{module}'.removesuffix('.__init__'))
    for part in name[1].split('.'): thing = getattr(thing, part, None)
    return thing


def signed(text, thing):
    """The Markdown of `show_doc` with a class called a class, the fields of a named tuple, and the source where it is.

    nbdev writes `def Name(*args, **kwargs)` for every class without an `__init__` of its own, and finds the source by
    the bare name, which two modules may share.
    """
    if inspect.isclass(thing):
        name = thing.__name__
        if hasattr(thing, '_fields'):
            fields = [line.strip() for line in inspect.getsource(thing).splitlines()
                      if line.strip().split(':')[0] in thing._fields]
            text = re.sub(rf'^def {name}\(\n.*?^\):$', lambda m: '\n    '.join([f'class {name}(NamedTuple):', *fields]),
                          text, count=1, flags=re.M | re.S)
        text = re.sub(rf'^def {name}\(\n    \*args, \*\*kwargs\n\):$', f'class {name}', text, count=1, flags=re.M)
        text = re.sub(rf'^def {name}\((.*?)^\):?(?=$|->)', rf'class {name}(\1)', text, count=1, flags=re.M | re.S)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        try: file, line = Path(inspect.getsourcefile(inspect.unwrap(thing))), inspect.getsourcelines(thing)[1]
        except (OSError, TypeError): return text
        if file.is_relative_to(ROOT):
            here = f'{file.relative_to(ROOT).as_posix()}#L{line}'
            text = re.sub(r'(\[source\]\([^)]*/blob/[^/]*/)[^)]*\)', rf'\g<1>{here})', text, count=1)
    return text


CHAPTERS = '<!-- the site lists the modules here -->'


def chapters(page, root=ROOT):
    """The modules of a package as a table of Markdown, in the order of the menu.

    What a module does is the line below the title of its notebook, which is its docstring too; what is public
    is what the notebook of the package, `page`, imports.
    """
    from speechloss._modidx import d as index
    folder = Path(page).parent
    imports = '\n'.join(c.source for c in nbformat.read(root/page, as_version=4).cells
                        if c.source.startswith('#| export'))
    lines = ['| module | what it does | public names |', '| --- | --- | --- |']
    for chapter in pages(root):
        if Path(chapter).parent != folder or chapter == page: continue
        nb = nbformat.read(root/chapter, as_version=4)
        does = next((m[1] for c in nb.cells if (m := re.search(r'^> (.*)$', c.source, re.M))), '')
        module = f'speechloss.{folder.name}.{Path(chapter).stem}'
        found = index['syms'].get(module, {})
        names = public_names(imports, module)
        shown_names = [f'[`{n}`]({Path(chapter).stem}.ipynb#{n.lower()})' if f'{module}.{n}' in found else f'`{n}`'
                       for n in names]
        lines.append(f'| [{Path(chapter).stem}]({Path(chapter).name}) | {does} | {", ".join(shown_names)} |')
    return '\n'.join(lines)


def public_names(code, module):
    "What the code imports from a module"
    found = re.findall(rf'^ *from {re.escape(module)} import (\([^)]*\)|.*)$', code, re.M)
    return [name for names in found for name in re.findall(r'\w+', names)]


def filtered(path, page=INDEX):
    "The notebook as `nbdev_filter` hands it to Quarto: exports as documentation, names linked"
    from nbdev.cli import nbdev_filter
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nb = json.loads(linked(nbdev_filter(fname=str(path), printit=False), page))
        source = json.loads(Path(path).read_text(encoding='utf-8'))    # the filter drops the name of the module
    for cell in nb['cells']:
        if 'show_doc(' in ''.join(cell['source']):
            for data in (output['data'] for output in cell['outputs']):
                data['text/markdown'] = documented(signed(''.join(data['text/markdown']), thing_of(source, cell)))
        if CHAPTERS in ''.join(cell['source']):
            cell['source'] = ''.join(cell['source']).replace(CHAPTERS, chapters(page))
        for key in set(cell) - {'cell_type', 'id', 'metadata', 'source', 'outputs'}: cell.pop(key)
        if cell['cell_type'] != 'code': continue
        cell['execution_count'] = None
        cell['outputs'] = [o for o in cell.get('outputs', []) if o.get('name') != 'stderr']
        for output in cell['outputs']:
            output.pop('execution_count', None)
            if output['output_type'] == 'execute_result': output['output_type'] = 'display_data'
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    nbformat.validate(nb)
    nb.metadata['language_info'] = {'name': 'python'}
    return nb


def lighter(png, most=150_000):
    "A large picture (a spectrogram) with 256 colours, which the eye does not miss"
    if len(png) <= most: return png
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert('RGB').quantize(256).save(out, 'PNG', optimize=True)
    return min(png, out.getvalue(), key=len)


def outputs_as_pages_have_them(nb, folder):
    """Each picture as a file in `folder`, with its alt text; HTML as a raw block of Markdown.

    Quarto takes any output of HTML for a widget, and has the page load two scripts from the network.
    """
    for cell in nb.cells:
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'image/png' in data:
                about = output.metadata.get('image/png', {})
                data['text/html'] = picture(data['image/png'], about, directive(cell, 'fig-alt'), folder)
            if 'text/html' in data:
                output.data, output.metadata = {'text/markdown': f'```{{=html}}\n{data["text/html"]}\n```'}, {}
    return nb


def picture(data, about, alt, folder):
    "Save a picture: the tag that shows it"
    png = lighter(b64decode(data))
    file = folder/f'{hashlib.sha256(png).hexdigest()[:16]}.png'
    folder.mkdir(exist_ok=True)
    file.write_bytes(png)
    width = f' width="{about["width"]}"' if 'width' in about else ''
    return f'<img src="{folder.name}/{file.name}" alt="{html.escape(about.get("alt") or alt or "")}"{width}>'


def shown(nb):
    "Without the sources that `echo: false` hides, those that `code-fold` folds marked, without the other directives"
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        if directive(cell, 'echo') == 'false': cell.metadata['tags'] = ['hide_input']
        elif directive(cell, 'code-fold') == 'true': cell.metadata['tags'] = ['fold_input']
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return nb
