"""How a report is written: tables as Markdown, CSV and LaTeX, figures as PNG and SVG, the whole as Markdown and as a page."""
