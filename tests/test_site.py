"""The site: its list of pages, its checks, the front page, and what `make docs` built, in a real browser."""
import copy
import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import nbformat
import numpy as np
import pages
import papers
import plain
import pytest
import readme
import running
import website

ROOT = Path(__file__).resolve().parents[1]
SITE = website.SITE
PAGES = [pages.address(p) for p in pages.pages()]


# --- the list and its checks ---

def test_list_of_pages():
    wrong = list(pages.structure())
    assert not wrong, '\n'.join(wrong)


@pytest.fixture
def small(tmp_path):
    "A site of two pages and a picture, built without Quarto"
    (tmp_path/'nbs').mkdir()
    (tmp_path/'a.md').write_text('# A\n\n[to b](nbs/b.ipynb#deep) [itself](#a)\n')
    code = nbformat.v4.new_code_cell('#| fig-alt: "A \\"dot\\""\nplt.plot(1)')
    picture = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=='
    code.outputs = [nbformat.v4.new_output('display_data', {'image/png': picture})]
    text = nbformat.v4.new_markdown_cell('# B\n\n## Deep\n\n[back](../a.md)\n\n### Deeper\nSome *words*:\n- `a`: one')
    folded = nbformat.v4.new_code_cell('#| code-fold: true\nfor k in "a": pass')
    plain_code = nbformat.v4.new_code_cell('import os  # of use')
    documented = nbformat.v4.new_code_cell('#| echo: false\nshow_doc(f)')
    documented.outputs = [nbformat.v4.new_output('display_data', {
        'text/markdown': '[source](https://y.org/f.py){target="_blank" style="float:right; font-size:smaller"}'})]
    cells = [text, code, folded, plain_code, documented]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'nbs/b.ipynb')
    (tmp_path/'nbs/site.css').write_text('')
    (tmp_path/'_quarto.yml').write_text(
        'project: {render: [a.md, nbs/b.ipynb], resources: ["nbs/site.css", "nbs/pictures/*"]}\n'
        'ipynb-filters: [nbdev_filter]\nwebsite: {site-url: "https://x.org", navbar: {}, sidebar: {contents: '
        '[{section: S, contents: [a.md]}, {section: T, href: nbs/b.ipynb, contents: [a.md]}]}}\n')
    return tmp_path


def built(root):
    nb = pages.outputs_as_pages_have_them(nbformat.read(root/'nbs/b.ipynb', 4), root/'nbs/pictures')
    nbformat.write(nb, root/'nbs/b.ipynb')
    plain.render(root)
    return root/'_site'


def test_plain_site(small):
    "Pages, sidebar, links between pages, pictures with their words, styles"
    site = built(small)
    assert not list(pages.structure(small)) and not website.problems(site, small)
    a, b = (site/'a.html').read_text(), (site/'nbs/b.html').read_text()
    assert 'href="nbs/b.html#deep"' in a and 'href="../a.html"' in b and '>Overview<' in a
    assert 'alt="A &quot;dot&quot;"' in b and 'data:image' not in b and '#|' not in b
    assert '<details open><summary>S</summary>' in a and '<details open><summary>T</summary>' in b
    assert '<li class="level2"><a href="#deep">Deep</a></li>' in b and '>Deeper<' in b and 'On this page' not in a
    assert '{target=' not in b and '<a href="https://y.org/f.py" target="_blank"' in b.replace('\n', ' ')
    assert re.search(r'<details class="folded">\s*<summary>\s*Code\s*</summary>.*<span class="cf">for</span>', b, re.S)
    assert '<span class="im">import</span>' in b and '<span class="co"># of use</span>' in b and 'cb1-1' not in b
    assert re.search(r'<li>\s*(<p>)?<code>a</code>: one', b)


