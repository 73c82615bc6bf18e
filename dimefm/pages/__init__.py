"""Pages to look at: one self-contained HTML file for what dimefm wrote, and small servers for a browser here."""
