"""SAN: a side network that reads and steers a frozen vision transformer."""
