"""Build the site in `_site`, and say what is wrong with it."""
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

import papers
import plain
from pages import INDEX, ROOT, address, config, copy, filtered, outputs_as_pages_have_them, pages, structure
from running import DRAWN

SITE = ROOT/'_site'
DIRECTIVE = re.compile(r'#\|\s*(hide|export|default_exp|echo|fig-alt|code-fold)|^:::', re.M)
HEAVIEST = 3e6    # bytes of a page with its pictures, styles and scripts, without its audio


# --- building ---

def prepared(page, source, place):
    "Write a page as it goes to Quarto or pandoc; what is wrong with it, if anything"
    try: nb = outputs_as_pages_have_them(filtered(source, page), (place/page).parent/'pictures')
    except Exception as error:  # nbdev raises what it likes
        return (f'{page}: cannot be shown ({error.__cause__!r}). The documentation runs the cells that import or '
                f'export, and only those: give imports a cell of their own. {error}')
    nbformat.write(nb, place/page)


def prepare(place):
    "A copy of the sources in `place`, its pages run, filtered and with their pictures as files"
    shutil.rmtree(place, ignore_errors=True)
    copy(place)
    papers.draw()
    todo = [p for p in pages() if p.endswith('.ipynb')]
    sources = [DRAWN/p if p != INDEX and (DRAWN/p).exists() else ROOT/p for p in todo]    # README.md is the kept index
    with ProcessPoolExecutor(2) as pool:
        wrong = [w for w in pool.map(prepared, todo, sources, [place] * len(todo)) if w]
    if wrong: raise SystemExit('\n'.join(wrong))
    settings = config(place)
    settings.pop('ipynb-filters')    # done above, in one process: nbdev takes seconds to start
    (place/'_quarto.yml').write_text(yaml.safe_dump(settings, sort_keys=False), encoding='utf-8')


def render(place):
    "Quarto where it is, pandoc where not: what was used"
    if quarto := shutil.which('quarto'):
        subprocess.run([quarto, 'render', place], check=True)
        version = subprocess.run([quarto, '--version'], check=True, capture_output=True, text=True).stdout.strip()
        return f'Quarto {version}'
    plain.render(place)
    return 'pandoc, in a plain frame'


def build():
    "The whole site, checked; nothing takes the place of an earlier one before it is right"
    if wrong := list(structure()): raise SystemExit('\n'.join(wrong))
    place = ROOT/'build/site'
    prepare(place)
    tool = render(place)
    (place/'_site/index.html').write_text(
        '<!DOCTYPE html><meta charset="utf-8"><title>speechloss</title><link rel="icon" href="data:,">'
        '<meta http-equiv="refresh" content="0; url=nbs/index.html"><a href="nbs/index.html">speechloss</a>\n')
    (place/'_site/built.json').write_text(json.dumps(dict(by=tool)) + '\n')
    if wrong := problems(place/'_site'): raise SystemExit('\n'.join(wrong))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(place/'_site', SITE)
    return tool


# --- checking ---

class Page(HTMLParser):
    "What a page of the site links to, and what it shows"
    def __init__(self, text):
        super().__init__()
        self.to, self.parts, self.anchors, self.no_alt, self.titles = [], [], set(), [], 0
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'a' and attrs.get('href'): self.to.append(attrs['href'])
        if tag in ('img', 'audio', 'source', 'script') and attrs.get('src'): self.parts.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') == 'stylesheet': self.parts.append(attrs['href'])
        if tag == 'img' and not attrs.get('alt'): self.no_alt.append(attrs.get('src', '')[:60])
        if attrs.get('id'): self.anchors.add(attrs['id'])
        self.titles += tag == 'h1'


def inside(url, page, base):
    "The file of the site that a link of a page means, as a path from its root, and the heading; None: elsewhere"
    if url.startswith(base): return urlsplit(url[len(base):]).path or 'index.html', urlsplit(url).fragment
    parts = urlsplit(url)
    if parts.scheme or parts.netloc: return None
    path = unquote(parts.path)
    return os.path.normpath(Path(page).parent/path) if path else page, unquote(parts.fragment)


def problems(site, root=ROOT):
    "Everything that is wrong with a built site: a sentence each"
    base = config(root)['website']['site-url'].rstrip('/') + '/'
    names = [address(p) for p in pages(root)]
    wrong = [f'{n}: is not in the site' for n in names if not (site/n).is_file()]
    found = {n: Page((site/n).read_text(encoding='utf-8')) for n in names if (site/n).is_file()}
    for name, page in found.items():
        if not page.titles: wrong.append(f'{name}: has no title')
        if name.startswith('nbs/') and DIRECTIVE.search(page.text):
            wrong.append(f'{name}: a directive is visible')
        if '{target=' in page.text: wrong.append(f'{name}: an attribute is visible')
        if 'data:audio' in page.text: wrong.append(f'{name}: carries audio in itself: refer to a file')
        wrong += [f'{name}: the picture {src} has no alt text' for src in page.no_alt]
        wrong += [f'{name}: {reason}' for reason in broken(name, page, found, site, base)]
        weight = sum((site/w).stat().st_size for w in {name, *parts_of(name, page, base)} if (site/w).is_file())
        if weight > HEAVIEST: wrong.append(f'{name}: weighs {weight / 1e6:.1f} MB without its audio')
    return wrong


def parts_of(name, page, base):
    "The files that a page loads to be seen"
    places = (inside(url, name, base) for url in page.parts)
    return {p[0] for p in places if p and Path(p[0]).suffix not in ('.flac', '.wav', '.mp3')}


def broken(name, page, found, site, base):
    "Links of a page that lead nowhere"
    for url in dict.fromkeys([*page.to, *page.parts]):
        if not (place := inside(url, name, base)): continue
        path, fragment = place
        if not (site/path).is_file() and not (site/path/'index.html').is_file():
            yield f'{url} leads to no file of the site'
        elif fragment and path in found and fragment not in found[path].anchors:
            yield f'{url} names a heading that is not there'
