"""Nothing to install: the WebUI has all that the panel needs."""
