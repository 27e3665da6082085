"""A stand-in of the platform on this machine: `tesaiot-connect sandbox DIR`.

Owns: its folder, its accounts and certificates, its message routing, and the bundles it hands out.
Rule: it is built of what everybody has: a file for `serve`, the broker, the plugins' own accounts.
"""

from .bundles import next_steps, start_command
from .folder import WAYS, Device, Estate, Organisation, SandboxOptions
from .platform import Sandbox, Simulation, initialise, running

__all__ = [
    "WAYS",
    "Device",
    "Estate",
    "Organisation",
    "Sandbox",
    "SandboxOptions",
    "Simulation",
    "initialise",
    "next_steps",
    "running",
    "start_command",
]
