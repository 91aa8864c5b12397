"""The tools by their names of before the command `specomp`: `python -m specomp.results.table`."""
