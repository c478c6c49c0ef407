"""What holds in AUTOMATIC1111's WebUI holds in each fork: its tests, run there.

Those that send an infotext to the API are left out: the forks fail on any. Pasting is tested in ``test_browser.py``.
"""

from __future__ import annotations

import pytest

from tests.webui_live.client import Client, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.test_compare import (  # noqa: F401 (tests, which run here too)
    test_a_checkpoint_with_two_prompts_has_two_columns,
    test_a_seed_of_chance_is_the_same_for_all,
    test_cells_are_what_each_draws_alone,
)
from tests.webui_live.test_lifecycle import (  # noqa: F401
    test_interrupt,
    test_off_on_off,
)
from tests.webui_live.test_places import (  # noqa: F401
    test_a_black_mask_is_the_base_and_a_white_one_the_expert,
    test_the_inpaint_mask_as_a_place,
    test_without_weight_the_expert_never_runs,
)
from tests.webui_live.test_previews import (  # noqa: F401
    test_a_strip_after_each_picture,
    test_skips_and_afa_after_each_picture,
)
from tests.webui_live.test_requests import (  # noqa: F401
    test_defaults_are_not_written,
    test_off_is_off,
    test_presets_and_aggregators_are_listed_and_may_be_named,
    test_schema_lists_every_key,
)
from tests.webui_live.test_xyz import (  # noqa: F401
    test_an_error_in_one_cell_leaves_the_others_right,
    test_cells,
    test_every_parameter_has_an_axis_once_and_in_order,
    test_whole_presets,
    test_windows_over_what_the_request_says,
)

#: Forge has the same code for them, and for what the requests do there is test_steps.py.
IN_NEO = {
    test_a_checkpoint_with_two_prompts_has_two_columns, test_a_seed_of_chance_is_the_same_for_all,
    test_without_weight_the_expert_never_runs, test_skips_and_afa_after_each_picture, test_defaults_are_not_written,
    test_off_is_off, test_an_error_in_one_cell_leaves_the_others_right, test_whole_presets,
    test_windows_over_what_the_request_says, test_interrupt,
}  # fmt: skip


def test_an_error_in_the_unet_leaves_nothing(client: Client, names: Names) -> None:
    off, on = client.draw(), client.draw(expert(names.expert))
    before = client.state()
    client.ask("/probe/arm", what="fail")
    with pytest.raises(RefusedError) as refused:
        client.draw(expert(names.expert))
    assert refused.value.status == 500
    assert client.state() == before
    assert client.draw().same_as(off)
    assert client.draw(expert(names.expert)).same_as(on)
