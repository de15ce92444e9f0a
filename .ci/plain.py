"""The site without Quarto: every page of its navigation by pandoc, in one plain frame, with no search."""
import html
import os
import re
import shutil
from pathlib import Path

import nbformat
import pypandoc

from pages import address, config, shown

FRAME = (Path(__file__).parent/'plain.html').read_text(encoding='utf-8')
OPTIONS = ['--mathml', '--wrap=none', '--syntax-highlighting=none', '--fail-if-warnings']


def parts(cell):
    "A cell with its outputs as cells: of those in Markdown pandoc makes nothing"
    if cell.cell_type != 'code':
        yield cell
        return
    new = nbformat.v4
    if 'hide_input' not in cell.metadata.get('tags', ()): yield new.new_code_cell(cell.source)
    for output in cell.outputs:
        if words := output.get('data', {}).get('text/markdown'): yield new.new_markdown_cell(words)
        else: yield new.new_code_cell(outputs=[output])


def body(path):
    "The page as pandoc shows it"
    if path.suffix != '.ipynb':
        return pypandoc.convert_file(str(path), 'html', format='gfm', extra_args=OPTIONS)
    nb = shown(nbformat.read(path, as_version=4))
    nb.cells = [part for cell in nb.cells for part in parts(cell)]
    text = pypandoc.convert_text(nbformat.writes(nb), 'html', extra_args=OPTIONS,
                                 format='ipynb+raw_attribute+markdown_in_html_blocks')
    return text.replace('<pre class="python"><code></code></pre>\n', '')    # of outputs alone


def title(text):
    "The words of the first heading"
    found = re.search(r'<h1[^>]*>(.*?)</h1>', text, re.S)
    return html.unescape(re.sub(r'<[^>]+>', '', found[1])) if found else 'speechloss'


def linked(text):
    "With the links to pages turned to what they become"
    return re.sub(r'href="(?!\w+:)([^"#]+)\.(?:ipynb|md)(#[^"]*)?"',
                  lambda m: f'href="{m[1]}.html{m[2] or ""}"', text)


def navigation(items, page, titles):
    "The sidebar as seen from `page`, open where the page is"
    lines = []
    for item in items:
        if isinstance(item, dict) and 'contents' in item:
            inner = navigation(item['contents'], page, titles)
            opened = ' open' if 'aria-current' in inner else ''
            lines.append(f'<li><details{opened}><summary>{item["section"]}</summary>{inner}</details></li>')
            continue
        href, words = (item, titles[item]) if isinstance(item, str) else (item['href'], item['text'])
        here = ' aria-current="page"' if href == page else ''
        to = os.path.relpath(address(href), Path(page).parent)
        lines.append(f'<li><a href="{to}"{here}>{html.escape(words)}</a></li>')
    return f'<ul>{"".join(lines)}</ul>'


def framed(**words):
    "The words in the frame of every page"
    return re.sub(r'\{\{(\w+)\}\}', lambda m: words[m[1]], FRAME)


def render(place):
    "The sources in `place`, filtered already, as a site in `place/_site`"
    site, cfg = place/'_site', config(place)
    bodies = {page: body(place/page) for page in cfg['project']['render']}
    titles, home = {page: title(text) for page, text in bodies.items()}, address(next(iter(bodies)))
    for page, text in bodies.items():
        out = site/address(page)
        out.parent.mkdir(parents=True, exist_ok=True)
        def seen(path, here=Path(page).parent): return os.path.relpath(path, here)
        out.write_text(framed(title=html.escape(titles[page]), css=seen('nbs/site.css'), icon=seen('nbs/favicon.svg'),
                              home=seen(home), body=linked(text),
                              menu=navigation(cfg['website']['sidebar']['contents'], page, titles)), encoding='utf-8')
    for pattern in cfg['project']['resources']:
        for file in place.glob(pattern):
            to = site/file.relative_to(place)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
