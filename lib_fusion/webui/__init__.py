"""The extension inside the WebUI: the only folder that imports ``modules`` or ``gradio``."""
