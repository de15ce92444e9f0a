"""A paper as two pages: its chapter, with what the kept run drew, and that run as a report, without the code."""
import re
from copy import deepcopy

import nbformat
from pages import ROOT
from running import DRAWN

from speechloss.reproduce import count_verdicts, kept_results, verdicts_of

SHOWN = '''What the cells show is the [kept run](results/{paper}/notebook.ipynb) at scale {scale}. Its tables hold the \
intervals of its day, of speakers alone; its verdicts are judged anew, with trainings as a random factor too \
([how](../reproduce/judging.ipynb)).'''
OLDER = ''' (this kept run is older and has none, and the seconds in its `results.json` leave out trainings that it \
found in the cache)'''
REMARK = '''Judged anew by the rules of today from the numbers of this run; {sealed}. The verdicts of its day are in \
results.json.'''
SEALED = {None: 'its claims were not sealed, since it is older than the seal',
          True: 'the claims are those it was sealed with',
          False: 'what decides on the claims has changed since it was sealed'}

RUN = '''The kept run of [the chapter](../../{paper}.ipynb), without its code: scale {scale}, seeds {seeds}, {data}, \
speechloss {version}, torch {torch}, {device}. Claims of the paper: {verdicts}; checks and controls of ours count \
apart ([in a table](#verdicts), [in words](#the-laptop-run-in-words)). The tables hold the intervals of the day of the \
run, of speakers alone; the verdicts are judged anew. [Run it yourself](#run-it-yourself).
'''

YOURSELF = '''## Run it yourself

From a clone; each command sets up its own environment first:

```bash
make reproduce PAPER={paper}                  # smoke: the whole pipeline, minutes
make reproduce PAPER={paper} SCALE={scale}     # this study: hours on two cores
```

Or with the package installed (`pip install '.[reproduce]'`; `speechloss doctor` names what else a judge of this paper \
may want):

```bash
speechloss reproduce {paper} --scale {scale} --out runs
```

It says how far it is; killed and started again, it goes on where it was. What it leaves in \
`runs/{paper}-{scale}-{seed}/` is what is kept here: the executed notebook, its figures and its sound, and \
`results.json`, with every number, its interval and its seeds, which `load_results` reads; and `scores.csv.gz`, every \
score of every clip and seed{older}. Without a network, \
`--corpus-dir` names the folder that holds the published files of the corpus.
'''


def draw():
    "Both pages of every paper that has a kept run, into `build/drawn`"
    for results in kept_results():
        source = ROOT/f'nbs/papers/{results["paper"]}.ipynb'
        run = ROOT/f'nbs/papers/results/{results["paper"]}/notebook.ipynb'
        kept = judged(executed(run), results)
        pages = {source: chapter(nbformat.read(source, as_version=4), kept, results), run: report(kept, results)}
        for page, made in pages.items():
            to = DRAWN/page.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(made, to)


def html_of(cell):
    "The outputs of a cell that are HTML"
    return [output.data for output in cell.get('outputs', []) if 'text/html' in output.get('data', {})]


def said_once(table):
    "A table with the size of the samples below it, where each cell says the same or has been cut within it"
    sizes = re.findall(r' \((n=[^<]*?)(?:\)|\.\.\.)</td>', table)
    size = max(re.findall(r' \((n=[^<]*)\)</td>', table), default='')
    if not size or not all(size.startswith(other) for other in sizes): return table
    table = re.sub(r' \(n=[^<]*</td>', '</td>', table)
    return table.replace('</table>', f'</table>\n<p>Each interval: {size}.</p>')


def executed(path):
    "A kept notebook, its tables made lighter"
    nb = nbformat.read(path, as_version=4)
    for data in (data for cell in nb.cells for data in html_of(cell)): data['text/html'] = said_once(data['text/html'])
    return nb


def judged(nb, results):
    "A kept notebook that ends in the verdicts of today"
    verdicts = verdicts_of(results['paper'], results['numbers'], results['scale'])
    verdicts.remark = REMARK.format(sealed=SEALED[results['sealed_by']])
    for cell in nb.cells:
        if cell.cell_type == 'code' and 'run.finish()' in cell.source:
            shown = {'text/html': verdicts._repr_html_(), 'text/plain': str(verdicts)}
            cell.outputs = [nbformat.v4.new_output('execute_result', shown, execution_count=None)]
    return nb


def chapter(nb, run, results):
    "The notebook with the outputs of its kept run, where the code is still what ran"
    ran = {cell.id: cell for cell in run.cells if cell.cell_type == 'code'}
    for cell in nb.cells:
        kept = ran.get(cell.id)
        if cell.cell_type != 'code' or kept is None or kept.source != cell.source: continue
        cell.outputs = deepcopy(kept.outputs)    # the report shows them from another folder
        for data in html_of(cell):
            data['text/html'] = re.sub(r'src="(?![\w+]+:)', f'src="results/{results["paper"]}/', data['text/html'])
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(SHOWN.format(**results)))
    return nb


def report(nb, results):
    "The executed notebook without its code and the bare values below it, and with how to run it"
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [o for o in cell.outputs if list(o.get('data', ())) != ['text/plain']]
    nb.cells = [cell for cell in nb.cells if cell.cell_type != 'code' or cell.outputs]
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.source = f'#| echo: false\n{cell.source}'
        else: cell.source = re.sub(r'\]\((?!\w+:|[#/])', '](../../', cell.source)    # it was written two folders up
    nb.cells[0].source = nb.cells[0].source.replace('# ', '# Run: ', 1)
    said = words(results)
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(RUN.format(**said)))
    nb.cells.append(nbformat.v4.new_markdown_cell(YOURSELF.format(**said)))
    return nb


def words(results):
    "What a report says about its run"
    where = results['environment']
    older = '' if (ROOT/f'nbs/papers/results/{results["paper"]}/scores.csv.gz').is_file() else OLDER
    seeds = max((number['seeds'] for number in results['numbers'].values()), key=len)
    data = ', '.join(f'corpus {name} ({of["recordings"]} recordings)' for name, of in results['data'].items())
    verdicts = ', '.join(f'{n} {verdict}' for verdict, n in count_verdicts(results).items() if n)
    return dict(paper=results['paper'], older=older, verdicts=verdicts, scale=results['scale'], seed=results['seed'],
                data=data, seeds=', '.join(map(str, seeds)), version=results['version'],
                torch=where['packages']['torch'],
                device=f'{where["cores"]} cores of {where["cpu"]}' if where['device'] == 'cpu' else where['device'])
