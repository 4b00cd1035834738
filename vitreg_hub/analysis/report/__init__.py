"""A report as files: JSON, tables, the page."""
