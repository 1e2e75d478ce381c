"""Files that appear whole or not at all, and that are looked at before they are believed."""
