"""Colours of the figures: what is frozen is blue, what trains is amber."""

FROZEN, FROZEN_EDGE = "#DCE6F1", "#4C7BA8"
TRAINED, TRAINED_EDGE = "#F9D9A8", "#C77A0A"
INK, MUTED = "#1f2933", "#6b7785"
