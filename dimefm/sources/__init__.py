"""Where images and sentences come from: tars, folders, tables, text files. A source lists its samples once, in a
fixed order (base.Source)."""
