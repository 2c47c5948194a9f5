"""The report: what runs and results say, as one HTML page or as Markdown.

`sources` reads working directories and folders of results; `grids` makes the tables of both;
`charts` the figures of the page, `sections` puts these in order, and `page` and `page.html` write
it; `markdown` writes the other. The command is `python -m shiftnet report`.
"""
