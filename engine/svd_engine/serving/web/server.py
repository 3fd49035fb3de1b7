"""Serves the page until it is stopped: where it listens, who may come in, what is let up."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from svd_engine.engine import VideoEngine
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.install import install_line
from svd_engine.serving.jobs import JobService
from svd_engine.shell import WINDOWS
from svd_engine.values import at_least, finite

MAX_UPLOAD_BYTES = 50 * 2**20
Credentials = tuple[str, str]  # user, password


class WebServer:
    """A page over `models` that listens once it is made.

    port: 0 takes a free one.  max_queue: videos that may wait beside the running one.
    Uploads and results lie in a temporary folder; nothing else of this machine is served.  Nothing is asked
    of another machine, neither here nor by the page.  `close()` ends every job and closes the engines.
    Raises BackendUnavailable unless Gradio is installed, SettingsError for an address it cannot listen at.
    """

    def __init__(
        self,
        models: Mapping[str, VideoEngine],
        *,
        host: str = "127.0.0.1",
        port: int = 7860,
        credentials: Credentials | None = None,
        max_queue: int = 8,
    ) -> None:
        self.models = models
        at_least("queue", max_queue, 1)
        check_installed()
        port = free_port(host, port)
        # a video that is being sent stays on Windows, which removes nothing that is open
        self._folder = tempfile.TemporaryDirectory(prefix="svd-engine-web-", ignore_cleanup_errors=True)
        os.environ |= {
            "GRADIO_TEMP_DIR": self._folder.name,
            "GRADIO_EXAMPLES_CACHE": self._folder.name,  # which it serves as well
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        from svd_engine.serving.web.page import CSS, Page

        for engine in models.values():
            engine.set_progress_bar_config(disable=True)
        self.service = JobService(next(iter(models.values())), max_queue=max_queue)
        self.page = Page(models, self.service, Path(self._folder.name).resolve())
        self.page.blocks.queue(api_open=False, max_size=None)
        _, self.url, _ = self.page.blocks.launch(
            server_name=host, server_port=port, auth=credentials, max_file_size=MAX_UPLOAD_BYTES,
            theme=_theme(), css_paths=CSS,
            footer_links=[], ssr_mode=False, mcp_server=False, share=False, enable_monitoring=False,
            quiet=True, prevent_thread_lock=True,
        )  # fmt: skip

    def close(self) -> None:
        self.page.blocks.close(verbose=False)
        self.service.close()
        for engine in self.models.values():
            engine.close()
        self._folder.cleanup()


def _theme() -> object:
    """Fonts of the visitor's machine, none of a network's; help that is dark enough to read."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")


def check_installed() -> None:
    """Raises BackendUnavailable."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "web page", expected="Gradio", got=f"{error}", remedy=f"Run: {install_line('web')}"
        ) from error


def listens_wide(host: str) -> bool:
    """Whether other machines can reach it."""
    if host == "localhost":
        return False
    with suppress(ValueError):
        return not ipaddress.ip_address(host).is_loopback
    return True


def read_credentials(text: str) -> Credentials:
    """Raises SettingsError unless it is user:password."""
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise SettingsError(
            "auth", expected="user:password", got="something else", remedy="Put a colon between the two."
        )
    return user, password


def free_port(host: str, port: int) -> int:
    """The port itself, or any free one for 0.  Raises SettingsError."""
    port = int(finite("port", port, 0, 65_535))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if not WINDOWS:  # where it would take an address that another program listens at
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise SettingsError(
            f"address {host}:{port}",
            expected="one that is free and of this machine",
            got=f"{error}",
            remedy="Stop what listens there, or pass another port or host.",
        ) from error
