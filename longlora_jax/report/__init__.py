"""A page that shows what training runs did: one HTML file that needs nothing else (see report/__main__.py)."""
