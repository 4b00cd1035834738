"""What the paper measures of artifacts (its section 2)."""
