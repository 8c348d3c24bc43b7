"""A simulator of a model server: speaks the OpenAI API, runs no model, and says so."""

from agent360.mesh.simulator.server import Simulator, run
from agent360.mesh.simulator.settings import SimulatedModel, SimulatorSettings

__all__ = ["SimulatedModel", "Simulator", "SimulatorSettings", "run"]
