"""The file of groups: what is written is read again."""

from pathlib import Path

import numpy as np
from prepared_files import NOWHERE

from sage.data.dataset import Example
from sage.data.groups import read_groups, write_groups


def test_groups_of_numpy_numbers_are_written_as_plain_ones(tmp_path: Path) -> None:
    examples = [Example(f"p{number}", NOWHERE, "a cat", "") for number in range(3)]
    groups, path = [np.array([2, 0]), np.array([1])], tmp_path / "groups.json"
    similarity, threshold = np.array([0.75, 1], np.float32), np.float32(0.5)
    write_groups(path, groups, similarity, examples, encoder="minilm", threshold=threshold, max_size=np.int64(2))
    assert read_groups(path, examples) == ([[2, 0], [1]], [0.75, 1.0])
