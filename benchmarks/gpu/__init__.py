"""One command that proves dimefm on a GPU and measures it: README.md beside this file."""