def test_search_index_of_the_plain_frame(small):
    "Every page with its title, its headings and its words"
    text = (built(small)/'search.js').read_text().strip()
    a, b = json.loads(text.removeprefix('window.searchIndex = ').removesuffix(';'))
    assert (a['title'], a['page'], b['title'], b['page']) == ('A', 'a.html', 'B', 'nbs/b.html')
    assert b['headings'] == [['Deep', 'deep'], ['Deeper', 'deeper']] and 'words' in b['words'].split()


class Point(NamedTuple):
    near: int  # samples
    far: int = 2


class Bare: "Nothing to give"


class Sized:
    def __init__(self, size: int = 1): self.size = size


def test_classes_are_shown_as_classes():
    "With the fields of a named tuple, and the source where the class is"
    empty = '[source](https://h/r/blob/main/x/y.py#L3){a}\n```python\ndef NAME(\n    *args, **kwargs\n):\n```\n'
    tuples = pages.signed(empty.replace('NAME', 'Point'), Point)
    assert 'class Point(NamedTuple):\n    near: int  # samples\n    far: int = 2\n```' in tuples
    assert '/blob/main/tests/test_site.py#L' in tuples and '{a}' in tuples
    assert '\nclass Bare\n```' in pages.signed(empty.replace('NAME', 'Bare'), Bare)
    sized = pages.signed('```python\ndef Sized(\n    size:int=1\n):\n```\n', Sized)
    assert sized == '```python\nclass Sized(\n    size:int=1\n)\n```\n'
    function = '```python\ndef built(\n    root\n):\n```\n'
    assert pages.signed(function, built) == function


@pytest.mark.parametrize('old, new, wanted', [
    ('[back](../a.md)', '[back](../lost.md)', 'leads to no file'),
    ('[back](../a.md)', '[back](../a.md#lost)', 'heading that is not there'),
    ('[back](../a.md)', '[back](https://x.org/lost.html)', 'leads to no file'),
    ('# B\\n', '', 'has no title'),
    ('#| fig-alt: \\"A \\\\\\"dot\\\\\\"\\"\\n', '', 'no alt text'),
    ('[back](../a.md)', '<audio src=\\"data:audio/wav;base64,AA\\"></audio>', 'carries audio in itself'),
    ('[back](../a.md)', '`#| export`', 'a directive is visible')])
def test_what_is_wrong_is_found(small, old, new, wanted):
    "Each fault, put into a good site, is named with its page"
    text = json.dumps(json.loads((small/'nbs/b.ipynb').read_text()))
    assert old in text
    (small/'nbs/b.ipynb').write_text(text.replace(old, new))
    (wrong,) = website.problems(built(small), small)
    assert wanted in wrong and wrong.startswith('nbs/b.html')


def test_a_heavy_page_is_found(small, monkeypatch):
    monkeypatch.setattr(website, 'HEAVIEST', 1000)
    assert any('weighs 0.0 MB' in w for w in website.problems(built(small), small))


def test_pages_that_no_menu_knows_are_found(small):
    settings = (small/'_quarto.yml').read_text()
    (small/'_quarto.yml').write_text(settings.replace('contents: [a.md]', 'contents: [c.md]'))
    found = ' '.join(pages.structure(small))
    assert 'c.md, which does not exist' in found and 'a.md, and no menu' in found


def test_a_package_lists_its_modules():
    "In the order of the menu, with the line below the title and with what is public, linked where it has a heading"
    table = pages.chapters('nbs/losses/index.ipynb').splitlines()
    folder = [Path(p) for p in pages.pages() if p.startswith('nbs/losses/')][1:]
    assert [row.split('](')[0].removeprefix('| [') for row in table[2:]] == [p.stem for p in folder]
    row = next(row for row in table if row.startswith('| [registry]'))
    assert '[`build`](registry.ipynb#build)' in row and '`CARDS`,' in row
    line = nbformat.read(ROOT/'nbs/losses/registry.ipynb', 4).cells[0].source.splitlines()[1]
    assert line.removeprefix('> ') in row


