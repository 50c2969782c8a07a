"""How a config file and the command line become a Config."""

import pytest

from mtp_jax.config import load_config


def test_ctrl_c_in_a_config_file_is_no_mistake_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_config(str(tmp_path / "mine.py"))
