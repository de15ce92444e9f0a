"""The site without Quarto: every page of its navigation by pandoc, in one plain frame, with a small search."""
import html
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pypandoc

from pages import address, config, shown

FRAME = (Path(__file__).parent/'plain.html').read_text(encoding='utf-8')
OPTIONS = ['--mathml', '--wrap=none', '--syntax-highlighting=pygments', '--fail-if-warnings']

FOLDED = '<details class="folded"><summary>Code</summary>\n\n~~~~~~ python\n{}\n~~~~~~\n\n</details>'

EMPTY = re.compile(r'<div class="sourceCode"><pre\s+class="sourceCode python"><code\s+class="sourceCode python">'
                   r'</code></pre></div>\n?')    # of outputs alone


def parts(cell):
    "A cell with its outputs as cells: of those in Markdown pandoc makes nothing"
    if cell.cell_type != 'code':
        yield cell
        return
    new = nbformat.v4
    tags = cell.metadata.get('tags', ())
    if 'fold_input' in tags: yield new.new_markdown_cell(FOLDED.format(cell.source))
    elif 'hide_input' not in tags: yield new.new_code_cell(cell.source)
    for output in cell.outputs:
        if words := output.get('data', {}).get('text/markdown'): yield new.new_markdown_cell(words)
        else: yield new.new_code_cell(outputs=[output])


def body(path):
    "The page as pandoc shows it, without the anchors that it gives to each line of code"
    if path.suffix != '.ipynb':
        text = pypandoc.convert_file(str(path), 'html', format='gfm', extra_args=OPTIONS)
    else:
        nb = shown(nbformat.read(path, as_version=4))
        nb.cells = [part for cell in nb.cells for part in parts(cell)]
        text = pypandoc.convert_text(nbformat.writes(nb), 'html', extra_args=OPTIONS,
                                     format='ipynb+raw_attribute+markdown_in_html_blocks+link_attributes')
    text = re.sub(r'<span\s+id="cb[^"]*"><a\s+href="#cb[^>]*></a>', '<span>', text)
    text = re.sub(r'<div\s+class="sourceCode"\s+id="cb[^"]*">', '<div class="sourceCode">', text)
    return EMPTY.sub('', text)


def plain_text(text):
    "The words of a piece of HTML"
    return ' '.join(html.unescape(re.sub(r'<(math|style|script)\b.*?</\1>|<[^>]+>', ' ', text, flags=re.S)).split())


def headings(text):
    "The sections of a page: level, id, words"
    found = re.findall(r'<h([23])\s+[^>]*?id="([^"]+)"[^>]*>(.*?)</h\1>', text, re.S)
    return [(int(level), name, plain_text(words)) for level, name, words in found]


def contents(text):
    "The list of sections of a page that has several"
    found = headings(text)
    if len(found) < 2: return ''
    items = ''.join(f'<li class="level{level}"><a href="#{name}">{html.escape(words)}</a></li>'
                    for level, name, words in found)
    return f'<aside><details class="contents" open><summary>On this page</summary><ul>{items}</ul></details></aside>'


def search_index(bodies, titles):
    "What the search of a page looks through: a script, for a page opened from a folder may read nothing else"
    entries = [dict(title=titles[page], page=address(page),
                    headings=[[words, name] for _, name, words in headings(text)],
                    words=' '.join(sorted(set(re.findall(r'[a-z_][\w.]+\w', plain_text(text).lower())))))
               for page, text in bodies.items()]
    return f'window.searchIndex = {json.dumps(entries, ensure_ascii=False)};\n'


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
    def link(href, words):
        here = ' aria-current="page"' if href == page else ''
        return f'<a href="{os.path.relpath(address(href), Path(page).parent)}"{here}>{html.escape(words)}</a>'
    lines = []
    for item in items:
        if isinstance(item, str): lines.append(f'<li>{link(item, titles[item])}</li>')
        elif 'contents' not in item: lines.append(f'<li>{link(item["href"], item["text"])}</li>')
        else:
            first = [dict(text='Overview', href=item['href'])] if 'href' in item else []
            inner = navigation([*first, *item['contents']], page, titles)
            opened = ' open' if 'aria-current' in inner else ''
            lines.append(f'<li><details{opened}><summary>{item["section"]}</summary>{inner}</details></li>')
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
                              home=seen(home), root=seen('.'), body=linked(text), contents=contents(text),
                              menu=navigation(cfg['website']['sidebar']['contents'], page, titles)), encoding='utf-8')
    (site/'search.js').write_text(search_index(bodies, titles), encoding='utf-8')
    for pattern in cfg['project']['resources']:
        for file in place.glob(pattern):
            to = site/file.relative_to(place)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