@pytest.mark.parametrize('package', sorted(p.parent.name for p in ROOT.glob('nbs/*/index.ipynb')))
def test_every_package_leaves_its_list_to_the_site(package):
    text = (ROOT/f'nbs/{package}/index.ipynb').read_text()
    assert pages.CHAPTERS in text and '| module |' not in text


def test_names_are_linked_from_where_they_stand():
    text = '[`A_b`](https://speechloss.github.io/speechloss/nbs/x/y.html#a_b) [`mini`](https://speechloss.github.io' \
           '/speechloss/nbs/x/y.html#mini) [`C.run`](https://speechloss.github.io/speechloss/nbs/x/y.html#c.run)'
    assert pages.linked(text, 'nbs/z/w.ipynb') == '[`A_b`](../x/y.html#a_b) `mini` [`C.run`](../x/y.html#c)'


@pytest.mark.parametrize('table, wanted', [
    ('<td>1 (n=10, 5 clusters)</td><td>2 (n=10, 5 cl...</td><td>3</td></table>',
     '<td>1</td><td>2</td><td>3</td></table>\n<p>Each interval: n=10, 5 clusters.</p>'),
    ('<td>1 (n=10, 5 clusters)</td><td>2 (n=9, 5 clu...</td></table>',) * 2,
    ('<td>1 (n=10, 5 clusters)</td><td>2 (n=9, 5 clusters)</td></table>',) * 2, ('<td>1</td></table>',) * 2])
def test_the_size_of_samples_is_said_once(table, wanted):
    "Below the table where it is one, in the cells where it is not"
    assert papers.said_once(table) == wanted


def test_docstrings_as_pages_show_them():
    "No link in code, examples and options as code"
    link = '[`g`](h.html#g)'
    text = f'### f\n```python\ndef f(\n  x # {link}, [1](2)\n)\n```\n{link} --out, `["--in"]`\n\n>>> f(1)\n2\n\nNot'
    assert pages.documented(text) == ('### f\n```python\ndef f(\n  x # `g`, [1](2)\n)\n```\n'
                                      f'{link} `--out`, `["--in"]`\n\n```python\n>>> f(1)\n2\n```\n\nNot')


def test_a_notebook_runs_as_nbdev_runs_it(tmp_path):
    "Marked cells are left out, outputs kept, directives stay, and an error is an error"
    cells = [nbformat.v4.new_code_cell(s) for s in
             ('#| eval: false\n1/0', '#| slow\n1/0', '#| cuda\n1/0', '#| export\nx = 1', 'print(x)')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'a.ipynb')
    nb = running.run(tmp_path/'a.ipynb')
    assert [len(c.outputs) for c in nb.cells] == [0, 0, 0, 0, 1] and nb.cells[3].source.startswith('#| export')
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1/0')]), tmp_path/'b.ipynb')
    with pytest.raises(ZeroDivisionError): running.run(tmp_path/'b.ipynb')


RESULTS = dict(paper='p', scale='laptop', seed=0, version='1', data={'c': dict(recordings=7)},
               numbers={'a': dict(seeds=[0]), 'b': dict(seeds=[0, 1])},
               claims=[dict(verdict='tied')] * 2 + [dict(verdict='needs scale paper')],
               environment=dict(device='cpu', cores=2, cpu='C', packages=dict(torch='2')))


def test_a_kept_run_ends_in_the_verdicts_of_today():
    cell = nbformat.v4.new_code_cell('run.finish()', outputs=[nbformat.v4.new_output('stream', text='of its day')])
    nb = papers.judged(nbformat.v4.new_notebook(cells=[cell]), dict(
        paper='model_as_loss', scale='laptop', sealed_by=False, numbers={'leak/grad': dict(value=0.)}))
    shown = papers.html_of(nb.cells[0])[0]['text/html']
    assert 'mal-lsd' in shown and '<b>not measured</b>' in shown and 'has changed since it was sealed' in shown
    assert 'of its day' not in shown.replace('The verdicts of its day are in', '')


