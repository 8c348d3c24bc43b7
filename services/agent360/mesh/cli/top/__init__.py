"""``agent360-mesh top``: what the mesh is doing, live in a terminal."""
