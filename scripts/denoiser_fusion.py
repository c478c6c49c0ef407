"""Denoiser Fusion in the WebUI: the script class, the log's first line and the callbacks, nothing else."""

import os

from modules import script_callbacks, scripts

from lib_fusion.webui import other_hosts

WHY_NOT = other_hosts.why_not()

if WHY_NOT:
    print(WHY_NOT)

    class DenoiserFusionUnavailable(scripts.Script):
        def title(self):
            return other_hosts.TITLE

        def show(self, is_img2img):
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            return other_hosts.build(WHY_NOT, self.elem_id)

else:
    from modules import launch_utils

    from lib_fusion import log
    from lib_fusion.webui import script
    from lib_fusion.webui.host import adapter
    from lib_fusion.webui.panel import api, panel, settings_page, xyz
    from lib_fusion.webui.runtime import runtime

    class DenoiserFusionScript(scripts.Script):
        def title(self):
            return "Denoiser Fusion"

        def show(self, is_img2img):
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            built = panel.build(self.elem_id)
            self.infotext_fields = built.infotext_fields
            self.paste_field_names = built.paste_field_names
            return built.inputs

        def before_process(self, p, *args):
            script.before(p, args)

        def process(self, p, *args):
            script.begin(p, args)

        def process_before_every_sampling(self, p, *args, **kwargs):
            script.wrap_sampler(p)

        def postprocess(self, p, processed, *args):
            script.end(p, processed)

    adapter.register(runtime)
    script_callbacks.on_before_ui(xyz.add_axes)
    script_callbacks.on_infotext_pasted(xyz.adopt_earlier)
    script_callbacks.on_app_started(api.add_routes)
    script_callbacks.on_ui_settings(settings_page.add_options)
    script_callbacks.on_script_unloaded(runtime.close)
    if not adapter.training():
        from lib_fusion.webui.training import tab as training_tab

        script_callbacks.on_ui_tabs(training_tab.build)
    level = getattr(launch_utils.args, "loglevel", None) or os.environ.get("SD_WEBUI_LOG_LEVEL")
    log.start(f"{adapter.NAME} {launch_utils.git_tag()}", level)
