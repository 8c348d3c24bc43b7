"""The other services of the mesh, as the inference service needs them."""
