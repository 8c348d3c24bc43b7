"""``python -m agent360.mesh.cli``: the agent360-mesh command."""

from agent360.mesh.cli.app import main

main()
