"""The picture of docs/figures.md: `python -m benchmarks.figures` writes docs/figures.png."""

from pathlib import Path

from flows.report.sheet import sheet
from sage.config import load_params
from sage.data.figures import figures

OUT, ROWS, SIZE = Path("docs/figures.png"), 4, 96


def main() -> None:
    """Write a sheet with a column of training figures for each style in params.yaml."""
    params = load_params().prepare
    columns = [
        [one.figure.image(SIZE) for one in figures([style], "train", ROWS, 3, params.figures.held_out)]
        for style in params.figures.styles
    ]
    sheet([list(row) for row in zip(*columns, strict=True)], size=(SIZE, SIZE), gap=3).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
