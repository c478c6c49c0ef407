"""The comparison: the base and every expert alone next to their fusion, with the same seeds, in one labelled grid.

It runs after a generation, as generations of its own from a copy of the request as the host had it first, so that all
that the host and other extensions do happens to each.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from modules import images, processing, shared

from lib_fusion.requests.settings import FusionSettings
from lib_fusion.unet.checkpoint import distinct_names

#: On a request: the settings that replace its arguments; None is off.
OVERRIDE = "_denoiser_fusion_override"


def keep_request(p: Any) -> Any:
    """A copy of a request that nothing has changed yet, with its seeds settled for both."""
    p.seed, p.subseed = processing.get_fixed_seed(p.seed), processing.get_fixed_seed(p.subseed)
    return copy.copy(p)


def alone(settings: FusionSettings, expert: int) -> FusionSettings:
    """Settings under which one expert draws the whole picture by itself, with its own prompts, as the host guides."""
    whole = replace(settings.experts[expert], weight=1.0, window=(1000.0, 0.0), place="auto", mask="")
    return FusionSettings(experts=(whole,), snb_window=(0.0, 0.0), snb_outside="expert", guidance="off")


def column_titles(names: list[str]) -> list[str]:
    """The grid's columns: the base, the experts by their names, numbered where two have the same, the fusion."""
    return ["base", *distinct_names(names), "fusion"]


def add_comparison(p: Any, processed: Any, kept: Any, settings: FusionSettings, names: list[str]) -> None:
    """Draws what is missing and puts the grid before all other pictures; an interrupt leaves it out."""
    first = processed.index_of_first_image
    count = len(processed.infotexts) - first
    each = (len(processed.images) - first) // max(count, 1)
    ways = [None, *(alone(settings, i) for i in range(len(names)))]
    columns = []
    shared.state.job_count += len(ways) * p.n_iter
    for way in ways:
        single = copy.copy(kept)
        single.extra_generation_params = {}
        single.do_not_save_samples = single.do_not_save_grid = True
        setattr(single, OVERRIDE, way)
        done = processing.process_images(single)
        if shared.state.interrupted or shared.state.skipped:
            return
        columns.append(done.images[done.index_of_first_image :][::each][:count])
    columns.append(processed.images[first::each][:count])
    cells = [column[i] for i in range(count) for column in columns]
    width, height = cells[0].size
    titles = [[images.GridAnnotation(name)] for name in column_titles(names)]
    seeds = [[images.GridAnnotation(f"seed {seed}")] for seed in p.all_seeds[:count]]
    grid = images.draw_grid_annotations(images.image_grid(cells, rows=count), width, height, titles, seeds)
    text = processed.infotexts[first]
    if shared.opts.grid_save:
        images.save_image(grid, p.outpath_grids, "fusion-comparison", p.all_seeds[0], p.all_prompts[0],
                          shared.opts.grid_format, info=text, p=p, grid=True)  # fmt: skip
    processed.images.insert(0, grid)
    processed.infotexts.insert(0, text)
    processed.index_of_first_image += 1
