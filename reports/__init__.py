"""From result files to tables and figures. Imports the core of methods and nothing else of the project."""
