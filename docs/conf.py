"""How the pages in this directory become a site: ``nox -s docs``."""

project = "ovshim"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
