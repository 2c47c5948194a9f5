"""Reports on runs and results, as one HTML page or as Markdown.

`sources` reads working directories and folders of results, `grids` makes the tables of both forms,
and `charts` the figures of the page. `sections` puts these in order, `page` and `page.html` write
the page, and `markdown` writes Markdown. The command is `shiftnet report`.
"""
