"""Memory between the passes: what is stored, offloaded or recomputed, and layers that compute a tile at a time."""
