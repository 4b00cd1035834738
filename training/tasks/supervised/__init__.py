"""Classification, as in DeiT-III."""
