"""Executes docs/tutorial.py as a notebook and writes it with its outputs.

    python docs/notebook.py                  # docs/tutorial.ipynb, after every change of the script
    python docs/notebook.py elsewhere.ipynb

The script is the source: cells are divided by `# %%`. It takes jupytext, nbclient and ipykernel.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient

DOCS = Path(__file__).parent


def main(out: Path) -> None:
    """Same script, same file, but for what the cells print."""
    notebook = jupytext.read(DOCS / "tutorial.py")
    os.environ.pop("MPLBACKEND", None)  # the kernel's own puts figures into the notebook
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # else random
        cell.metadata.pop("execution", None)  # the time of day
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    jupytext.write(notebook, out, fmt="ipynb")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "tutorial.ipynb")
