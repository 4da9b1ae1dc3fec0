"""Fetches models of the hub to the node that it runs on."""

from __future__ import annotations

import socket

from apportion.data.downloads import HubModel, fetch
from apportion.data.errors import DataError
from apportion.platform.errors import ConfigError
from apportion.platform.messages import say
from apportion.platform.process import ActorBase


class DownloadWorker(ActorBase):
    def fetch(self, models: list[HubModel]) -> None:
        for model in models:
            try:
                fetch(model, say)
            except DataError as error:
                raise ConfigError(f"{error} (on {socket.gethostname()})") from error
