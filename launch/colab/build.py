"""Write the notebooks from their text forms: `python launch/colab/build.py`, or `make notebooks`.

NAME.py (percent format) is what is edited and reviewed; NAME.ipynb follows from it, without outputs.
Needs jupytext: pip install -e .[test].
"""

from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("pretrain_folder", "explore_checkpoint", "tpu_vm_coco")


def convert(name: str) -> str:
    """The .ipynb of a text form, the same every time: jupytext names cells at random, here by number."""
    import jupytext
    import nbformat

    notebook = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    notebook.metadata = {
        "colab": {"provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)  # the first with ids
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    """Convert all of them."""
    for name in NAMES:
        (HERE / f"{name}.ipynb").write_text(convert(name), encoding="utf-8")
        print(HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
