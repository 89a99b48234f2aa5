"""Self-contained HTML files about a plan, an estimate and a search: SVG by hand, no scripts, no request to anywhere."""
