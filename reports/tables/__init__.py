"""Tables of the report. One public module in this folder is one table; the folder is the registry.

A table's module has two names:

    PLACE                   reports.document.Place: where it stands
    table(cells, results)   the reports.document.Table, or None where there is nothing to show. `cells`: those of one model,
                            or all of them for a table of the whole report. `results`: reports.tree.Results
"""
