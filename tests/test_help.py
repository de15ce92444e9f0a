"""`help()` of every public class and function is enough to use it."""
import doctest
import importlib
import inspect
import re
import tokenize
from io import StringIO

import pytest
import torch
from torch import nn

from speechloss.losses import CARDS

PACKAGES = ('speechloss.losses', 'speechloss.losses.functional', 'speechloss.features', 'speechloss.models',
            'speechloss.metrics', 'speechloss.judges', 'speechloss.trials')
#: A docstring says what is done
VERBS = ('Add', 'Build', 'Compare', 'Define', 'Describe', 'Draw', 'Enhance', 'Fit', 'Hold', 'Judge', 'Keep', 'Load',
         'Look', 'Measure', 'Reconstruct', 'Return', 'Scale', 'Score', 'Transcribe', 'Weigh', 'Wrap', 'Write')


def public(kind):
    "Public classes, or functions, by package and name"
    found = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            if kind(getattr(package, name)): found.setdefault(getattr(package, name), f'{package.__name__}.{name}')
    return found


CLASSES, FUNCTIONS = public(inspect.isclass), public(inspect.isfunction)
each_class = pytest.mark.parametrize('cls', CLASSES, ids=CLASSES.values())
each_function = pytest.mark.parametrize('function', FUNCTIONS, ids=FUNCTIONS.values())


def parameters(function):
    "Parameters by name, without `self`"
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != 'self'}


def commented(function):
    "Names that are followed by a comment on their line of the signature"
    tokens = list(tokenize.generate_tokens(StringIO(inspect.getsource(function)).readline))
    lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    first = {}    # of each name, the line it is first seen in
    for token in tokens:
        if token.type == tokenize.NAME: first.setdefault(token.string, token.start[0])
    return {name for name, line in first.items() if line in lines}


def run_examples(thing):
    "Run what follows `>>>` in a session that has imported torch and all public names"
    session = dict(torch=torch)
    own = {**CLASSES, **FUNCTIONS}[thing].rpartition('.')[0]     # last: two packages have an `si_sdr`
    for package in map(importlib.import_module, (*PACKAGES, own)):
        session |= {name: getattr(package, name) for name in package.__all__}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), session, thing.__name__, None, 0)
    assert test.examples, 'the docstring has no example'
    said = StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    assert not runner.run(test, out=said.write).failed, said.getvalue()


def first_line(thing):
    "First line of a docstring of its own; a blank line follows it"
    assert thing.__doc__, 'no docstring'
    lines = inspect.cleandoc(thing.__doc__).splitlines()
    assert lines[1:2] in ([], ['']), lines[1]
    return lines[0]


@each_class
def test_parameters_of_classes(cls):
    "Each has a type and a line of the list in the docstring"
    if cls.__init__ in (object.__init__, nn.Module.__init__) or getattr(cls, '_is_protocol', False): return
    listed = re.findall(r'^- `(\w+)`: \S', inspect.getdoc(cls), re.MULTILINE)
    wanted = parameters(cls.__init__)
    assert [name for name, p in wanted.items() if p.annotation is p.empty] == [], 'no type'
    assert [name for name in wanted if name not in listed] == [], 'not in the docstring'
    assert [name for name in listed if name not in wanted] == [], 'no such parameter'


@each_function
def test_parameters_of_functions(function):
    "Each has a type, and a comment or its name in the docstring"
    doc, comments = inspect.getdoc(function), commented(function)
    for name, p in parameters(function).items():
        assert p.annotation is not p.empty, f'{name} has no type'
        assert name in comments or f'`{name}`' in doc, f'{name} is not explained'


@pytest.mark.parametrize('thing', {**CLASSES, **FUNCTIONS}, ids=[*CLASSES.values(), *FUNCTIONS.values()])
def test_first_line(thing):
    line = first_line(thing)
    assert line.split()[0] in VERBS, line
    assert inspect.isfunction(thing) or line.endswith('.'), line


@each_class
def test_example_of_class(cls): run_examples(cls)


@pytest.mark.parametrize('function', [f for f in FUNCTIONS if '>>>' in inspect.getdoc(f)],
                         ids=[name for f, name in FUNCTIONS.items() if '>>>' in inspect.getdoc(f)])
def test_example_of_function(function): run_examples(function)


@each_class
def test_call(cls):
    "What `help(cls.forward)` shows is not the text of torch"
    if not issubclass(cls, nn.Module): return
    doc = inspect.getdoc(cls.forward)
    assert doc and doc != inspect.getdoc(nn.Module.forward)
    for name in parameters(cls.forward):
        if name not in ('args', 'kwargs'): assert f'`{name}' in doc, f'{name} is not explained'


@pytest.mark.parametrize('card', CARDS.values(), ids=CARDS)
def test_every_card_is_covered(card):
    assert card.loss in CLASSES
