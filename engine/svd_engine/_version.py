"""The version of the distribution; read by the build, the manifest and every report."""

__version__ = "0.1.0"
