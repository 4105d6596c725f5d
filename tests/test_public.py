import subprocess
import sys

import sage


def test_the_public_names_are_these_and_each_is_there():
    assert sage.__all__ == [
        "Grouping",
        "Plan",
        "SageError",
        "SharedSamplingPipeline",
        "StreamingGrouper",
        "embed",
        "expand",
        "group",
        "plan_for_budget",
    ]
    for name in sage.__all__:
        assert getattr(sage, name).__name__ == name


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, sage; print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(sage, "Pipeline")
