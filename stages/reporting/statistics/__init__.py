"""Statistics of per-item scores, each pure and tested against a published example.

The report calls `holm`, `pareto`, `retention`, and of `paired` all but `equivalence`. Called by studies only:
`bootstrap`, `correlation`, `saturation`, `trend` and `paired.equivalence`.
"""
