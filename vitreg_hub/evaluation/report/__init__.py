"""A report of scores as files: JSON, tables, figures, the page."""