def test_a_paper_is_a_chapter_and_a_report():
    "The chapter shows what the run drew, only where the code is still what ran; the report shows no code"
    new = nbformat.v4
    player = new.new_output('display_data', {'text/html': '<audio src="audio/a.flac"></audio>'})
    value = new.new_output('execute_result', {'text/plain': '{1: 2}'})
    ran = new.new_notebook(cells=[
        new.new_markdown_cell('# P\n[loss](../losses/x.ipynb) [out](https://x.org)'),
        new.new_code_cell('scale = "laptop"'), new.new_code_cell('a', outputs=[player, value]),
        new.new_code_cell('b', outputs=[player])])
    source = copy.deepcopy(ran)
    for cell in source.cells[1:]: cell.outputs = []
    source.cells[3].source = 'b, changed'
    chapter = papers.chapter(source, copy.deepcopy(ran), RESULTS)
    assert [len(c.get('outputs', ())) for c in chapter.cells] == [0, 0, 0, 2, 0]
    assert 'src="results/p/audio/a.flac"' in str(chapter.cells[3].outputs) and 'scale laptop' in chapter.cells[1].source
    report = papers.report(ran, RESULTS)
    first, about, *code, last = report.cells
    assert first.source == '# Run: P\n[loss](../../../losses/x.ipynb) [out](https://x.org)'
    assert 'seeds 0, 1, ' in about.source and '7 recordings' in about.source and '2 cores of C' in about.source
    assert 'Claims of the paper: 2 tied, 1 needs another scale; checks' in about.source
    assert [pages.directive(c, 'echo') for c in code] == ['false', 'false']
    assert [c.outputs[0].data['text/html'] for c in code] == ['<audio src="audio/a.flac"></audio>'] * 2
    assert [len(c.outputs) for c in code] == [1, 1]
    assert 'make reproduce PAPER=p SCALE=laptop' in last.source and 'this kept run is older' in last.source


# --- the front page ---

@pytest.mark.slow
def test_readme_is_the_executed_front_page():
    assert (ROOT/'README.md').read_text() == readme.text(ROOT/pages.INDEX), 'README.md is stale: run `make readme`'
    code = ('import json, pages, running; nb = running.run(pages.ROOT/pages.INDEX); print("@" + json.dumps(['
            'o.get("text") or dict(o["data"]) for c in nb.cells for o in c.get("outputs", [])]))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT/'.ci', text=True, capture_output=True, check=True)
    nb = nbformat.read(ROOT/pages.INDEX, 4)
    kept = [o.get('text') or dict(o.data) for c in nb.cells for o in c.get('outputs', [])]

    def flat(outputs):
        return [{k: ''.join(v) for k, v in o.items()} if isinstance(o, dict) else ''.join(o) for o in outputs]
    assert flat(json.loads(done.stdout.split('@', 1)[1])) == flat(kept), \
        'the front page says something else now: run `make readme`'


def test_the_readme_is_short_and_leads_to_the_site():
    "Addresses that hold on PyPI too, and no notebook without its outputs"
    text = (ROOT/'README.md').read_text()
    assert len(text) <= 10_000
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text)
    assert links and all(a.startswith('https://') or b.startswith('https://') for a, b in links)
    assert '.ipynb)' not in text and 'data:' not in text
    base = pages.config()['website']['site-url']
    for url in {a or b for a, b in links if (a or b).startswith(base)}:
        path = url.removeprefix(base + '/').split('#')[0]
        assert path in PAGES or (ROOT/path).is_file(), f'README leads to {url}, which the site does not have'


