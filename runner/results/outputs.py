"""What a finished run leaves behind: its printed row, its record, its classifier, its picture."""

from pathlib import Path

from runner.results.pictures import plot_histories
from runner.results.results_file import append_record
from runner.results.table import mean_row_cells, row_cells


def publish(record, run_options, rows, defaults, console):
    """Print the row of a finished seed and append its record; `rows` and `defaults` are those of `row_cells`."""
    console.table_row(row_cells(record, rows, defaults))
    publish_record(record, run_options.results_file, console)


def publish_record(record, path, console):
    """Append a record to the results file at `path`; "" is none."""
    if path and (written := console.write_output("the record", path, append_record, record)):
        destination, is_locked = written
        if not is_locked:
            console.warning(f"{path}: its file system has no locks; the record is in a file of its own, {destination}")
        elif destination != Path(path):
            console.warning(f"{path} has other columns and was left as it is; the record is in {destination}")


def publish_all(records, run_options, data, rows, defaults, console):
    """Print the mean of several seeds, and draw their histories, if that is asked for."""
    if len(records) > 1:
        console.table_row(mean_row_cells(records, rows, defaults))
    if path := run_options.plot:
        console.write_output("the picture", path, plot_histories, records, len(data.messages["train"]))
