"""A saved pipeline that is opened to draw images is one that can: it is known, or proved, and makes images."""

import pytest
import tiny_families

from flows.drawing import open_pipeline
from sage.errors import UnsupportedError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")]


def test_a_pipeline_of_no_row_has_to_pass_its_proof(tmp_path):
    pipe, _ = tiny_families.unknown(tiny_families.cogview3)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="CogView3PlusPipeline cannot share sampling; so with a negative prompt"):
        open_pipeline(tmp_path)


def test_a_pipeline_of_sounds_draws_no_image_files(tmp_path):
    tiny_families.tiny("StableAudioPipeline").pipe.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="makes audios, and files are written of images only"):
        open_pipeline(tmp_path)
