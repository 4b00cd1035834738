"""Images: those in the package, those of a user, and what a network expects of them."""
