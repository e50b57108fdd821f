"""Statistics of per-item scores, each pure and tested against a published example."""
