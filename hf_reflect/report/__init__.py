"""One HTML file about a result: its figures, and a browser for its rows. It needs no network and no server."""

from hf_reflect.report.writer import ROWS, write_report


__all__ = ["ROWS", "write_report"]
