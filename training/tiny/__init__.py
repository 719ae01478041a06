"""How the embedded model `tiny` is made; see README.md beside this file."""
