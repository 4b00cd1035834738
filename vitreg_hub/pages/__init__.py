"""Reports as pages for the browser: what those of an analysis and of an evaluation share."""
