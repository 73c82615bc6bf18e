"""`make reproduce`: the whole job as a user would type it."""
