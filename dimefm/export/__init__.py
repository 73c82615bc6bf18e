"""Trained students written for use elsewhere: so far as open_clip folders."""