def test_links_of_the_front_page_become_addresses():
    def link(url): return readme.absolute(re.match(r'(\]\()([^)\s]+)(\))', f']({url})'))
    assert link('guides/a.ipynb#b') == '](https://speechloss.github.io/speechloss/nbs/guides/a.html#b)'
    assert link('../CONTRIBUTING.md') == '](https://github.com/speechloss/speechloss/blob/main/CONTRIBUTING.md)'
    assert link('https://x.org/a') == '](https://x.org/a)' and link('#use') == '](#use)'


def blocks(language, text=None):
    "The blocks of code of the README, or of `text`"
    text = (ROOT/'README.md').read_text() if text is None else text
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.S | re.M)


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path):
    "As a reader would: the blocks one after the other, elsewhere"
    code = '\n'.join(blocks('python'))
    assert '.backward()' in code
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_commands_of_the_readme_run(tmp_path):
    "After those of its guide: the recipe and every `speechloss` line but reproduce, on a little speech, for two steps"
    from speechloss.corpora import get, Mixtures
    from speechloss.signal import save
    guide = '\n'.join(c.source for c in nbformat.read(ROOT/'nbs/guides/commands.ipynb', 4).cells)
    (recipe,) = blocks('toml', guide)
    tomllib.loads(recipe)
    (tmp_path/'recipe.toml').write_text(recipe)
    items = list(Mixtures.grid(get('mini'), 'test', seconds=2., limit=2))
    for k, item in enumerate(items):
        for folder in ('recordings', 'noisy', 'clean', 'runs/a/enhanced'):
            (tmp_path/folder).mkdir(parents=True, exist_ok=True)
            save(tmp_path/folder/f'{k}.wav', item['clean' if folder == 'clean' else 'noisy'], 16000)
    save(tmp_path/'noisy.wav', items[0]['noisy'], 16000)
    # one speaker in each split
    for name in ('train-clean-100/103/1240', 'dev-clean/84/121123', 'test-clean/61/70968'):
        (tmp_path/'LibriSpeech'/name).mkdir(parents=True)
        for k, item in enumerate(items):
            save(tmp_path/'LibriSpeech'/name/f'{"-".join(name.split("/")[1:])}-{k:04}.flac', item['clean'], 16000)
    (tmp_path/'noise').mkdir()
    for k in range(12):
        save(tmp_path/f'noise/{"abcdefghijkl"[k]}.wav', items[0]['noisy'] * (1 + k) / 20, 16000)
    lines = [line.split(' #')[0].strip() for text in (guide, None) for block in blocks('bash', text)
             for line in block.splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line.startswith('speechloss ') and ' reproduce ' not in line]
    assert len(lines) >= 5
    for line in lines:
        more = ' --steps 2 --steps-per-epoch 2 --warmup 1 --device cpu' if ' train ' in line else ''
        done = subprocess.run(['bash', '-c', f'"{sys.executable}" -m {line}{more}'],
                              cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, f'{line}\n{done.stderr}'
    assert {p.name for p in (tmp_path/'enhanced').iterdir()} == {'0.wav', '1.wav'}
    assert (tmp_path/'scores.csv').read_text().count('\n') == 3 and (tmp_path/'scores.png').exists()


# --- the built site, in a browser ---

@pytest.fixture(scope='module')
def address():
    "The built site, served"
    if not (SITE/'built.json').exists():
        pytest.skip('no site here: `make docs` builds it')
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import Error, sync_playwright
    names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
    with sync_playwright() as play:
        try:
            chromium = play.chromium.launch(
                executable_path=next(filter(None, map(shutil.which, names)), None),
                args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
                      '--disable-background-networking', '--disable-component-update',
                      '--autoplay-policy=no-user-gesture-required'])
        except Error as reason:
            pytest.skip(f'no Chromium here: `make browser` gets one ({reason.message.splitlines()[0]})')
        yield chromium
        chromium.close()


