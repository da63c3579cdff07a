"""The core's own backends, registered through the same entry points as everyone's."""
