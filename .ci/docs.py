"""README and site from the notebooks.

docs.py draw     run every chapter and guide, keep what they draw in build/drawn
docs.py readme   run nbs/index.ipynb, keep its outputs, write README.md
docs.py site     run what changed, build the site in _site, check every page and link
"""
import sys

import readme
import website
from pages import pages
from running import draw


def site():
    draw(every=False)
    tool = website.build()
    print(f'The site was built by {tool}: {len(pages())} pages, and their links lead somewhere.\n'
          'Open _site/index.html, or run `make docs-serve`.')


if __name__ == '__main__':
    commands = dict(draw=draw, readme=readme.make, site=site)
    if len(sys.argv) != 2 or sys.argv[1] not in commands: raise SystemExit(__doc__)
    commands[sys.argv[1]]()
