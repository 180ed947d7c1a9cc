"""`baft plot`."""

from __future__ import annotations

from peft_baft_bench.report import plots
from peft_baft_bench.report.tables import tables
from peft_baft_bench.run.results import read_results
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import PlotCommand


def plot(options: PlotCommand) -> int:
    """Write tables and figures of result lines to a folder; return the exit code."""
    lines, output = read_results(options.results), options.output
    drawn_tables = tables(lines)
    output.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(drawn_tables, start=1):
        print(f"\n{table.markdown()}")
        (output / f"table{number}.csv").write_text(table.csv(), encoding="utf-8")
    (output / "tables.md").write_text(
        "\n\n".join(table.markdown() for table in drawn_tables) + "\n", encoding="utf-8"
    )
    figures = [] if options.no_figures else plots.draw_all(lines, output)
    print(
        f"\nIn {output}: tables.md, {len(drawn_tables)} csv"
        + "".join(f", {figure.name}" for figure in figures)
    )
    return DONE
