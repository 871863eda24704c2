"""From result files to tables. Imports nothing of methods or evals: a report can be built wherever the results are."""