class Seen:
    "A page of a browser that remembers what went wrong"
    def __init__(self, browser, address, **options):
        self.wrong, self.address = [], address
        self.page = browser.new_page(**options)
        self.page.on('console', lambda m: m.type in ('error', 'warning') and self.wrong.append(f'console: {m.text}'))
        self.page.on('pageerror', lambda e: self.wrong.append(f'error: {e}'))
        self.page.on('requestfailed', self._failed)
        self.page.on('request', lambda r: r.url.startswith(('http://127', 'data:', 'blob:'))
                     or self.wrong.append(f'asks the network: {r.url}'))

    def _failed(self, request):
        "A request that the browser gave up as it left for the next page is made again"
        left = 'ERR_ABORTED' in (request.failure or '')
        if not left or urllib.request.urlopen(request.url).status != 200: self.wrong.append(f'failed: {request.url}')

    def open(self, path):
        self.page.goto(f'{self.address}/{path}', wait_until='load')
        return self.page


@pytest.mark.slow
def test_every_page_opens(browser, address):
    "Without a word in the console, without the network, with a title, and no wider than a phone or a desk"
    wrong, seen = [], Seen(browser, address)
    for path in PAGES:
        page = seen.open(path)
        assert page.locator('h1').first.inner_text().strip(), path
        for width, height in ((1280, 800), (390, 844)):
            page.set_viewport_size(dict(width=width, height=height))
            over = page.evaluate('document.documentElement.scrollWidth') - width
            if over > 1: seen.wrong.append(f'{over} px wider than {width}')
        wrong += [f'{path}: {w}' for w in seen.wrong]
        seen.wrong.clear()
    seen.page.close()
    assert not wrong, '\n'.join(wrong)


PLAYERS = ['nbs/index.html', *(p for p in PAGES if '/results/' in p)]


def test_folded_code_opens(browser, address):
    page = Seen(browser, address).open('nbs/guides/which_loss.html')
    code = page.locator('details:has(> summary:text-is("Code"))').first
    assert not code.locator('pre').first.is_visible()
    code.locator('summary').click()
    assert code.locator('pre').first.is_visible()
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize('path', PLAYERS)
def test_players_play(path, browser, address):
    seen = Seen(browser, address)
    page = seen.open(path)
    players = page.locator('audio').all()
    assert players, 'no player'
    for player in players:
        player.evaluate('a => a.play()')
        page.wait_for_function('a => a.duration > 0 && a.currentTime > 0', arg=player.element_handle())
        player.evaluate('a => a.pause()')
    assert not seen.wrong
    page.close()


def test_a_player_is_reached_by_keyboard(browser, address):
    page = Seen(browser, address).open('nbs/index.html')
    for _ in range(300):
        page.keyboard.press('Tab')
        if page.evaluate('document.activeElement.tagName') == 'AUDIO': break
    else: raise AssertionError('300 times Tab, and no player')
    page.close()


def test_the_root_leads_to_the_front_page(browser, address):
    seen = Seen(browser, address)
    seen.open('').wait_for_url('**/nbs/index.html')
    assert not seen.wrong
    seen.page.close()


def test_dark_mode_is_dark(browser, address):
    page = Seen(browser, address, color_scheme='dark').open('nbs/index.html')
    page.wait_for_timeout(300)
    colour = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert np.mean([int(n) for n in re.findall(r'\d+', colour)[:3]]) < 100 or colour == 'rgba(0, 0, 0, 0)', colour
    page.close()


def test_search_finds_a_loss(browser, address):
    quarto = json.loads((SITE/'built.json').read_text())['by'].startswith('Quarto')
    field, hits = ('#quarto-search button, #quarto-search input', '.aa-Item a') if quarto else ('#search', '#found a')
    seen = Seen(browser, address)
    page = seen.open('nbs/index.html')
    page.locator(field).first.click()
    page.keyboard.type('ModelAsLoss', delay=20)
    page.wait_for_selector(hits)
    found = page.locator(hits).evaluate_all('items => items.map(a => a.href)')
    assert any('losses/model_as_loss.html' in url for url in found), found
    assert not seen.wrong
    page.close()
